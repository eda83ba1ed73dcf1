"""`tools/blend.py check` on small corpora with planted faults, each of which must be found, and nothing else."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_moo.data.checking import survey
from megatron_moo.data.checking.check import KINDS
from megatron_moo.data.checking.duplicates import Pair, Signer, exact_pairs, near_pairs
from megatron_moo.data.checking.identify import LanguageJudge, labels_of
from tools.blend import main

# One sentence in several scripts. `{n}` makes different rows of it, which are near duplicates of each other.
SENTENCES = {
    "ar": "يفتح السوق في المدينة القديمة في الصباح الباكر وحصل الزائر رقم {n} على هدية صغيرة",
    "el": "Η αγορά στην παλιά πόλη ανοίγει νωρίς το πρωί και ο επισκέπτης με αριθμό {n} πήρε ένα μικρό δώρο",
    "en": "The market in the old town opens early in the morning and visitor number {n} received a small gift",
    "hi": "पुराने शहर का बाज़ार सुबह जल्दी खुलता है और आगंतुक संख्या {n} को एक छोटा उपहार मिला",
    "ja": "旧市街の市場は朝早く開き、{n}番目の訪問者は小さな贈り物を受け取りました。",
    "pt_BR": "O mercado da cidade velha abre cedo pela manhã e o visitante número {n} recebeu um pequeno presente",
    "ru": "Рынок в старом городе открывается рано утром и посетитель номер {n} получил небольшой подарок",
    "sw": "Soko la mji wa kale linafunguliwa mapema asubuhi na mgeni namba {n} alipewa zawadi ndogo",
    "th": "ตลาดในเมืองเก่าเปิดแต่เช้าตรู่และผู้เยี่ยมชมคนที่ {n} ได้รับของขวัญชิ้นเล็กๆ",
    "zh-Hant": "老城區的市場很早就開門了，第{n}位訪客收到了一份小禮物，大家都很高興。",
}
SPLITS = {"train": 8, "test": 4}


def _text(lang: str, n: int) -> str:
    return SENTENCES[lang].format(n=n)


def _file(data: Path, split: str, lang: str) -> Path:
    return data / split / f"{lang}.jsonl"


def _row(text: str, **fields: object) -> bytes:
    return json.dumps({"text": text, **fields}, ensure_ascii=False).encode() + b"\n"


def _append(path: Path, *lines: bytes) -> list[str]:
    """Append lines; returns their places."""
    count = path.read_bytes().count(b"\n")
    with open(path, "ab") as stream:
        stream.write(b"".join(lines))
    return [f"{path}:{count + 1 + index}" for index in range(len(lines))]


@pytest.fixture
def clean(tmp_path):
    """Ten languages in a train and a test split, with nothing wrong."""
    data = tmp_path / "raw"
    start = 1
    for split, count in SPLITS.items():
        (data / split).mkdir(parents=True)
        for lang in SENTENCES:
            _file(data, split, lang).write_bytes(b"".join(_row(_text(lang, n)) for n in range(start, start + count)))
        start += count
    return data


def _check(data: Path, *options: object, code: int = 0) -> list[dict]:
    """Findings of a check with this exit code, as the report has them."""
    report = data.parent / "findings.jsonl"
    given = list(map(str, options))
    assert main(["check", "--data", str(data), "--report", str(report), *given]) == code
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


def _places(findings: list[dict]) -> dict[str, list[str]]:
    """Where findings are, by kind."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        found.setdefault(finding["kind"], []).append(finding["where"])
    return found


