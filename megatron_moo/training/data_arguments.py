"""Options of the entry that say what is trained on, in which shares, and how samples become batches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_moo.data.corpus import OVERLONG


def add_data_arguments(group: Any) -> None:
    """Add them to the group ``megatron-moo``."""
    group.add_argument(
        "--blend-manifest",
        type=Path,
        default=None,
        metavar="FILE",
        help="languages and their shares, as tools/blend.py write made it; says which data, too",
    )
    group.add_argument(
        "--moo-data",
        type=Path,
        default=None,
        metavar="DIR",
        help="data made by tools/preprocess.py (holds manifest.json), all languages in equal shares; instead of "
        "--blend-manifest",
    )
    group.add_argument(
        "--moo-languages",
        default=None,
        metavar="LANG,...",
        help="train on these only; shares of the others are divided among them (default: all of the training split)",
    )
    group.add_argument("--moo-train-split", default="train", help="split to train on (default: train)")
    group.add_argument(
        "--moo-valid-split",
        default=None,
        help="split for validation; each language's loss is reported (default: valid, validation or dev, if there)",
    )
    group.add_argument(
        "--moo-data-seed",
        type=int,
        default=None,
        metavar="N",
        help="decides the order of languages and samples (default: the blend's seed; with --moo-data, --seed)",
    )
    group.add_argument(
        "--moo-floor",
        type=float,
        default=None,
        metavar="F",
        help="what a language gets however small its share, from 0 to 1. 1: a row of every step, where there are "
        "enough; 0: exactly its share, so that small languages are not in every step. With --moo-active, the least "
        "part of the turns that it would have with equal shares, above 0 (default: 1; with --moo-active 0.5)",
    )
    group.add_argument(
        "--moo-overlong",
        default="drop",
        choices=OVERLONG,
        help="what becomes of samples of more than --seq-length + 1 tokens. drop: left out and counted; truncate: cut, "
        "and left out if no target remains; split: cut into pieces that all count as samples; error: the run does not "
        "start (default: drop)",
    )
    group.add_argument(
        "--moo-pack",
        action="store_true",
        help="put several samples of a language into one sequence of --seq-length. They do not see each other: "
        "attention, positions and targets end with the sample. A sequence then counts as a sample in "
        "--global-batch-size; --micro-batch-size must be 1",
    )
    group.add_argument(
        "--moo-parallel",
        action="store_true",
        help="the languages of a step work on the same prompts: rows whose ids are in all of them",
    )


def check_data_arguments(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: naming options and remedy.
    """
    if (args.moo_data is None) == (args.blend_manifest is None):
        found = "neither" if args.moo_data is None else "both"
        raise ValueError(
            f"--blend-manifest FILE (shares made by tools/blend.py write) or --moo-data DIR (made by "
            f"tools/preprocess.py, equal shares): give one of them, found {found}"
        )
    if args.moo_data_seed is not None and args.moo_data_seed < 0:
        raise ValueError(f"--moo-data-seed must not be negative, found {args.moo_data_seed}")
    if args.moo_floor is not None and not (0 if args.moo_active is None else 1e-9) <= args.moo_floor <= 1:
        low = "from 0" if args.moo_active is None else "above 0 with --moo-active,"
        raise ValueError(f"--moo-floor must be {low} to 1, found {args.moo_floor}")
    if args.moo_pack and args.micro_batch_size != 1:
        raise ValueError(
            f"--moo-pack needs --micro-batch-size 1, found {args.micro_batch_size}: a packed sequence is a batch of "
            "its own; raise --seq-length for more tokens at a time"
        )
    if args.moo_pack and args.moo_parallel:
        raise ValueError("--moo-pack puts samples together by length, --moo-parallel by prompt: give one of them")
