"""From JSONL to indexed files and back."""

import json

import numpy as np
import pytest

from megatron_moo.data.files import DataError
from megatron_moo.data.manifest import Manifest
from megatron_moo.data.preprocess import Request, prepare
from megatron_moo.data.tokenizers import ByteTokenizer
from tests.unit.data.conftest import prompt_rows, write_rows
from tools import preprocess


def _prepare(data, out, **options) -> Manifest:
    return prepare(Request(data, out, tokenizer_type="byte", **options))[0]


def test_round_trip_in_many_scripts(tmp_path, script_texts):
    """Would catch a token, a mask bit or a boundary in the wrong place, for any script."""
    for lang, text in script_texts.items():
        rows = [{"prompt": text + str(i), "completion": text, "lang": lang} for i in range(3)]
        rows.append(
            {
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 2,
                "lang": lang,
            }
        )
        write_rows(tmp_path / "in" / "train" / f"{lang}.jsonl", rows)
    manifest = _prepare(tmp_path / "in", tmp_path / "out")
    tokenizer = ByteTokenizer()
    for lang, text in script_texts.items():
        corpus = manifest.corpus("train", lang)
        for i in range(3):
            tokens, mask = corpus[i]
            assert tokenizer.decode(tokens[~mask]) == text + str(i)
            assert tokenizer.decode(tokens[mask]) == text
            assert tokens[-1] == tokenizer.eod and mask[-1] and (tokens == tokenizer.eod).sum() == 1
        tokens, mask = corpus[3]
        assert tokenizer.decode(tokens) == f"user: {text}\nassistant: {text}\nuser: {text}\nassistant: {text}"
        assert tokenizer.decode(tokens[mask]) == text * 2 and (tokens[mask] == tokenizer.eod).sum() == 2
        assert tokens.dtype == np.int64 and mask.dtype == bool
        entry = manifest.splits["train"][lang]
        assert (entry.documents, entry.longest) == (4, corpus.longest)
        assert entry.tokens == sum(len(corpus[i][0]) for i in range(4))
        assert entry.answer_tokens == sum(corpus[i][1].sum() for i in range(4))


def test_objectives_are_the_training_languages_in_order(corpus_dir, tmp_path):
    """Would catch objective numbers that follow the file system or include an unseen language."""
    assert _prepare(corpus_dir, tmp_path / "a").objectives == ("de", "en")
    manifest = _prepare(corpus_dir, tmp_path / "b", languages=("en", "da", "de"))
    assert manifest.objectives == ("en", "de")
    assert manifest.languages("near") == ("da",) and manifest.languages("test") == ("en", "de")


def test_work_is_skipped_only_when_nothing_changed(corpus_dir, tmp_path):
    """Would catch stale data after a change of rows, order or output files, and work done twice."""
    request = Request(corpus_dir, tmp_path / "out", tokenizer_type="byte")
    assert prepare(request)[1] and not prepare(request)[1]
    rows = prompt_rows("en", 21)
    write_rows(corpus_dir / "train" / "en.jsonl", rows)
    manifest, done = prepare(request)
    assert done and len(manifest.corpus("train", "en")) == 21
    with open(tmp_path / "out" / "train" / "en.bin", "ab") as stream:
        stream.write(b"x")
    assert prepare(request)[1], "a damaged output is made again"
    assert prepare(Request(corpus_dir, tmp_path / "out", tokenizer_type="byte", languages=("en", "de")))[1]


def test_the_directory_can_be_moved(corpus_dir, tmp_path):
    """Would catch paths in the manifest that hold only where it was made."""
    _prepare(corpus_dir, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert len(Manifest.load(tmp_path / "moved").corpus("train", "de")) == 30


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train/en.bin").write_bytes(b""), r"en.bin: 0 bytes where its index says"),
        (lambda d: (d / "train/en.mask.bin").unlink(), r"en.mask.bin: missing"),
        (
            lambda d: (d / "train/de.idx").write_bytes((d / "train/en.idx").read_bytes()),
            "hash is not the one",
        ),
        (lambda d: (d / "manifest.json").write_text("{}"), "schema None, this version reads 1"),
        (lambda d: (d / "manifest.json").write_text('{"schema": 1}'), "not a manifest of this version"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "manifest.json").unlink(), "prepare the data with tools/preprocess.py"),
    ],
)
def test_damaged_data_is_refused(corpus_dir, tmp_path, damage, message):
    """Would catch training on files that are not the prepared ones."""
    _prepare(corpus_dir, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path / "out")


def test_unknown_names_list_the_known_ones(corpus_dir, tmp_path):
    """Would catch a KeyError in place of an answer."""
    manifest = _prepare(corpus_dir, tmp_path / "out")
    with pytest.raises(DataError, match="'xx' is not in split 'train' .*known: de, en"):
        manifest.corpus("train", "xx")
    with pytest.raises(DataError, match="split 'dev' is not in .*known: near, test, train"):
        manifest.languages("dev")
    with pytest.raises(DataError, match="none of da is in the split 'train'"):
        _prepare(corpus_dir, tmp_path / "other", languages=("da",))


def _run(corpus_dir, out, *arguments: str) -> int:
    return preprocess.main(["--data", str(corpus_dir), "--out", str(out), "--tokenizer-type", "byte", *arguments])


@pytest.mark.parametrize(
    ("arguments", "break_it", "message"),
    [
        (("--languages", "en", "xx"), None, "--languages: unknown language 'xx'"),
        (("--languages", "en", "en"), None, "'en' is given twice"),
        (("--splits", "dev"), None, "split 'dev'"),
        (
            ("--tokenizer-type", "sentencepiece", "--tokenizer-model", "no.model"),
            None,
            "no such file: no.model",
        ),
        (("--tokenizer-type", "sentencepiece"), None, "--tokenizer-model"),
        ((), lambda d: (d / "train/en.jsonl").write_text(""), "train/en.jsonl: empty corpus"),
        (
            (),
            lambda d: (d / "train/en.jsonl").write_text('{"a": 1}\n{'),
            "train/en.jsonl:1: missing field 'lang'",
        ),
        ((), lambda d: (d / "test/en.jsonl").write_text('{"prompt'), "test/en.jsonl:1: malformed JSON"),
        ((), lambda d: [p.unlink() for p in d.glob("*/*.jsonl")], "empty corpus"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(corpus_dir, tmp_path, capsys, arguments, break_it, message):
    """Would catch a stack trace, exit code 0, half-written output, or the loss of a good earlier one."""
    _prepare(corpus_dir, tmp_path / "earlier")
    before = (tmp_path / "earlier" / "manifest.json").read_bytes()
    if break_it:
        break_it(corpus_dir)
    for out in (tmp_path / "new", tmp_path / "earlier"):
        assert _run(corpus_dir, out, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier", "jsonl"]
    assert (tmp_path / "earlier" / "manifest.json").read_bytes() == before
    Manifest.load(tmp_path / "earlier")


def test_a_directory_of_other_things_is_not_replaced(corpus_dir, tmp_path, capsys):
    """Would catch a mistyped --out that deletes the user's files."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    assert _run(corpus_dir, tmp_path / "home") == 2
    assert "not empty and without manifest.json" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_the_tool_prints_counts_and_says_when_it_skips(corpus_dir, tmp_path, capsys):
    """Would catch a second run that works again or says nothing."""
    assert _run(corpus_dir, tmp_path / "out") == 0
    assert "objectives de en" in capsys.readouterr().out
    assert _run(corpus_dir, tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["objectives"] == ["de", "en"]
