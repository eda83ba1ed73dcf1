"""Fields and validators of the lines of metrics.jsonl and of eval.json; docs/metrics.md describes them.

Shape letters: K objectives, in the order of the line's own "objectives" list.
"""

import math
from collections.abc import Callable
from typing import Any

KINDS = ("step", "blocks", "validation", "event")

Record = dict[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_cosine(value: Any) -> bool:
    # Rounding can carry the cosine of two nearly parallel rows past 1; NaN comes from a diverged run.
    return _is_number(value) and (math.isnan(value) or abs(value) <= 1 + 1e-3)


def _or_null(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


# Field -> (test, what the test asks for).
Fields = dict[str, tuple[Callable[[Any], bool], str]]
_LOSSES: Fields = {
    "step": (_is_count, "a whole number >= 0"),
    "time": (_is_number, "a number (unix seconds)"),
    "loss": (_or_null(_is_number), "a number or null"),
    "objectives": (lambda value: isinstance(value, dict), "an object {language: {loss, tokens}}"),
}
_STEP: Fields = _LOSSES | {
    "grad_norm": (_or_null(_is_number), "a number or null"),
    "lr": (_is_number, "a number"),
}
_OBJECTIVE: Fields = {
    "loss": (_or_null(_is_number), "a number, or null without tokens"),
    "tokens": (_is_count, "a whole number >= 0"),
}
_BLOCKS: Fields = {
    "step": (_is_count, "a whole number >= 0"),
    "method": (lambda value: isinstance(value, str), "a string"),
    "granularity": (lambda value: isinstance(value, str), "a string"),
    "objectives": (
        lambda value: isinstance(value, list) and value and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "blocks": (lambda value: isinstance(value, list) and value, "a list of blocks"),
}
_BLOCK: Fields = {
    "block": (lambda value: isinstance(value, str), "a string"),
    "conflict_share": (
        _or_null(_is_share),
        "a number from 0 to 1, or null with fewer than two active objectives",
    ),
    "control_share": (_or_null(_is_share), "a number from 0 to 1, or null"),
    "control_cosine": (_or_null(_is_cosine), "a number from -1 to 1, or null"),
    "norm_ratio": (_or_null(_is_number), "a number, or null where the mean is zero"),
}
_TASK: Fields = {
    "correct": (_is_count, "a whole number >= 0"),
    "total": (lambda value: _is_count(value) and value > 0, "a whole number > 0"),
}


def _check_fields(record: Any, fields: Fields, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, found {type(record).__name__}")
    for name, (test, wanted) in fields.items():
        if name not in record:
            raise ValueError(f'{where} lacks "{name}"')
        if not test(record[name]):
            raise ValueError(f'{where}: "{name}" must be {wanted}, found {_short(record[name])}')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_block(block: Any, k: int, where: str) -> None:
    _check_fields(block, _BLOCK, where)
    where = f'{where} "{block["block"]}"'
    lists = {"weights": _or_null(_is_number), "active": lambda value: isinstance(value, bool)}
    if "norms" in block:  # not in files of earlier versions
        lists["norms"] = _or_null(_is_number)
    for name, test in lists.items():
        values = block.get(name)
        if not isinstance(values, list) or len(values) != k or not all(map(test, values)):
            raise ValueError(
                f'{where}: "{name}" must be a list of {k} values, one an objective, found {_short(values)}'
            )
    cosine = block.get("cosine")
    square = isinstance(cosine, list) and len(cosine) == k
    square = square and all(isinstance(row, list) and len(row) == k for row in cosine)
    if not square or not all(_or_null(_is_cosine)(value) for row in cosine for value in row):
        wanted = f"{k} lists of {k} numbers from -1 to 1 (or null)"
        raise ValueError(f'{where}: "cosine" must be {wanted}, found {_short(cosine)}')


def check_record(record: Any) -> None:
    """Checks one line of metrics.jsonl, already parsed.

    Unknown fields are let through, so that later writers can add to a line.

    Raises:
        ValueError: names the field, what it must be and what was found.
    """
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in KINDS:
        raise ValueError(f'a line must be an object whose "kind" is one of {", ".join(KINDS)}, found {_short(record)}')
    if kind in ("step", "validation"):
        _check_fields(record, _STEP if kind == "step" else _LOSSES, f"{kind} line")
        for name, entry in record["objectives"].items():
            _check_fields(entry, _OBJECTIVE, f'{kind} line: objective "{name}"')
    elif kind == "blocks":
        _check_fields(record, _BLOCKS, "blocks line")
        for block in record["blocks"]:
            _check_block(block, len(record["objectives"]), "block")


def check_evaluation(evaluation: Any) -> None:
    """Checks eval.json, already parsed: splits, languages, tasks, and no more correct answers than questions.

    Raises:
        ValueError: names the field, what it must be and what was found.
    """
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("splits"), dict):
        raise ValueError('must be an object with "splits": {split: {language: {task: {correct, total}}}}')
    for split, languages in evaluation["splits"].items():
        if not isinstance(languages, dict) or not all(isinstance(tasks, dict) for tasks in languages.values()):
            raise ValueError(f'split "{split}" must be an object {{language: {{task: {{correct, total}}}}}}')
        for language, tasks in languages.items():
            for task, score in tasks.items():
                where = f"{split}/{language}/{task}"
                _check_fields(score, _TASK, where)
                if score["correct"] > score["total"]:
                    raise ValueError(f"{where}: {score['correct']} correct of {score['total']}")
