"""Shares of the languages: what the blend manifest asks for, as rows of a step, and what the run will make of it.

A blend says what part of the tokens (or samples, or bytes) each language is to have; the sampler gives rows of equally
many samples. A language with long samples therefore gets fewer rows than its share of tokens. With packed sequences, a
sample is a sequence.

Legend: K languages, R rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table

from megatron_moo.data.manifest import Manifest
from megatron_moo.data.sampling.batches import Samples
from megatron_moo.data.sampling.sampler import LanguagePureSampler

_OFF = 0.05  # relative difference of a share from what was asked for, from which on the table says why


@dataclass(frozen=True)
class RowWeights:
    """Weights of the rows that follow from a blend.

    Attributes:
        first: [K] weights of the rows, from the first step on.
        later: steps from which other weights hold, and those.
    """

    first: list[float]
    later: list[tuple[int, list[float]]]


def row_weights(manifest: Manifest, split: str, samples: Sequence[Samples], batch_size: int) -> RowWeights:
    """Weights of the rows of each phase of the blend; equal ones without a blend.

    Args:
        manifest: of the languages to train on, which may be fewer than the blend's.
        split: of the samples.
        samples: [K] the languages' samples, in the order of the objectives.
        batch_size: samples of a step; phases begin with the step after theirs.
    """
    languages = manifest.objectives
    if manifest.blend is None:
        return RowWeights([1.0] * len(languages), [])
    phases: dict[int, list[float]] = {}
    for phase in manifest.blend.phases:
        sizes = _sizes(manifest, split, samples, phase.unit)
        weights = [phase.weights[k] / size for k, size in zip(languages, sizes, strict=True)]
        phases[-(-phase.from_sample // batch_size)] = weights  # of two in one step, the later one
    return RowWeights(phases.pop(0), sorted(phases.items()))


def _sizes(manifest: Manifest, split: str, samples: Sequence[Samples], unit: str) -> np.ndarray:
    """[K] mean size of what the sampler takes for a sample, in the unit of a blend."""
    if unit == "rows":
        return np.ones(len(samples))
    sizes = []
    for lang, found in zip(manifest.objectives, samples, strict=True):
        if unit == "samples":
            sizes.append(getattr(found, "samples_per_pack", 1.0))
            continue
        entry = manifest.splits[split][lang]
        sizes.append(float(found.lengths.mean()) * (entry.bytes / entry.tokens if unit == "bytes" else 1))
    return np.array(sizes)


@dataclass(frozen=True)
class RunShares:
    """What a run will see of each language.

    Attributes:
        unit: of `asked` and `given`: the first phase's; rows without a blend.
        asked, given: [K] shares over the whole run: of the blend, and as whole rows of a step keep them.
        samples: [K] that it will see.
        epochs: [K]
        total: of all languages, in the unit.
    """

    unit: str
    asked: np.ndarray
    given: np.ndarray
    samples: np.ndarray
    epochs: np.ndarray
    total: float


def run_shares(
    manifest: Manifest,
    split: str,
    samples: Sequence[Samples],
    weights: RowWeights,
    sampler: LanguagePureSampler,
    batch_size: int,
    steps: int,
) -> RunShares:
    """Shares of a run.

    Args:
        manifest, split, samples, batch_size: see row_weights.
        weights: of row_weights.
        sampler: of the run.
        steps: of the run.
    """
    unit = manifest.blend.phases[0].unit if manifest.blend else "rows"
    sizes = _sizes(manifest, split, samples, unit)
    ends = [*(phase.start for phase in sampler.phases[1:]), steps]
    spans = [max(0, min(end, steps) - phase.start) for phase, end in zip(sampler.phases, ends, strict=True)]
    seen = batch_size * sum(n * phase.source.shares for n, phase in zip(spans, sampler.phases, strict=True))
    wanted = (np.array(w) / sum(w) for w in (weights.first, *(w for _, w in weights.later)))
    asked = sum(n * w for n, w in zip(spans, wanted, strict=True))
    epochs = seen / np.array([len(found) for found in samples])
    return RunShares(unit, _parts(sizes * asked), _parts(sizes * seen), seen, epochs, float((sizes * seen).sum()))


def shares_table(
    manifest: Manifest, samples: Sequence[Samples], found: RunShares, batch_size: int, steps: int
) -> Table:
    """For people: asked for, given, samples a step, epochs, and a note where they differ."""
    table = Table(title=f"Languages of {steps} steps of {batch_size} samples", title_justify="left", box=box.SIMPLE)
    for column in ("lang", "samples", f"asked ({found.unit})", "given", "samples/step", "epochs", "note"):
        table.add_column(column, justify="left" if column in ("lang", "note") else "right")
    for k, lang in enumerate(manifest.objectives):
        table.add_row(
            lang, f"{len(samples[k])}", f"{found.asked[k]:.4f}", f"{found.given[k]:.4f}",
            f"{found.samples[k] / max(steps, 1):.2f}", f"{found.epochs[k]:.2f}",
            _note(found.epochs[k], found.asked[k], found.given[k]),
        )  # fmt: skip
    return table


def shares_remarks(manifest: Manifest, found: RunShares, sampler: LanguagePureSampler, active: int | None) -> list[str]:
    """What is not as the blend has it, and what to do."""
    remarks = []
    blend, languages = manifest.blend, manifest.objectives
    if raised := [lang for k, lang in enumerate(languages) if found.given[k] > found.asked[k] * (1 + _OFF)]:
        which = f"{', '.join(raised[:5])}{', ...' if len(raised) > 5 else ''}"
        if active is None:
            remarks.append(
                f"a step has {sampler.rows} rows (--moo-waves x slots), and each language one of them, which is more "
                f"than the share of {which}: more rows keep smaller shares, --moo-floor 0 keeps all, and leaves small "
                "languages out of steps"
            )
        else:
            remarks.append(
                f"each language has its turns and a row in them, which is more than the share of {which}: --moo-floor "
                "below 0.5, or more rows (--moo-waves x slots), keep smaller shares"
            )
    caps = [phase.parameters.get("max_epochs") for phase in blend.phases] if blend else []
    if known := [cap for cap in caps if cap is not None]:
        over = [
            f"{lang} {found.epochs[k]:.1f}" for k, lang in enumerate(languages) if found.epochs[k] > max(known) * 1.01
        ]
        if over:
            remarks.append(f"more epochs than the blend's cap of {max(known):g}: {', '.join(over)}")
    if blend and blend.budget and abs(found.total / blend.budget - 1) > _OFF:
        remarks.append(f"the blend was made for {blend.budget:,} {found.unit}; this run sees {found.total:,.0f}")
    return remarks


def _parts(amounts: np.ndarray) -> np.ndarray:
    return amounts / amounts.sum() if amounts.any() else amounts


def _note(epochs: float, asked: float, given: float) -> str:
    notes = []
    if epochs > 1:
        notes.append("repeats")
    if given > asked * (1 + _OFF):
        notes.append("raised to a row a step")
    elif given < asked * (1 - _OFF):
        notes.append("lowered for others")
    return "; ".join(notes)
