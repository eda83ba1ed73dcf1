"""Command-line options that say what is read: the same words in every tool."""

import argparse
from dataclasses import fields
from typing import Any

from megatron_moo.data.reading.rows import Fields


def add_dataset_options(group: Any, splits: bool = True) -> None:
    """Add --hf-dataset, --hf-config, --field and, with `splits`, --hf-split."""
    group.add_argument("--hf-dataset", metavar="NAME", help="a Hugging Face dataset: hub name, directory or file")
    group.add_argument("--hf-config", metavar="NAME", help="its configuration, where it has several")
    if splits:
        group.add_argument("--hf-split", metavar="NAME", help="one of its splits (default: all)")
    group.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        type=_field,
        help=f"read NAME from another column; NAME= reads none: {', '.join(f.name for f in fields(Fields))}",
    )


def _field(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    known = [f.name for f in fields(Fields)]
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN; NAME is one of {', '.join(known)}")
    return name, column
