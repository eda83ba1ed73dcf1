"""Whole runs of `megatron_moo.finetune` in forked ranks: tiny prepared data, a tiny GPT, and what came of it."""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers.multiprocess import run_ranks
from tests.helpers.pretraining import Trace, run_pretrain

# Three languages on two slots: two waves, and in every step another language has two rows.
LANGUAGES = ("de", "en", "ru")
WORDS = {"de": "eins zwei drei vier", "en": "one two three four", "ru": "раз два три", "sw": "moja mbili tatu"}


def prepare_data(folder: Path, languages: tuple[str, ...] = LANGUAGES, rows: int = 24) -> Path:
    """JSONL rows of `languages` in `folder`/rows and, tokenised as bytes, in `folder`/prepared, which is returned."""
    from megatron_moo.data.preparing.preprocess import Request, prepare

    for split, count in (("train", rows), ("valid", 8), ("test", 4)):
        for lang in languages:
            write_rows(folder / "rows" / split / f"{lang}.jsonl", lang, count)
    request = Request(folder / "rows", folder / "prepared", "byte", splits=("train", "valid"))
    prepare(request)
    return folder / "prepared"


def write_rows(path: Path, lang: str, count: int) -> None:
    """`count` rows of different lengths."""
    words = WORDS[lang].split()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"prompt": f"{i}", "completion": words[i % len(words)], "lang": lang, "task": "count"})
        for i in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def entry_argv(data: Path, *extra: str, tp: int = 1, pp: int = 1, steps: int = 4) -> list[str]:
    """Flags of a tiny run; later ones win, so `extra` may change any of them."""
    flags = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --train-iters {steps} "
        "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
        "--position-embedding-type rope --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 "
        "--lr-decay-style constant --use-distributed-optimizer --ddp-bucket-size 3000 --eval-iters 0 "
        "--log-interval 1 --no-one-logger --distributed-timeout-minutes 2 --moo-log-interval 1"
    )
    return ["--moo-data", str(data), *flags.split(), *extra]


def entry_main() -> None:
    """The program under test."""
    from megatron_moo.finetune import main

    main()


def run_entry(argv: list[str], world_size: int, main: Callable[[], None] = entry_main, **kwargs: Any) -> list[Trace]:
    """`run_pretrain` with the entry."""
    return run_pretrain(argv, world_size, main=main, **kwargs)


def weights(model: list[torch.nn.Module], optimizer: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, Adam moments and aggregator state; an `inspect` of `run_pretrain`."""
    copies = {
        f"chunk{i}/{name}": value.detach().clone()
        for i, chunk in enumerate(model)
        for name, value in chunk.module.named_parameters()
    }
    for number, part in enumerate(optimizer.chained_optimizers):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            for key, value in part.optimizer.state[parameter].items():
                copies[f"optimizer{number}/{index}/{key}"] = torch.as_tensor(value).detach().clone()
    return copies | aggregator_state(model)


def aggregator_state(model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """State of the installed method, by block and key; empty where nothing is installed. Collective."""
    moo = installed(model)
    if moo is None:
        return {}
    blocks = moo.state_dict()["blocks"]
    return {f"aggregator/{name}/{key}": value for name, entries in blocks.items() for key, value in entries.items()}


def installed(model: list[torch.nn.Module]) -> Any:
    """The `BucketLevelMoo` of a model, or None."""
    from megatron.core.utils import get_model_config

    return getattr(get_model_config(model[0]).finalize_model_grads_func, "__self__", None)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@dataclass(frozen=True)
class Ending:
    """How a program that should stop at start-up did."""

    code: Any
    stderr: str
    escaped: str  # traceback of what was raised instead of an exit

    @property
    def error(self) -> str:
        """The one error text; fails where there is none, or more than that."""
        assert not self.escaped, f"a traceback reached the user:\n{self.escaped}"
        assert self.code not in (0, None), "exit code 0"
        text = self.stderr
        if isinstance(self.code, str):  # sys.exit(text): Python prints it and exits with 1
            text += self.code
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text
        return text[text.index("error: ") :]


def start(argv: list[str], world_size: int = 1, setup: Callable[[], None] | None = None) -> Ending:
    """Start the entry as rank 0 of `world_size` in one forked process, and see how it ends.

    For input that is refused before the process group is made: no other rank exists.
    """
    return run_ranks(_start_rank, 1, argv, world_size, setup)[0]


def _start_rank(rank: int, argv: list[str], world_size: int, setup: Callable[[], None] | None) -> Ending:
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["finetune", *argv]
    code, escaped, stderr = None, "", io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            if setup is not None:
                setup()
            entry_main()
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:
            escaped = traceback.format_exc()
    return Ending(code, stderr.getvalue(), escaped)
