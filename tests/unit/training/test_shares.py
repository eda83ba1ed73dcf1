"""Shares of a blend as rows of a step, and the table that a run prints."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_moo.data.manifest import Blend, Entry, Manifest, Phase, TokenizerInfo
from megatron_moo.data.sampling.sampler import LanguagePureSampler
from megatron_moo.training.shares import row_weights, run_shares, shares_remarks, shares_table

LANGUAGES = ("en", "sw", "ja")


def _manifest(*phases: Phase, budget: int | None = None, languages: tuple[str, ...] = LANGUAGES) -> Manifest:
    """Bytes per token are 4, 4 and 3."""
    entries = {
        lang: Entry(f"train/{lang}", 10, 100, 50, 20, size, size, 0, 0, "", "", None, ())
        for lang, size in zip(LANGUAGES, (400, 400, 300), strict=True)
    }
    blend = Blend(7, budget, phases) if phases else None
    return Manifest(Path(), "", TokenizerInfo("byte", "", "", 257, 256), {}, languages, {"train": entries}, blend)


def _phase(start: int, unit: str, *weights: float) -> Phase:
    return Phase(start, "manual", {}, unit, dict(zip(LANGUAGES, weights, strict=True)))


def _samples(*lengths: float, count: int = 100, per_pack: float | None = None) -> list:
    made = []
    for length in lengths:
        lengths_n = np.full(count, length)
        sample = type("Fake", (), {"__len__": lambda self: len(self.lengths)})()
        sample.lengths = lengths_n
        if per_pack is not None:
            sample.samples_per_pack = per_pack
        made.append(sample)
    return made


def _normalised(weights) -> list[float]:
    return list(np.array(weights) / sum(weights))


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("samples", [1 / 2, 1 / 4, 1 / 4]), ("tokens", [4 / 9, 4 / 9, 1 / 9]), ("bytes", [3 / 7, 3 / 7, 1 / 7])],
)
def test_rows_follow_the_size_of_samples(unit, expected):
    """Would catch shares of tokens taken for shares of samples: a language of long texts would get too much."""
    manifest, samples = _manifest(_phase(0, unit, 0.5, 0.25, 0.25)), _samples(10, 5, 20)
    plan = row_weights(manifest, "train", samples, 8)
    assert _normalised(plan.first) == pytest.approx(expected) and plan.later == []
    rows = np.array(_normalised(plan.first))
    size = {"samples": np.ones(3), "tokens": np.array([10, 5, 20]), "bytes": np.array([40, 20, 60])}[unit]
    assert rows * size / (rows * size).sum() == pytest.approx([0.5, 0.25, 0.25])


def test_without_a_blend_all_rows_are_alike():
    """Would catch prepared data without a blend that follow the size of the corpora."""
    assert row_weights(_manifest(), "train", _samples(10, 5, 20), 8).first == [1, 1, 1]


def test_shares_of_samples_count_the_samples_of_a_pack():
    """Would catch packs taken for samples where a language's packs hold more of them."""
    manifest = _manifest(_phase(0, "samples", 0.5, 0.25, 0.25))
    samples = [*_samples(60, per_pack=6), *_samples(60, 60, per_pack=3)]
    assert _normalised(row_weights(manifest, "train", samples, 8).first) == pytest.approx([1 / 3] * 3)


def test_phases_begin_with_the_step_after_their_samples():
    """Would catch a phase that begins before its samples were seen, or two in one step."""
    phases = [_phase(start, "samples", *weights) for start, weights in
              ((0, (0.6, 0.2, 0.2)), (16, (0.2, 0.6, 0.2)), (17, (0.2, 0.2, 0.6)), (24, (0.4, 0.4, 0.2)))]  # fmt: skip
    plan = row_weights(_manifest(*phases), "train", _samples(10, 10, 10), 8)
    assert plan.first == [0.6, 0.2, 0.2]
    assert plan.later == [(2, [0.2, 0.6, 0.2]), (3, [0.4, 0.4, 0.2])]


def test_fewer_languages_share_among_them():
    """Would catch weights that are matched by position after --moo-languages."""
    manifest = _manifest(_phase(0, "samples", 0.5, 0.3, 0.2), languages=("ja", "en"))
    assert row_weights(manifest, "train", _samples(10, 10), 8).first == [0.2, 0.5]


