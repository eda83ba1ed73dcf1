"""Options of the methods and of what goes around them: from their own descriptions to flags, and back.

``--moo-METHOD-OPTION`` for each option of each of our methods, ``--moo-option NAME=VALUE`` for those of any method,
``--moo-WRAPPER-OPTION`` for wrappers, which are off until one of their options is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from megatron_moo.aggregation import AGGREGATORS, WRAPPERS, Option, aggregator_options


def add_method_arguments(group: Any) -> None:
    """Add the flags to an argument group."""
    group.add_argument(
        "--moo-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the chosen method, e.g. of your own --moo-method package.module:Class; may be repeated",
    )
    for owner, name, option in _described():
        group.add_argument(
            _flag(owner, name),
            default=None,
            type=type(option.default),
            metavar="{" + ",".join(option.choices) + "}" if option.choices else "NUMBER",
            help=f"{owner}: {option.help} (default: {'off' if owner in WRAPPERS else option.default})".replace(
                "%", "%%"
            ),
        )


def _described() -> Iterator[tuple[str, str, Option]]:
    """Every option that has a flag of its own: whose it is, its name, its description."""
    for method in AGGREGATORS:
        for name, option in aggregator_options(method).items():
            yield method, name, option
    for wrapper, kind in WRAPPERS.items():
        for name, option in kind.options.items():
            yield wrapper, name, option


def _flag(owner: str, option: str) -> str:
    return f"--moo-{owner}-{option.replace('_', '-')}"


def _given(args: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Options that the command line gave: owner, name, value."""
    for owner, name, _ in _described():
        value = getattr(args, _flag(owner, name)[2:].replace("-", "_"))
        if value is not None:
            yield owner, name, value


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the chosen method.

    Raises:
        ValueError: for options of another method, an option given twice, or one that is not NAME=VALUE.
    """
    chosen = {}
    for owner, name, value in _given(args):
        if owner in WRAPPERS:
            continue
        if owner != args.moo_method:
            raise ValueError(f"{_flag(owner, name)} belongs to --moo-method {owner}, not {args.moo_method}; drop it")
        chosen[name] = value
    for item in args.moo_option:
        name, sign, value = item.partition("=")
        name = name.strip()
        if not sign or not name:
            raise ValueError(f"--moo-option: {item!r} is not NAME=VALUE")
        if name == "wrappers":
            raise ValueError(f"--moo-option {item}: wrappers have flags of their own: --moo-cap-ratio, ...; see --help")
        if name in chosen:
            raise ValueError(f"--moo-option {item}: {name} is given twice; give it once")
        chosen[name] = _number_or_text(value.strip())
    return chosen


def wrapper_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of the wrappers that the command line asks for, by wrapper."""
    chosen: dict[str, dict[str, Any]] = {}
    for owner, name, value in _given(args):
        if owner in WRAPPERS:
            chosen.setdefault(owner, {})[name] = value
    return chosen


def _number_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