def _refused(capsys, *options: object) -> str:
    assert main(["check", *map(str, options)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and not out
    return err


def test_nothing_is_found_in_a_clean_corpus(clean, capsys):
    """Would catch false alarms, in any of ten scripts."""
    assert _check(clean, "--max-chars", 1000) == []
    assert "nothing found" in capsys.readouterr().out


def test_duplicates_within_across_languages_and_splits(clean, capsys):
    """Would catch a duplicate that is missed or counted twice, or leakage that is reported as something milder."""
    (twice, thrice) = _append(_file(clean, "train", "sw"), _row(_text("sw", 3)), _row("  " + _text("sw", 3) + " \n"))
    (across,) = _append(_file(clean, "train", "sw"), _row(_text("en", 1)))
    (leak,) = _append(_file(clean, "test", "ru"), _row(_text("ru", 2)))
    (foreign,) = _append(_file(clean, "test", "ru"), _row(_text("sw", 3)))
    findings = _check(clean, "--langid", "none", code=1)
    assert _places(findings) == {
        "leakage": [leak, foreign], "duplicate": [twice, thrice], "cross-language": [across]
    }  # fmt: skip
    assert [finding["kind"] for finding in findings[:2]] == ["leakage"] * 2
    first = f"{_file(clean, 'train', 'sw')}:3"
    assert [finding["other"] for finding in findings] == [
        f"{_file(clean, 'train', 'ru')}:2", first, first, first, f"{_file(clean, 'train', 'en')}:1"
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert out.index("leakage: ") < out.index("duplicate: ") < out.index("cross-language: ")
    assert f"leakage: {leak}" in out


def test_normalization(clean):
    """Would catch composed and decomposed letters, or spaces, that make two texts of one."""
    composed, decomposed = "Caf\u00e9 na asubuhi, rafiki  yangu", "Cafe\u0301 na asubuhi,\trafiki yangu"
    _append(_file(clean, "train", "sw"), _row(composed), _row(decomposed))
    assert list(_places(_check(clean, "--langid", "none"))) == ["duplicate"]
    assert _check(clean, "--langid", "none", "--normalize", "none") == []


def test_prompts_can_be_compared_alone(tmp_path):
    """Would catch a held-out prompt that is trained on with another answer, or turns that run into each other."""
    data = tmp_path / "raw"
    rows = {"train": [("two and two", "4"), ("ab", "c")], "test": [("two and two", "four"), ("a", "bc")]}
    for split, pairs in rows.items():
        _file(data, split, "en").parent.mkdir(parents=True)
        lines = [json.dumps({"prompt": p, "completion": c}).encode() + b"\n" for p, c in pairs]
        _file(data, split, "en").write_bytes(b"".join(lines))
    findings = _check(data, "--langid", "none", "--compare", "prompt", code=1)
    assert _places(findings) == {"leakage": [f"{_file(data, 'test', 'en')}:1"]}


def _messages(*turns: str) -> bytes:
    """A row of messages; a turn is `u`, `a` or `s`, and its content."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    row = {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}
    return json.dumps(row).encode() + b"\n"


def test_held_out_prompts_are_looked_for_in_train_conversations(tmp_path, monkeypatch):
    """Would catch a clean bill for a prompt that was trained on with another answer, another system turn or in a longer
    conversation; or one prompt reported twice, or a held-out conversation that begins with a trained one."""
    data = tmp_path / "raw"
    train = [
        _messages("u one", "a 1"), _messages("u begin", "a 1", "u next", "a 2", "u last", "a 3"),
        _messages("s short", "u sum", "a 6"), _messages("u same", "a 9"), _messages("u said", "a one", "u ab", "a c"),
    ]  # fmt: skip
    held = {
        "other answer": _messages("u one", "a uno"),
        "longer": _messages("u begin", "a 1", "u next", "a 2"),
        "system": _messages("s long", "u sum", "a six"),
        "equal": _messages("u same", "a 9"),
        "goes on": _messages("u one", "a 1", "u new", "a 2"),
        "other turns": _messages("u saidone", "a ab", "u c", "a d"),
        "answer asked": _messages("u 1", "a 2"),
    }
    for split, rows in {"train": train, "test": held.values()}.items():
        _file(data, split, "en").parent.mkdir(parents=True)
        _file(data, split, "en").write_bytes(b"".join(rows))
    place = {name: f"{_file(data, 'test', 'en')}:{number}" for number, name in enumerate(held, start=1)}
    findings = _check(data, "--langid", "none", code=1)
    leaks = ["other answer", "longer", "system"]
    assert _places(findings) == {"leakage": [place["equal"]], "prompt-leakage": [place[name] for name in leaks]}
    assert [finding["other"].rpartition(":")[2] for finding in findings[1:]] == ["1", "2", "3"]
    monkeypatch.setattr(survey, "SHARD_BYTES", 100)  # rows begin anew in each part
    assert _check(data, "--langid", "none", "--workers", 2, code=1) == findings
    assert _check(data, "--langid", "none", "--splits", "test") == []


def test_near_duplicates(clean):
    """Would catch near duplicates that are missed, unlike texts taken for them, or exact ones counted again."""
    near = _check(clean, "--langid", "none", "--near", 0.6)
    counts = {kind: len(places) for kind, places in _places(near).items()}
    # Every row differs from the others of its language in a number only.
    expected = {"near-leakage": 4 * 10, "near-duplicate": (8 - 1 + 4 - 1) * 10}
    assert counts == expected
    _append(_file(clean, "test", "sw"), _row(_text("sw", 1)))
    again = _places(_check(clean, "--langid", "none", "--near", 0.6, code=1))
    assert len(again.pop("leakage")) == 1
    # The new row is no near leak besides, but nearly its neighbours.
    expected["near-duplicate"] += 1
    assert {kind: len(places) for kind, places in again.items()} == expected
    for finding in near:
        assert finding["lang"] == finding["other_lang"] and 0.6 <= finding["similarity"] <= 1


def test_equal_rows_of_several_splits_are_all_near_leaks(clean):
    """Would catch a split or a language that looks clean because an equal row elsewhere stands for its row."""
    other = clean / "valid"
    other.mkdir()
    rows = [_row("prefix " + _text("en", 1))]
    places = [*_append(_file(clean, "test", "en"), *rows), *_append(_file(clean, "test", "sw"), *rows)]
    (other / "en.jsonl").write_bytes(rows[0])
    found = _places(_check(clean, "--langid", "none", "--near", 0.8))
    assert {*places, f"{other / 'en.jsonl'}:1"} <= set(found["near-leakage"])


def test_near_similarity_estimates_jaccard():
    """Would catch signatures that do not estimate the similarity of n-gram sets, in scripts with and without spaces."""
    sign = Signer()
    for lang, size, text in (
        ("en", 5, "abcdefghijklmnopqrstuvwxyz" * 3),
        ("ja", 3, "いろはにほへとちりぬるをわかよたれそつねならむ"),
    ):
        other = text[:-6] + "zzzzzz"

        def grams(text: str, size: int = size) -> set[str]:
            return {text[start : start + size] for start in range(len(text) - size + 1)}

        jaccard = len(grams(text) & grams(other)) / len(grams(text) | grams(other))
        assert (sign(text, lang) == sign(other, lang)).mean() == pytest.approx(jaccard, abs=0.15)
        assert (sign(text, lang) == sign(text.upper(), lang)).all()


def test_exact_pairs_equal_the_definition():
    """Would catch a mistake in the sorted search: compared with the definition, pair by pair, on random rows."""
    rng = np.random.default_rng(1)
    splits = [0, 0, 1, 1, 2]
    for _ in range(50):
        hashes = rng.integers(0, 12, 30).astype(np.uint64)
        cells = np.sort(rng.integers(0, 5, 30)).astype(np.uint16)  # the train split 0 comes first
        expected = []
        for row in range(30):
            same = [other for other in range(row) if hashes[other] == hashes[row]]
            in_cell = [other for other in same if cells[other] == cells[row]]
            in_split = [other for other in same if splits[cells[other]] == splits[cells[row]]]
            if same and splits[cells[same[0]]] == 0 != splits[cells[row]]:
                expected.append(Pair("leakage", row, same[0]))
            if in_cell:
                expected.append(Pair("duplicate", row, in_cell[0]))
            elif in_split:
                expected.append(Pair("cross-language", row, in_split[0]))
        assert sorted(exact_pairs(hashes, cells, splits, 0), key=lambda p: p.row) == expected
    assert all(pair.kind != "leakage" for pair in exact_pairs(hashes, cells, splits, None))


def test_boilerplate_stays_linear():
    """Would catch a comparison of all pairs where thousands of rows are alike; every row is still found once."""
    signatures = np.ones((2000, 128), dtype=np.uint32)
    cells = np.zeros(2000, dtype=np.uint16)
    pairs = list(near_pairs(signatures, cells, [0], 0, 0.8))
    assert [(pair.kind, pair.row, pair.other) for pair in pairs] == [("duplicate", row, 0) for row in range(1, 2000)]


def test_wrong_languages(clean, capsys):
    """Would catch misplaced texts that are missed, or a count that is not that of the judged rows."""
    (first,) = _append(_file(clean, "train", "sw"), _row(_text("en", 90)))
    (second,) = _append(_file(clean, "train", "hi"), _row(_text("ru", 90)))
    (third,) = _append(_file(clean, "test", "zh-Hant"), _row(_text("th", 90)))
    _append(_file(clean, "train", "en"), _row("42 = 42"))
    findings = _check(clean, "--json", clean.parent / "counts.json")
    assert {finding["where"]: finding["found"] for finding in findings} == {first: "en", second: "ru", third: "th"}
    assert all(finding["kind"] == "language" and finding["confidence"] > 0.5 for finding in findings)
    languages = json.loads((clean.parent / "counts.json").read_text())["languages"]
    assert languages["sw"] == {"rows": 13, "short": 0, "disagree": 1, "others": {"en": 1}}
    assert languages["en"] == {"rows": 13, "short": 1, "disagree": 0, "others": {}}
    assert "looks like ru" in capsys.readouterr().out
    assert main(["check", "--data", str(clean / "train" / "sw.jsonl"), "--fail-on", "language"]) == 1


def test_the_answer_alone_can_be_judged(tmp_path):
    """Would catch an English instruction that makes an answer in another language look wrong, or right."""
    data = tmp_path / "raw"
    _file(data, "train", "sw").parent.mkdir(parents=True)
    prompt = "Please translate the following sentence into Swahili, and do not add anything else to your answer: "
    rows = [(prompt + _text("en", 1), _text("sw", 1)), (_text("sw", 2), _text("en", 2))]
    lines = [json.dumps({"prompt": p, "completion": c}).encode() + b"\n" for p, c in rows]
    _file(data, "train", "sw").write_bytes(b"".join(lines))
    assert _places(_check(data, "--identify", "answer")) == {"language": [f"{_file(data, 'train', 'sw')}:2"]}


def test_languages_that_the_identifier_does_not_know(clean, capsys):
    """Would catch rows of an unknown language that count as wrong."""
    _file(clean, "train", "tlh").write_bytes(
        _row("tlhIngan maH, Qapla', batlh Daqawlu'taH, yIDoghQo', Heghlu'meH QaQ jajvam")
    )
    assert _check(clean) == []
    assert "py3langid does not know them: tlh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tag", "labels"),
    [
        ("pt_BR", {"pt"}), ("zh-Hant", {"zh"}), ("zh_Hans_CN", {"zh"}), ("cmn", {"zh"}), ("no", {"no"}), ("nn", {"nn"}),
        ("nb", {"no"}), ("iw", {"he"}), ("fil", {"tl"}), ("swh", {"sw"}), ("arz", {"arz", "ar"}), ("id", {"id"}),
        ("prs", {"fa"}), ("tlh", set()), ("x-other", set()), ("yue", {"yue", "zh"}),
    ],
)  # fmt: skip
def test_tags_are_mapped_to_labels(tag, labels):
    """Would catch a correct text that disagrees because tag and identifier name its language differently."""
    known = ("ar", "arz", "en", "fa", "he", "id", "ms", "nn", "no", "pt", "sw", "tl", "yue", "zh")
    assert set(labels_of(tag, known)) == labels
    assert set(labels_of("no", ["en", "nb", "nn"])) == {"nb", "nn"}


def test_kin_at_hand_is_told_apart():
    """Would catch Nynorsk in a Bokmål file that agrees because both are Norwegian."""
    judge = LanguageJudge(languages=["nb", "nn"])
    nynorsk = (
        "Eg veit ikkje kva dei seier, men me skal koma heim att når dei ikkje er redde, og då ser me korleis det går."
    )
    assert judge(nynorsk, "nn").agrees
    assert not judge(nynorsk, "nb").agrees


def test_lingua(clean):
    """Would catch an identifier that can be chosen but not used."""
    pytest.importorskip("lingua")
    for path in clean.glob("*/*"):
        if path.stem not in ("sw", "ru", "en", "pt_BR"):
            path.unlink()
    (planted,) = _append(_file(clean, "train", "sw"), _row(_text("ru", 90)))
    findings = _check(clean, "--langid", "lingua", "--alternatives", "de")
    assert [(finding["where"], finding["found"]) for finding in findings] == [(planted, "ru")]


def test_bad_lines_and_files(clean):
    """Would catch a fault that is not found, has no line, or hides those after it."""
    train = _file(clean, "train", "en")
    lines = {
        "unreadable": [b"{\n", b'{"text": "\xff"}\n', b"[1]\n", b'{"text": 3}\n', b'{"other": "x"}\n'],
        "empty": [b'{"text": " "}\n', b'{"prompt": "x", "completion": ""}\n', b'{"messages": []}\n'],
    }
    expected = {kind: _append(train, *found) for kind, found in lines.items()}
    expected["long"] = _append(train, _row("x" * 200))
    _append(train, _row(_text("en", 99)))
    truncated = _file(clean, "test", "el").with_suffix(".jsonl.gz")
    truncated.write_bytes(gzip.compress(_file(clean, "test", "el").read_bytes())[:-20])
    _file(clean, "test", "el").unlink()
    findings = _check(clean, "--max-chars", 150, "--langid", "none", code=1)
    found = _places(findings)
    assert [where.partition(":")[0] for where in found["unreadable"]][0] == str(truncated)
    found["unreadable"].pop(0)
    assert found == expected
    assert "truncated gz" in findings[0]["message"]
    messages = [finding["message"] for finding in findings]
    assert any("not UTF-8" in message for message in messages) and "200 characters, over 150" in messages
    _check(clean, "--max-chars", 150, "--fail-on", "long", "--langid", "none", code=1)
    _check(clean, "--max-chars", 150, "--fail-on", "none", "--langid", "none", code=0)


def test_compressed_files_and_tables(clean):
    """Would catch places that are not those of the file: lines of a compressed one, rows of a table."""
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    packed, table = _file(clean, "train", "sw"), _file(clean, "test", "ru")
    packed.with_suffix(".jsonl.gz").write_bytes(gzip.compress(packed.read_bytes() + _row(_text("sw", 2))))
    rows = [json.loads(line) for line in table.read_bytes().splitlines()] + [{"text": _text("ru", 3)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table.with_suffix(".parquet"), row_group_size=2)
    packed.unlink()
    table.unlink()
    findings = _check(clean, "--langid", "none", code=1)
    assert [(finding["kind"], finding["where"], finding["other"]) for finding in findings] == [
        ("leakage", f"{table.with_suffix('.parquet')}:5", f"{_file(clean, 'train', 'ru')}:3"),
        ("duplicate", f"{packed.with_suffix('.jsonl.gz')}:9", f"{packed.with_suffix('.jsonl.gz')}:2"),
    ]


def test_tokens_are_those_of_training(clean):
    """Would catch a length that is not the one training will see: the end of document is a token."""
    size = len(_text("th", 1).encode())
    options = ("--langid", "none", "--tokenizer", "byte", "--max-tokens")
    longest = max(len(_text(lang, 12).encode()) for lang in SENTENCES)
    assert _check(clean, *options, longest + 1) == []
    findings = _check(clean, "--languages", "th", *options, size)
    assert len(findings) == 12 and findings[0]["tokens"] == size + 1


def test_mixed_files_and_bad_tags(clean, tmp_path):
    """Would catch languages mixed up within a file, or tags that only preprocessing refuses."""
    data = tmp_path / "mixed"
    (data / "train").mkdir(parents=True)
    rows = [_row(_text(lang, n), lang=lang) for n in range(3) for lang in ("ru", "sw", "en")]
    rows += [_row(_text("ru", 1), lang="sw"), _row(_text("el", 1), lang="not a tag"), _row(_text("el", 2), lang="RU")]
    (data / "train" / "all.jsonl").write_bytes(b"".join(rows))
    file = data / "train" / "all.jsonl"
    found = _places(_check(data, "--mixed", "--langid", "none", code=1))
    assert found == {"cross-language": [f"{file}:10"], "unreadable": [f"{file}:11", f"{file}:12"]}
    found = _places(_check(data, "--mixed", code=1))  # the identifier meets the bad tags
    assert found["unreadable"] == [f"{file}:11", f"{file}:12"] and f"{file}:10" in found["language"]
    _append(file, _row("", lang="el"))  # what preprocessing of the chosen languages passes over
    found = _places(_check(data, "--mixed", "--languages", "ru", "sw", "en"))
    assert found == {"cross-language": [f"{file}:10"], "language": [f"{file}:10"]}


def test_the_report_does_not_depend_on_the_workers(clean, monkeypatch):
    """Would catch findings in the order in which workers end, or row numbers that start anew in each shard."""
    _append(_file(clean, "train", "sw"), _row(_text("en", 1)), _row(_text("sw", 1)), b"{\n")
    _append(_file(clean, "test", "sw"), _row(_text("sw", 1)))
    options = ("--near", 0.7)
    whole = _check(clean, *options, "--workers", 1, code=1)
    monkeypatch.setattr(survey, "SHARD_BYTES", 300)
    monkeypatch.setattr(survey, "BATCH_ROWS", 2)
    for workers in (1, 3):
        assert _check(clean, *options, "--workers", workers, code=1) == whole


def test_without_a_train_split_leakage_is_not_claimed(clean, capsys):
    """Would catch a clean bill where nothing could be compared."""
    _append(_file(clean, "test", "sw"), _row(_text("sw", 1)))
    assert _check(clean, "--splits", "test", "--langid", "none") == []
    assert "leakage from it was not looked for" in capsys.readouterr().out
    files = [_file(clean, "test", "sw"), _file(clean, "train", "sw")]
    assert main(["check", "--data", *map(str, files), "--langid", "none"]) == 1


def test_a_killed_worker_is_no_finding(clean, capsys, monkeypatch):
    """Would catch a good file called unreadable, or the rest of the data passed over, because memory ran out."""
    from megatron_moo.data.checking import check as module

    examine, files = module.examine, [_file(clean, "train", "en"), _file(clean, "test", "ru")]

    def dies(part, *arguments):
        return os.kill(os.getpid(), signal.SIGKILL) if part.source.path in files else examine(part, *arguments)

    monkeypatch.setattr(module, "examine", dies)
    message = _refused(capsys, "--data", clean, "--langid", "none", "--workers", "2")
    assert "signal 9 (SIGKILL); if memory ran out, use fewer --workers" in message


def test_findings_do_not_steer_the_terminal(clean, capsys):
    """Would catch escape sequences, brackets or signs of the data that change what the terminal shows."""
    text = "[/b] [red] :smile: \x1b[31m \x9b31m \x7f \u202e " + _text("en", 1)
    _append(_file(clean, "train", "sw"), _row(text), _row(text))
    (clean / "[INST]").mkdir()
    _file(clean, "[INST]", "en").write_bytes(_row("[/INST]"))
    _check(clean)
    out = capsys.readouterr().out
    assert not set("\x1b\x9b\x7f\u202e") & set(out)
    assert "looks like" in out and "[/b] [red] :smile: ␛[31m \\x9b31m ␡ \\u202e" in out
    assert "[INST]" in out


def test_letters_that_the_terminal_lacks_are_escaped(clean):
    """Would catch a traceback where the terminal's encoding lacks a letter of a finding."""
    command = [sys.executable, "tools/blend.py", "check", "--data", str(clean), "--langid", "none"]
    root = Path(__file__).parents[3]
    _append(_file(clean, "train", "en"), json.dumps({"text": "x", "lang": "中"}, ensure_ascii=False).encode() + b"\n")
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 1 and b"unknown language '\\u4e2d'" in done.stdout and not done.stderr


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_an_output_in_the_way_is_said_first(clean, tmp_path, capsys, option):
    """Would catch work that is lost because a directory is in the way, or a temporary name in the error."""
    (tmp_path / "file").write_text("")
    assert f"{option} {clean}: a directory; name a file" in _refused(capsys, "--data", clean, option, clean)
    assert "is a file, not a directory" in _refused(capsys, "--data", clean, option, tmp_path / "file" / "x.json")


def test_a_report_appears_whole_or_not_at_all(clean, tmp_path, monkeypatch):
    """Would catch a half-written report that looks complete, and a temporary file that stays."""
    from tools import _blend_check

    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "findings")

    monkeypatch.setattr(_blend_check, "check", fails)
    report = tmp_path / "out" / "findings.jsonl"
    assert main(["check", "--data", str(clean), "--langid", "none", "--report", str(report)]) == 2
    assert list(report.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--near", "0"], "--near must be above 0, at most 1, got 0"),
        (["--near", "80"], "--near must be above 0"),
        (["--min-confidence", "2"], "--min-confidence must be from 0 to 1"),
        (["--min-letters", "0"], "--min-letters must be at least 1"),
        (["--max-chars", "0"], "--max-chars must be at least 1"),
        (["--max-tokens", "10"], "--max-tokens needs --tokenizer"),
        (["--tokenizer", "byte"], "--tokenizer needs --max-tokens"),
        (["--examples", "-1"], "--examples must be at least 0"),
        (["--languages", "xx"], "unknown language 'xx'"),
        (["--splits", "dev"], "split 'dev'"),
    ],
)
def test_bad_options(clean, capsys, options, message):
    """Would catch a check of something else than was asked for."""
    assert message in _refused(capsys, "--data", clean, *options)


def test_prepared_data_are_refused(tmp_path, capsys):
    """Would catch a check of token files as if they were text."""
    (tmp_path / "manifest.json").write_text("{}")
    assert "check the raw data" in _refused(capsys, "--data", tmp_path)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("xxhash", ["--langid", "none"], "needs xxhash: pip install 'megatron-moo[data]'"),
        ("datasketch", ["--near"], "--near needs datasketch: pip install 'megatron-moo[data]'"),
        ("py3langid.langid", [], "py3langid: it is not installed: pip install 'megatron-moo[data]'; or --langid none"),
        ("lingua", ["--langid", "lingua"], "lingua: it is not installed: pip install 'megatron-moo[lingua]'"),
    ],
)
def test_a_missing_library_is_named(clean, capsys, monkeypatch, module, options, message):
    """Would catch a stack trace, or a finding about every file, where a library is not installed."""
    monkeypatch.setitem(sys.modules, module, None)
    assert message in _refused(capsys, "--data", clean, *options)


def test_every_kind_is_explained(capsys):
    """Would catch a kind that --help does not tell of."""
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    assert all(kind in text and meaning in text for kind, meaning in KINDS.items())
