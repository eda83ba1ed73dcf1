"""Counts, fertility and premium of raw and prepared data; `tools/blend.py inspect`."""

import json

import pytest

from megatron_moo.data.checking import survey
from megatron_moo.data.statistics import Counts, count_words, separates_words
from tests.helpers.tiny_tokenizers import save_sentencepiece
from tools.blend import main

# Each line is one document; `x` lines are to be counted by hand.
LINES = {"en": ["one two three", "four"], "sw": ["moja mbili", "tatu nne tano sita"], "th": ["สี่สิบสอง", "สาม"]}


def _inspect(capsys, *options: object) -> dict:
    assert main(["inspect", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _refused(capsys, *options: object) -> str:
    assert main(["inspect", *map(str, options)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and not out
    return err


@pytest.fixture
def texts(tmp_path):
    """Plain text in a train split."""
    folder = tmp_path / "raw" / "train"
    folder.mkdir(parents=True)
    for lang, lines in LINES.items():
        (folder / f"{lang}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "raw"


@pytest.fixture
def parallel(tmp_path):
    """Two languages with the same ids; the second says everything in three times the bytes."""
    folder = tmp_path / "parallel" / "train"
    folder.mkdir(parents=True)
    for lang, word in (("de", "ab"), ("en", "ababab")):
        rows = [{"id": i, "prompt": "q", "completion": word * (1 + i % 5), "lang": lang} for i in range(30)]
        rows.append({"prompt": "q", "completion": "without an id " * 50, "lang": lang})
        (folder / f"{lang}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "parallel"


def test_counts_of_texts_outside_ascii():
    """Would catch bytes counted as characters, or the reverse."""
    counts = Counts.of(["né à", "四十二"], tokens=5, answer_tokens=2)
    assert counts == Counts(1, 5, 2, bytes=6 + 9, characters=4 + 3, words=2 + 1, longest=5)


def test_counts_add_up_but_the_longest_is_a_maximum():
    """Would catch totals that depend on the order of the shards, or a sum of longest documents."""
    parts = [Counts.of(["a b"] * i, tokens=10 * i, answer_tokens=i) for i in (1, 3, 2)]
    total = sum(parts, Counts())
    assert total == sum(reversed(parts), Counts())
    assert (total.documents, total.tokens, total.answer_tokens, total.words, total.longest) == (3, 60, 6, 12, 30)
    assert (total.tokens_per_word, total.tokens_per_character, total.bytes_per_token) == (5, 60 / 18, 18 / 60)


def test_ratios_of_nothing():
    """Would catch a division by zero for a language without rows."""
    empty = Counts()
    for ratio in (empty.tokens_per_word, empty.tokens_per_character, empty.bytes_per_token):
        assert ratio != ratio


@pytest.mark.parametrize(("text", "words"), [("", 0), (" \n", 0), ("a  b\tc\u3000d\u2003e", 5), ("שלום עולם", 2)])
def test_words_are_what_white_space_separates(text, words):
    """Would catch words counted by single spaces only."""
    assert count_words(text) == words


def test_languages_without_word_spaces():
    """Would catch a fertility printed for Thai, or a dash for Korean; scripts in the tag win over the language."""
    without = ["zh", "zh_Hans", "zh-Hant-TW", "ja", "th", "lo", "km", "my", "bo", "yue", "ZH", "ko-Hani", "mnw"]
    assert [lang for lang in without if separates_words(lang)] == []
    having = ["ko", "vi", "en", "am", "zh-Latn", "ja-Latn-JP", "hi", "x-other", "en-x-jpan"]
    assert [lang for lang in having if not separates_words(lang)] == []


def test_inspect_counts_plain_text(texts, capsys):
    """Would catch lines lost or counted twice, tokens that are not the tokenizer's, and words of Thai."""
    languages = _inspect(capsys, "--data", texts, "--tokenizer", "byte")["splits"]["train"]["languages"]
    for lang, lines in LINES.items():
        size = [len(line.encode()) for line in lines]
        found = languages[lang]
        assert found["documents"] == len(lines) and found["bytes"] == sum(size)
        assert found["characters"] == sum(map(len, lines))
        assert found["words"] == (None if lang == "th" else sum(len(line.split()) for line in lines))
        byte = found["tokenizers"]["byte"]
        assert (byte["tokens"], byte["longest"], byte["bytes_per_token"]) == (sum(size), max(size), 1.0)
        assert (byte["tokens_per_word"] is None) == (lang == "th")
    # No ids: tokens per character, relative to the lowest.
    assert languages["en"]["tokenizers"]["byte"]["premium"] == 1
    assert languages["th"]["tokenizers"]["byte"]["premium"] == pytest.approx(3)


def test_inspect_without_a_tokenizer(texts, capsys):
    """Would catch columns of zeros where nothing was tokenised."""
    body = _inspect(capsys, "--data", texts, "--languages", "en")
    assert body["tokenizers"] == [] and list(body["splits"]["train"]["languages"]) == ["en"]
    assert main(["inspect", "--data", str(texts)]) == 0
    assert "premium" not in capsys.readouterr().out


def test_the_premium_is_taken_from_translations(parallel, capsys):
    """Would catch a premium over rows that say different things where translations are there."""
    split = _inspect(capsys, "--data", parallel, "--tokenizer", "byte")["splits"]["train"]
    assert split["premium_ids"] == 30
    one, three = ((1 + 2 * sum(1 + i % 5 for i in range(30)) * k / 30) for k in (1, 3))
    assert split["languages"]["de"]["tokenizers"]["byte"]["premium"] == 1
    assert split["languages"]["en"]["tokenizers"]["byte"]["premium"] == pytest.approx(three / one)


def test_the_output_does_not_depend_on_the_workers(parallel, capsys, monkeypatch):
    """Would catch shards that are lost, or results taken in the order in which workers end."""
    monkeypatch.setattr(survey, "SHARD_BYTES", 300)
    found = [_inspect(capsys, "--data", parallel, "--tokenizer", "byte", "--workers", n) for n in (1, 2)]
    assert found[0] == found[1]
    assert found[0]["splits"]["train"]["languages"]["de"]["documents"] == 31


def test_prepared_data_are_counted_from_the_manifest(parallel, tmp_path, capsys):
    """Would catch counts of prepared data that differ from those of their rows, tokens of the template apart."""
    from megatron_moo.data.preparing.preprocess import Request, prepare

    prepare(Request(parallel, tmp_path / "out", "byte"))
    raw = _inspect(capsys, "--data", parallel, "--tokenizer", "byte")["splits"]["train"]
    for path in (tmp_path / "out", tmp_path / "out" / "manifest.json"):
        split = _inspect(capsys, "--data", path)["splits"]["train"]
        assert split["premium_ids"] == 30
        for lang in ("de", "en"):
            ours, theirs = split["languages"][lang], raw["languages"][lang]
            for field in ("documents", "bytes", "characters", "words"):
                assert ours[field] == theirs[field]
            # One end of document for each.
            assert ours["tokenizers"]["byte"]["tokens"] == theirs["tokenizers"]["byte"]["tokens"] + 31
    assert "drop the option" in _refused(capsys, "--data", tmp_path / "out", "--tokenizer", "byte")
    assert "unknown language 'xx'" in _refused(capsys, "--data", tmp_path / "out", "--languages", "xx")


def test_tokenizers_side_by_side(parallel, tmp_path, capsys):
    """Would catch the counts of one tokenizer under the name of another."""
    model = save_sentencepiece(tmp_path / "spm.model")
    options = ("--data", parallel, "--tokenizer", "byte", f"sentencepiece:{model}")
    body = _inspect(capsys, *options)
    assert body["tokenizers"] == ["byte", "spm.model"]
    both = body["splits"]["train"]["languages"]["en"]["tokenizers"]
    alone = _inspect(capsys, "--data", parallel, "--tokenizer", f"sentencepiece:{model}")
    assert both["spm.model"] == alone["splits"]["train"]["languages"]["en"]["tokenizers"]["spm.model"]
    assert both["spm.model"]["tokens"] != both["byte"]["tokens"]
    assert main(["inspect", *map(str, options)]) == 0
    assert "spm.model" in capsys.readouterr().out


def test_bad_rows_are_counted_and_said(texts, capsys):
    """Would catch an inspection that ends at the first bad line, or hides it."""
    with open(texts / "train" / "en.txt", "ab") as stream:
        stream.write(b"\xff broken\nfive\n")
    found = _inspect(capsys, "--data", texts)["splits"]["train"]["languages"]["en"]
    assert (found["documents"], found["bad_rows"]) == (3, 1)
    assert main(["inspect", "--data", str(texts)]) == 0
    assert "bad rows left out: en 1" in capsys.readouterr().out


def test_limit_takes_the_first_rows(texts, capsys):
    """Would catch a limit over all files, or one that is ignored."""
    languages = _inspect(capsys, "--data", texts, "--limit", 1)["splits"]["train"]["languages"]
    assert {lang: found["bytes"] for lang, found in languages.items()} == {
        lang: len(lines[0].encode()) for lang, lines in LINES.items()
    }


def test_single_files_and_mixed_files(texts, parallel, tmp_path, capsys):
    """Would catch files that can be inspected only in a directory of splits."""
    file = texts / "train" / "sw.txt"
    body = _inspect(capsys, "--data", file)
    assert list(body["splits"]["train"]["languages"]) == ["sw"]
    odd = tmp_path / "wiki.txt"
    file.rename(odd)
    assert "or say --lang TAG, or --mixed" in _refused(capsys, "--data", odd)
    assert list(_inspect(capsys, "--data", odd, "--lang", "sw")["splits"][tmp_path.name]["languages"]) == ["sw"]
    mixed = tmp_path / "all.jsonl"
    mixed.write_text("".join((parallel / "train" / f"{lang}.jsonl").read_text() for lang in ("en", "de")))
    found = _inspect(capsys, "--data", mixed, "--mixed")["splits"][tmp_path.name]["languages"]
    assert {lang: held["documents"] for lang, held in found.items()} == {"de": 31, "en": 31}
    found = _inspect(capsys, "--data", mixed, "--mixed", "--languages", "de")["splits"][tmp_path.name]["languages"]
    assert list(found) == ["de"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --data or --hf-dataset"),
        (["--data", "nowhere"], "nowhere: no such file or directory"),
        (["--data", "RAW", "--tokenizer", "bytes"], "'bytes' is none of sentencepiece:PATH"),
        (["--data", "RAW", "--tokenizer", "byte:x"], "'byte:x' is none of"),
        (["--data", "RAW", "--tokenizer", "sentencepiece:nowhere"], "no such file: nowhere"),
        (["--data", "RAW", "RAW"], "give one directory, or files"),
        (["--data", "RAW", "--lang", "en"], "files are named by language"),
        (["--data", "RAW", "--languages", "xx"], "unknown language 'xx'"),
        (["--data", "RAW", "--splits", "test"], "split 'test'"),
        (["--data", "RAW/train/en.txt", "RAW/train/en.txt"], "given twice"),
        (["--data", "RAW/train/en.txt", "--splits", "test"], "--splits: unknown 'test'"),
    ],
)
def test_bad_options(texts, capsys, options, message):
    """Would catch a stack trace, or a run on something else than was asked for."""
    assert message in _refused(capsys, *(option.replace("RAW", str(texts)) for option in options))


def test_a_file_that_cannot_be_read(texts, capsys):
    """Would catch an inspection that leaves out a file without a word."""
    (texts / "train" / "sw.txt").write_bytes(b"")
    assert "sw.txt: empty file" in _refused(capsys, "--data", texts)
    (texts / "train" / "sw.txt").write_bytes(b"\xff\n")
    (texts / "train" / "en.txt").unlink()
    (texts / "train" / "th.txt").unlink()
    assert "no row can be read" in _refused(capsys, "--data", texts)
