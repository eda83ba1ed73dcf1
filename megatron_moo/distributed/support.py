"""What the exchange works with: one table for the start-up checks and for docs/support.md.

``ROWS`` is the table, written down in features.py and refusals.py. :func:`problems` is what the command line
(``megatron_moo/training/arguments.py``) and ``install()`` ask, so both refuse the same things in the same words.

    python -m megatron_moo.distributed.support      the table as Markdown; docs/support.md is its output
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from megatron_moo.distributed.features import IRRELEVANT, SUPPORTED, UNTESTED, Row
from megatron_moo.distributed.refusals import ENTRY, REFUSED
from megatron_moo.distributed.settings import Setup

ROWS = SUPPORTED + UNTESTED + REFUSED + ENTRY


def problems(setup: Setup, status: Literal["refused", "entry"] = "refused") -> list[str]:
    """What the table refuses of a setup, one text each: option, value found, reason, remedy.

    Args:
        setup: what was asked for.
        status: ``refused`` for what the exchange cannot do, ``entry`` for what the entry's data cannot.
    """
    return [row.message(setup) for row in ROWS if row.status == status and row.refuses(setup)]


# -- docs/support.md ---------------------------------------------------------------------------------------------

HEAD = """# What is supported

<!-- Written by `python -m megatron_moo.distributed.support`; change features.py and refusals.py there instead. -->

Megatron's options as the exchange sees them, for megatron-core 0.19.2. The refusals are also what is checked at
start-up: the command line before any file is written, `install()` when it is called, in the same words. Everything
that a run asks for and that is refused is named in one message.
"""
REFUSAL = ("feature", "options", "because", "do this")


def markdown() -> str:
    """docs/support.md."""
    supported = ((row.feature, row.options, row.reason, _tests(row)) for row in SUPPORTED)
    untested = ((row.feature, row.options, row.reason) for row in UNTESTED)
    return "\n".join(
        (
            HEAD,
            "## Supported\nShown by tests, on CPU over gloo.\n",
            _table(("feature", "options", "how", "shown by"), supported),
            "## Let through, not tested\nNothing known stands against these, and no test shows them: most need "
            "Transformer Engine, CUDA or a package,\nas the row says.\n",
            _table(("feature", "options", "how"), untested),
            "## Refused\nBy the exchange, with any method but `off`.\n",
            _table((*REFUSAL, "seen by"), ((*_refusal(row), row.seen_by) for row in REFUSED)),
            "## Refused by the entry\nBy `python -m megatron_moo.finetune`, with `--moo-method off` too. They do not "
            "bind who calls `install()`.\n",
            _table(REFUSAL, map(_refusal, ENTRY)),
            "## No matter\nOptions that sound as if they touched gradients, optimizers or schedules, and why the "
            "exchange need not know of them.\n",
            _table(("options", "because"), IRRELEVANT).rstrip("\n"),
            "",
        )
    )


def _refusal(row: Row) -> tuple[str, ...]:
    return row.feature, row.options, row.reason, row.remedy


def _tests(row: Row) -> str:
    """Links to the files of a row's tests, each with its cases."""
    cases: dict[str, list[str]] = {}
    for test in row.tests:
        path, _, case = test.partition("::")
        cases.setdefault(path, []).extend([f"`{case}`"] if case else [])
    links = (f"[{path.rpartition('/')[2]}](../{path}) {', '.join(found)}".strip() for path, found in cases.items())
    return "; ".join(links)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!`)(--[a-z][\w-]*[\w*]|(?:config|megatron_moo)(?:\.\w+)+)(?!`)", r"`\1`", text)


if __name__ == "__main__":
    print(markdown(), end="")
