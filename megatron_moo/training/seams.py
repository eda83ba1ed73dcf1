"""The places where the entry hooks into Megatron's training program; each is a module-level name that Megatron looks
up when it runs.

Of ``megatron.training.training``:

- ``get_forward_backward_func``: a step runs the schedule once per wave;
- ``get_optimizer_param_scheduler``: the scheduler is the part of a checkpoint that is common to all ranks and follows
  Megatron's own rules for resuming (``--finetune`` and ``--no-load-optim`` leave it out), so the aggregator's state
  travels in it;
- ``training_log``: called once per step on every rank with what a step reports;
- ``evaluate_and_print_results``, ``evaluate``: called for each validation, which reads the same samples every time and
  reports the losses of the languages.

Of ``megatron.training.arguments``:

- ``set_global_variables``: what comes between validated arguments and the first file that is written.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import megatron.training.arguments as arguments
import megatron.training.training as loop
import torch.distributed as dist
from megatron.training import print_rank_0

from megatron_moo.aggregation import WRAPPERS, layers
from megatron_moo.distributed import BucketLevelMoo

SCHEDULER_KEY = "megatron_moo"


def parse_arguments(
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    defaults: dict[str, Any],
    check: Callable[[argparse.Namespace], None],
) -> argparse.Namespace:
    """Megatron's ``parse_and_validate_args``, with ``check(args)`` before it sets its global state.

    That opens the TensorBoard writer, which creates directories: what is wrong must be found before.

    Raises:
        ValueError: what Megatron (by an assertion) or ``check`` refuses.
    """
    stock = arguments.set_global_variables

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.error = _refuse  # argparse's own prints a usage of several hundred lines, on every rank
        parser = add_arguments(parser)
        _mend_help(parser)
        return parser

    def set_global_variables(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> None:
        check(args)
        stock(args, *rest, **kwargs)

    arguments.set_global_variables = set_global_variables
    try:
        return arguments.parse_and_validate_args(add, args_defaults=defaults)
    except AssertionError as error:
        # Some of Megatron's assertions have no text: their source names the options.
        rule = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"Megatron refuses these arguments: {rule}") from error
    finally:
        arguments.set_global_variables = stock


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Double the bare percent signs in Megatron's help texts, at the first of which ``--help`` would stop."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message} (--help lists the options)")


@contextlib.contextmanager
def hooked_training_loop(
    moo: Callable[[], BucketLevelMoo | None],
    begin_step: Callable[[], int],
    after_step: Callable[..., None],
    before_validation: Callable[[], None],
    after_validation: Callable[[int, bool], None],
) -> Iterator[None]:
    """Run Megatron's loop with our hooks inside this context.

    Args:
        moo: the installed combination, or None when stock Megatron reduces the gradients; asked for when needed,
            because the model is built inside the loop.
        begin_step: index of the step that starts.
        after_step: called with the keyword arguments ``learning_rate, iteration, grad_norm``.
        before_validation: called before each validation.
        after_validation: called with the number of the step that it followed, and whether it came to its end.
    """
    names = (
        "get_forward_backward_func",
        "get_optimizer_param_scheduler",
        "training_log",
        "evaluate_and_print_results",
        "evaluate",
    )
    missing = [name for name in names if not hasattr(loop, name)]
    if missing:
        raise RuntimeError(
            f"megatron.training.training no longer has {', '.join(missing)}: this megatron-core release moved a seam; "
            "install a release that setup.py allows"
        )
    stock = {name: getattr(loop, name) for name in names}

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        schedule = stock["get_forward_backward_func"](*args, **kwargs)
        waves = schedule if moo() is None else moo().waves(schedule)

        def run(*, forward_only: bool = False, **kwargs: Any) -> Any:
            if not forward_only:
                step = begin_step()
                if moo() is not None:
                    moo().step = step
            return waves(forward_only=forward_only, **kwargs)

        return run

    def get_optimizer_param_scheduler(optimizer: Any) -> Any:
        scheduler = stock["get_optimizer_param_scheduler"](optimizer)
        _carry_state(scheduler, moo())
        return scheduler

    def training_log(
        loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        # loss_scale, report_memory_flag, skipped_iter and grad_norm are positional in Megatron's own call.
        result = stock["training_log"](loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        after_step(learning_rate=learning_rate, iteration=iteration, grad_norm=args[3])
        return result

    ended = True

    def evaluate_and_print_results(
        prefix: str, forward_step: Any, batches: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> None:
        before_validation()
        stock["evaluate_and_print_results"](prefix, forward_step, batches, model, iteration, *args, **kwargs)
        after_validation(iteration, ended)

    def evaluate(*args: Any, **kwargs: Any) -> tuple:
        nonlocal ended
        result = stock["evaluate"](*args, **kwargs)
        ended = not result[2]  # else --exit-duration-in-mins cut it short
        return result

    hooks = (
        get_forward_backward_func,
        get_optimizer_param_scheduler,
        training_log,
        evaluate_and_print_results,
        evaluate,
    )
    for name, hook in zip(names, hooks, strict=True):
        setattr(loop, name, hook)
    try:
        yield
    finally:
        for name in names:
            setattr(loop, name, stock[name])


def _carry_state(scheduler: Any, moo: BucketLevelMoo | None) -> None:
    """Let the scheduler's checkpoint carry the aggregator's state, and its refusals be one line."""
    own_state, own_load = scheduler.state_dict, scheduler.load_state_dict

    def state_dict() -> dict[str, Any]:
        return {**own_state(), SCHEDULER_KEY: moo.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        # All ranks load the same state, so all stop, or none.
        try:
            own_load({key: value for key, value in state.items() if key != SCHEDULER_KEY})
        except AssertionError as error:
            _stop(
                f"the checkpoint's learning-rate schedule is not this run's: {error}; --override-opt-param-scheduler "
                "takes this run's, --use-checkpoint-opt-param-scheduler the checkpoint's"
            )
        if moo is None:
            return
        try:
            _load_state(moo, state.get(SCHEDULER_KEY))
        except ValueError as error:
            _stop(str(error))

    if moo is not None:
        scheduler.state_dict = state_dict
    scheduler.load_state_dict = load_state_dict


def _stop(reason: str) -> NoReturn:
    if dist.get_rank() == 0:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)


def _load_state(moo: BucketLevelMoo, state: dict[str, Any] | None) -> None:
    """Take up the aggregator's state, and say what of it is missing or left."""
    if state is None:
        if moo.aggregator.stateful:
            print_rank_0(f" moo: the checkpoint has no state of {moo.config.method}, which starts afresh")
        return
    fresh: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fresh, moo.load_state_dict(state))
    if names := list(dict.fromkeys(name for part in fresh for name in part)):
        print_rank_0(
            f" moo: the checkpoint has no aggregator state for {len(names)} blocks, which start afresh: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            + (
                "; buckets follow --ddp-bucket-size and the pipeline cut, other blocks would carry over"
                if moo.config.granularity == "bucket"
                else ""
            )
        )
    saved = {key for entries in state["blocks"].values() for key in entries}
    ours = {key: layer for layer in layers(moo.aggregator) for key in layer.state_keys}
    owners = {key: kind.__name__ for kind in WRAPPERS.values() for key in kind.state_keys}
    if left := sorted({owners.get(key, key) for key in saved - ours.keys()}):
        print_rank_0(f" moo: the checkpoint's state of {', '.join(left)}, which this run does not have, is dropped")
    if new := sorted(f"{type(ours[key]).__name__} ({key})" for key in ours.keys() - saved):
        print_rank_0(f" moo: the checkpoint has no state of {', '.join(new)}, which starts afresh")