def _text(manifest, samples, weights, sampler, batch_size, steps) -> str:
    """Table and remarks."""
    found = run_shares(manifest, "train", samples, weights, sampler, batch_size, steps)
    console = Console(width=160, file=io.StringIO())
    console.print(shares_table(manifest, samples, found, batch_size, steps))
    return "\n".join([console.file.getvalue(), *shares_remarks(manifest, found, sampler, None)])


def test_the_table_says_what_is_given_and_why():
    """Would catch a floor or repeats that nobody is told of."""
    manifest = _manifest(_phase(0, "samples", 0.9, 0.09, 0.01), budget=100)
    samples = _samples(10, 10, 10)
    weights = row_weights(manifest, "train", samples, 8)
    sampler = LanguagePureSampler(3, 2, 2, weights.first)
    text = _text(manifest, samples, weights, sampler, 8, 50)
    english, swahili, japanese = (
        next(line for line in text.splitlines() if line.split()[:1] == [k]) for k in LANGUAGES
    )
    assert "0.9000" in english and "0.5000" in english and "lowered" in english and "repeats" in english
    assert "0.0900" in swahili and "0.2500" in swahili and "raised to a row a step" in swahili
    assert "0.0100" in japanese and "1.00" in japanese
    assert "the blend was made for 100 samples; this run sees 400" in text
    assert "a step has 4 rows" in text and "the share of sw, ja: more rows" in text and "--moo-floor 0" in text
    exact = LanguagePureSampler(3, 2, 2, weights.first, floor=0)
    assert "raised" not in _text(manifest, samples, weights, exact, 8, 50)


def test_a_cap_that_the_floor_breaks_is_said():
    """Would catch: a corpus of few samples seen many times more than the blend allows, without a word."""
    capped = Phase(0, "unimax", {"max_epochs": 4}, "samples", dict(zip(LANGUAGES, (0.49, 0.49, 0.02), strict=True)))
    manifest, samples = _manifest(capped), [*_samples(10, 10), *_samples(10, count=4)]
    weights = row_weights(manifest, "train", samples, 8)
    text = _text(manifest, samples, weights, LanguagePureSampler(3, 4, 1, weights.first), 8, 10)
    assert "more epochs than the blend's cap of 4: ja 5.0" in text


def test_the_table_adds_up_phases():
    """Would catch shares of the last phase only, or phases beyond the end of the run."""
    manifest = _manifest(*(_phase(s, "samples", *w) for s, w in
                           ((0, (0.5, 0.25, 0.25)), (80, (0.25, 0.5, 0.25)), (8000, (0.1, 0.1, 0.8)))))  # fmt: skip
    samples = _samples(10, 10, 10)
    plan = row_weights(manifest, "train", samples, 8)
    sampler = LanguagePureSampler(3, 4, 1, plan.first, later=plan.later)
    text = _text(manifest, samples, plan, sampler, 8, 40)
    cells = {
        line.split()[0]: line.split()[2:4]
        for line in text.splitlines()
        if line.split()[:1] and line.split()[0] in LANGUAGES
    }
    assert cells == {"en": ["0.3125", "0.3125"], "sw": ["0.4375", "0.4375"], "ja": ["0.2500", "0.2500"]}


def test_a_share_that_is_kept_is_not_called_raised():
    """Would catch: phases of different sizes compared by steps, or packs without a blend compared by samples."""
    manifest = _manifest(_phase(0, "tokens", 0.5, 0.25, 0.25), _phase(160, "samples", 0.05, 0.05, 0.9))
    samples = _samples(10, 100, 1000)
    plan = row_weights(manifest, "train", samples, 16)
    sampler = LanguagePureSampler(3, 1, 1, plan.first, later=plan.later)
    assert "raised" not in _text(manifest, samples, plan, sampler, 16, 2000)
    packed = [*_samples(60, per_pack=6), *_samples(60, 60, per_pack=3)]
    plan = row_weights(_manifest(), "train", packed, 9)
    text = _text(_manifest(), packed, plan, LanguagePureSampler(3, 3, 1), 9, 20)
    assert "asked (rows)" in text and text.count("0.3333") == 6 and "raised" not in text
