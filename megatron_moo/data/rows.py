"""Rows of supervised data: JSONL in, texts with a loss flag out.

Two forms of row, both with the language tag in `lang`:

    {"prompt": "...", "completion": "...", "lang": "sw"}                      loss on the completion
    {"messages": [{"role": "user", "content": "..."}, ...], "lang": "sw"}     loss on every assistant turn

Prompt and completion are tokenised apart, so that decoding at evaluation starts from the very tokens of
training. Messages take a plain template: `role: content`, a line each; an assistant turn ends with the
end-of-document token.
Any other field is allowed; `task` and `id` are read where they exist.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moo.data.files import DataError

TEMPLATE = 1  # raise it when the same row gives other segments: prepared data is then made again
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """A piece of a sample. `loss`: its tokens are targets, and the end-of-document token follows them."""

    text: str
    loss: bool


@dataclass(frozen=True)
class Row:
    """One validated row and where it stands (`file:line`)."""

    where: str
    lang: str
    segments: tuple[Segment, ...]
    task: str
    id: str


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: missing field {field!r}; the row has: {', '.join(row) or 'nothing'}")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} must be a string, got {type(row[field]).__name__}")
    if not row[field].strip():
        raise DataError(f"{where}: field {field!r} is empty")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # json accepts "\ud800"
        raise DataError(f"{where}: field {field!r} holds a lone surrogate at character {error.start}") from None
    return row[field]


def _messages(row: dict[str, Any], where: str) -> tuple[Segment, ...]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'messages' must be a list of at least one message")
    segments = []
    text = ""
    for number, turn in enumerate(turns):
        at = f"{where}: messages[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{at} must be an object with role and content, got {type(turn).__name__}")
        role, content = _text(turn, "role", at), _text(turn, "content", at)
        if role not in ROLES:
            raise DataError(f"{at}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if role == "assistant":
            segments += [Segment(text + "assistant: ", False), Segment(content, True)]
            text = "\n"
        else:
            text += f"{role}: {content}\n"
    if not segments:
        raise DataError(f"{where}: 'messages' has no assistant turn, so there is nothing to learn from")
    return tuple(segments)


def _parse(line: str, where: str, lang: str | None) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    found = _text(row, "lang", where)
    if lang is not None and found != lang:
        raise DataError(f"{where}: unknown language {found!r}; this file holds {lang!r}")
    if "messages" in row:
        segments = _messages(row, where)
    else:
        segments = (
            Segment(_text(row, "prompt", where), False),
            Segment(_text(row, "completion", where), True),
        )
    return Row(where, found, segments, str(row.get("task", "")), str(row.get("id", "")))


def read_rows(path: str | Path, lang: str | None = None) -> Iterator[Row]:
    """Rows of a JSONL file in order; blank lines are skipped.

    Args:
        path: UTF-8 JSONL.
        lang: the language every row must carry; None takes any.

    Raises:
        DataError: naming file and line: not UTF-8, malformed JSON, a field missing, empty or of a wrong type,
            another language; or naming the file: missing, or without rows.
    """
    count = 0
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
            if line.strip():
                count += 1
                yield _parse(line, where, lang)
    if not count:
        raise DataError(f"{path}: empty corpus: no rows; remove the file or give it data")


@dataclass(frozen=True)
class EvalRow:
    """A prompt to decode from and the answer that must come out."""

    prompt: str
    completion: str
    lang: str
    task: str


def read_eval_rows(path: str | Path, lang: str | None = None) -> list[EvalRow]:
    """Evaluation rows of a JSONL file; of messages, the last assistant turn is the answer.

    The prompt of a several-turn row is the text before that turn without the end-of-document tokens between
    turns.

    Raises:
        DataError: as `read_rows`.
    """
    rows = []
    for row in read_rows(path, lang):
        *before, answer = row.segments
        rows.append(EvalRow("".join(s.text for s in before), answer.text, row.lang, row.task))
    return rows
