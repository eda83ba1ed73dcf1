"""The seams to Megatron's training program that `seams.py` and `builder.py` use: each fails here, by name, when a new
release moves it."""

import inspect
from importlib.metadata import version

import pytest

from tests.helpers.entry import LANGUAGES, entry_argv, prepare_data, run_entry


def moved(what: str) -> str:
    """What a failure should say."""
    return f"megatron-core {version('megatron-core')} moved a seam: {what}; adapt megatron_moo/training/"


def _positional(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_training_loop_calls_what_is_hooked():
    """Would catch: a hook on a name that the loop no longer looks up, so that it is never called."""
    import megatron.training.training as loop

    callers = {
        "get_forward_backward_func": (loop.train, "get_forward_backward_func("),
        "get_optimizer_param_scheduler": (loop.setup_model_and_optimizer, "get_optimizer_param_scheduler(optimizer)"),
        "training_log": (loop.train, "training_log("),
        "evaluate": (
            loop.evaluate_and_print_results,
            "total_loss_dict, collected_non_loss_data, timelimit = evaluate(",
        ),
        "evaluate_and_print_results": (loop.train, "evaluate_and_print_results(prefix, forward_step_func"),
    }
    for name, (caller, call) in callers.items():
        assert hasattr(loop, name), moved(f"megatron.training.training.{name} is gone")
        assert call in inspect.getsource(caller), moved(f"{caller.__name__} does not call {call}")
    found = _positional(loop.training_log)
    wanted = ["loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale", "report_memory_flag"]
    wanted += ["skipped_iter", "grad_norm"]
    assert found[:8] == wanted, moved(f"training_log takes {found}")
    found = _positional(loop.evaluate_and_print_results)
    wanted = ["prefix", "forward_step_func", "data_iterator", "model", "iteration"]
    assert found[:5] == wanted, moved(f"evaluate_and_print_results takes {found}")


def test_arguments_are_parsed_in_the_steps_that_are_hooked():
    """Would catch: checks that run after Megatron has opened its TensorBoard writer, or not at all."""
    import megatron.training.arguments as arguments

    source = inspect.getsource(arguments.parse_and_validate_args)
    assert "set_global_variables(args)" in source, moved("parse_and_validate_args does not call set_global_variables")
    assert "args_defaults" in _positional(arguments.parse_and_validate_args), moved("args_defaults is gone")


def test_the_builder_is_assembled_from_the_same_parts():
    """Would catch: a model wrapped with other buckets than ours, as another function wraps it."""
    from megatron.training.models.base import compose_hooks
    from megatron.training.models.dist_utils import unimodal_build_distributed_models
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
    from megatron.training.training import wrap_model_chunks_with_ddp

    found = _positional(GPTModelBuilder.build_distributed_models)
    assert {"pg_collection", "ddp_config", "wrap_with_ddp"} <= set(found), moved(f"build_distributed_models: {found}")
    assert isinstance(GPTModelConfig.builder, str), moved("GPTModelConfig.builder is no class path")
    found = _positional(unimodal_build_distributed_models)
    assert {"wrap_with_ddp", "pre_wrap_hook"} <= set(found), moved(f"unimodal_build_distributed_models: {found}")
    found = _positional(wrap_model_chunks_with_ddp)
    assert {"pg_collection", "bucket_sizes"} <= set(found), moved(f"wrap_model_chunks_with_ddp: {found}")
    both = compose_hooks([lambda model: [*model, 1], lambda model: [*model, 2]])
    assert both([0]) == [0, 1, 2], moved("compose_hooks runs hooks in another order")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three languages, tokenised as bytes."""
    return prepare_data(tmp_path_factory.mktemp("data"))


def _installed(model, optimizer) -> tuple:
    """Who finalises gradients, what it resolved last, and its state in the scheduler's checkpoint."""
    from megatron_moo.distributed import BucketLevelMoo

    moo = getattr(model[0].module.config.finalize_model_grads_func, "__self__", None)
    if not isinstance(moo, BucketLevelMoo):
        return None, None, None
    return type(moo).__name__, moo.record.step, list(moo.config.objectives)


def test_the_loop_keeps_our_finalize_function(data):
    """Would catch: `train` setting its own `finalize_model_grads_func`, which would reduce rows as if summed."""
    argv = entry_argv(data, "--global-batch-size", "6", "--moo-method", "mgda", steps=2)
    found = run_entry(argv, 1, inspect=_installed)[0].inspected
    assert found == ("BucketLevelMoo", 1, list(LANGUAGES)), moved("train replaced config.finalize_model_grads_func")
