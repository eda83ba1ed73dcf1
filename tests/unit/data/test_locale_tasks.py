"""The offline example's generator."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="needs the extra `example`")
pytest.importorskip("icu4py", reason="needs the extra `example`")
pytest.importorskip("num2words", reason="needs the extra `example`")

from examples.locale_tasks import generate  # noqa: E402
from examples.locale_tasks.generate import Options, build  # noqa: E402
from examples.locale_tasks.tasks import _DROPPED, TASKS, Tables  # noqa: E402
from megatron_moo.data.reading.rows import read_eval_rows  # noqa: E402

SMALL = Options(
    languages=("en", "es", "de"), unseen=("da", "th"),
    tasks=("number_words", "short_date", "month", "territory"), max_per_task=400, eval_per_task=30,
)  # fmt: skip
ARGUMENTS = (
    "--languages en es de --unseen da th --tasks number_words short_date month territory "
    "--max-per-task 400 --eval-per-task 30"
).split()


@pytest.fixture(scope="module")
def corpus():
    """A small corpus, generated after Japanese was looked at."""
    Tables("ja")
    return build(SMALL)


def test_known_answers():
    """Would catch a swapped day and month, separators of the wrong language, or a wrong name."""
    expected = {
        ("en", "short_date", "3/6/26"): "2026-03-06",
        ("es", "short_date", "3/6/26"): "2026-06-03",
        ("en", "decimal", "1,234"): "1234",
        ("de", "decimal", "1,234"): "1.234",
        ("de", "number_words", "siebenhundertzweiundvierzig"): "742",
        ("es", "full_date", "viernes, 6 de marzo de 2026"): "2026-03-06",
        ("de", "number_sum", "drei + vier"): "7",
        ("de", "number_next", "neunzehn"): "zwanzig",
        ("en", "weekday", "Monday + 3"): "Thursday",
        ("es", "month", "noviembre + 2"): "enero",
        ("de", "territory", "Österreich"): "AT",
        ("en", "currency", "Swiss Franc"): "CHF",
        ("es", "language", "alemán"): "de",
        ("de", "digits_to_words", "21"): "einundzwanzig",
    }
    tables = {lang: Tables(lang) for lang in ("en", "es", "de")}
    made = {task: {lang: {c: a for _, c, a in TASKS[task].examples(t)} for lang, t in tables.items()}
            for task in {key[1] for key in expected}}  # fmt: skip
    for (lang, task, content), answer in expected.items():
        assert made[task][lang][content] == answer
    # num2words says "fyrtio" where ICU says "förtio" or the reverse: neither is kept
    assert 40 not in Tables("sv").words and 39 in Tables("sv").words


def test_no_test_prompt_is_trained_on(corpus):
    """Would catch leakage, also through another language with the same prompt."""
    train = {row["prompt"] for (split, _), rows in corpus.rows.items() if split == "train" for row in rows}
    others = [row["prompt"] for (split, _), rows in corpus.rows.items() if split != "train" for row in rows]
    assert others and not train & set(others)


def test_splits_languages_and_rows(corpus):
    """Would catch a missing language or task, rows over the cap, doubled prompts, or invisible characters."""
    assert set(corpus.rows) == {
        *(("train", k) for k in SMALL.languages), *(("test", k) for k in SMALL.languages), ("near", "da"),
        ("far", "th"),
    }  # fmt: skip
    for (split, lang), rows in corpus.rows.items():
        assert {row["task"] for row in rows} == set(SMALL.tasks)
        assert len({row["prompt"] for row in rows}) == len(rows)
        for task in SMALL.tasks:
            assert 0 < sum(row["task"] == task for row in rows) <= (400 if split == "train" else 30)
        for row in rows:
            assert row["lang"] == lang and set(row) == {"prompt", "completion", "lang", "task", "id"}
            for text in (row["prompt"], row["completion"]):
                assert unicodedata.is_normalized("NFC", text) and not _DROPPED & set(text)


def test_languages_conflict_without_a_tag(corpus):
    """Would catch an example that has nothing to resolve."""
    assert corpus.ceilings["short_date"] < 1 and corpus.ceilings["number_words"] == 1
    answers: dict[str, set[str]] = {}
    for lang in SMALL.languages:
        for row in corpus.rows["train", lang]:
            answers.setdefault(row["prompt"], set()).add(row["completion"])
    assert sum(len(a) > 1 for a in answers.values()) > 10


def test_tags():
    """Would catch a tag that names another language, or a tagged prompt among the untagged ones."""
    tasks = ("month", "territory_name")
    for mode in ("tagged", "both"):
        made = build(Options(("en", "de"), ("da",), tasks if mode == "tagged" else (), mode, 100, 10))
        for (split, lang), rows in made.rows.items():
            tagged = [row["prompt"].startswith(f"[{lang}] ") for row in rows]
            assert len(re.findall(r"\[..\]", " ".join(row["prompt"] for row in rows))) == sum(tagged)
            if mode == "tagged" or split.endswith("-tagged"):
                assert all(tagged)
            elif split == "train":
                assert 0.3 < sum(tagged) / len(tagged) < 0.8
            else:
                assert not any(tagged) and not any(TASKS[row["task"]].needs_tag for row in rows)


def test_the_command_gives_the_same_bytes_in_another_process(corpus, tmp_path, capsys):
    """Would catch rows that depend on hash seeds, the time zone, or languages seen before (see Tables)."""
    generate.write(corpus, SMALL, tmp_path / "here")
    script = Path(generate.__file__)
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati"}
    done = subprocess.run([sys.executable, script, "--out", tmp_path / "there", *ARGUMENTS], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "short date" in done.stdout and "ceiling" in done.stdout
    files = sorted(p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*") if p.is_file())
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    for name in json.loads((tmp_path / "here" / generate.MARKER).read_text())["files"]:
        assert read_eval_rows(tmp_path / "here" / name)
    assert generate.main(["--out", str(tmp_path / "here"), *ARGUMENTS]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "en", "xx"], "--languages: unknown name 'xx'; known: en de"),
        (["--languages", "en", "en"], "'en' is given twice"),
        (["--tasks", "poetry"], "--tasks: unknown name 'poetry'; known: number_words"),
        (["--languages", "da", "--unseen", "da"], "'da' is also in --languages"),
        (["--max-per-task", "0"], "--max-per-task must be at least 1, got 0"),
    ],
)
def test_bad_options_write_nothing(arguments, message, tmp_path, capsys):
    """Would catch a stack trace or a half-written corpus."""
    assert generate.main(["--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(tmp_path):
    """Would catch a ModuleNotFoundError where the remedy is an extra."""
    (tmp_path / "babel.py").write_text("raise ModuleNotFoundError('No module named babel', name='babel')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, generate.__file__, "--out", tmp_path / "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "pip install 'megatron-moo[example]'" in done.stderr
    assert "Traceback" not in done.stderr
