"""Validation of JSONL rows."""

import json

import pytest

from megatron_moo.data.files import DataError
from megatron_moo.data.rows import read_eval_rows, read_rows

GOOD = b'{"prompt": "a", "completion": "b", "lang": "en"}\n'


def _row(**change) -> bytes:
    row = {"prompt": "a", "completion": "b", "lang": "en"} | change
    return json.dumps({k: v for k, v in row.items() if v is not None}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", \n', "malformed JSON"),
        (b"[1, 2]\n", "must be a JSON object, got list"),
        (b'{"prompt": "\xff"}\n', "not UTF-8 at byte 12"),
        (_row(completion=None), "missing field 'completion'; the row has: prompt, lang"),
        (_row(lang=None), "missing field 'lang'"),
        (_row(prompt=3), "'prompt' must be a string, got int"),
        (_row(completion=" "), "'completion' is empty"),
        (_row(prompt=""), "'prompt' is empty"),
        (_row(lang="de"), "unknown language 'de'; this file holds 'en'"),
        (b'{"prompt": "\\ud800", "completion": "b", "lang": "en"}\n', "lone surrogate"),
        (_row(messages=[]), "list of at least one message"),
        (_row(messages=["hi"]), r"messages\[0\] must be an object"),
        (_row(messages=[{"role": "user", "content": "x"}]), "no assistant turn"),
        (
            _row(messages=[{"role": "bot", "content": "x"}]),
            "unknown role 'bot'; known: system, user, assistant",
        ),
        (_row(messages=[{"role": "user"}]), r"messages\[0\]: missing field 'content'"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, line, message):
    """Would catch a bad row that is skipped, or an error that leaves the user searching for it."""
    path = tmp_path / "en.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(path, "en"))
    assert str(error.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_empty_corpus(tmp_path, content):
    """Would catch a language that trains on nothing."""
    path = tmp_path / "en.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty corpus"):
        list(read_rows(path))


def test_a_missing_file(tmp_path):
    """Would catch a stack trace where a file name is enough."""
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "en.jsonl"))


def test_byte_order_mark_and_crlf_are_harmless(tmp_path):
    """Would catch files from Windows being refused or read with stray characters."""
    path = tmp_path / "en.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert [[s.text for s in row.segments] for row in read_rows(path)] == [["a", "b"]] * 2


def test_messages_have_loss_on_assistant_turns_only(tmp_path):
    """Would catch loss on what the user said, or a turn lost between two answers."""
    turns = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    path = tmp_path / "en.jsonl"
    path.write_bytes(_row(messages=[{"role": r, "content": c} for r, c in turns]))
    (row,) = read_rows(path)
    assert [s.text for s in row.segments if s.loss] == ["A1", "A2"]
    assert "".join(s.text for s in row.segments) == "system: S\nuser: U1\nassistant: A1\nuser: U2\nassistant: A2"


def test_evaluation_rows(tmp_path):
    """Would catch an evaluation prompt that differs from the training prompt or holds the answer."""
    path = tmp_path / "en.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    path.write_bytes(_row(task="t", prompt="p\n") + _row(messages=turns))
    first, second = read_eval_rows(path)
    assert (first.prompt, first.completion, first.lang, first.task) == ("p\n", "b", "en", "t")
    assert (second.prompt, second.completion) == ("user: q\nassistant: ", "r")
    with pytest.raises(DataError, match=":1: unknown language 'en'"):
        read_eval_rows(path, "de")
