"""Conflict between languages over a run, per block and per pair, from the "blocks" lines of metrics.jsonl.

Shape letters: T logged steps, B blocks, K objectives. Values that were not measured are NaN and left out of
every mean.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from megatron_moo.analysis.reader import Metrics

# Fields of a block that are one number or null.
SCALARS = ("conflict_share", "control_share", "control_cosine", "norm_ratio")


@dataclass
class BlockSeries:
    """The "blocks" lines as arrays, NaN where a value is absent; blocks and objectives are matched by name.

    Attributes:
        steps: [T] logged steps.
        blocks: B names, in the order of first appearance.
        objectives: K names.
        conflict, control, cosine, control_cosine, norm_ratio: [T, B]; `cosine` is the mean over pairs of
            different objectives.
        weights: [T, B, K], NaN for inactive objectives.
        pair_cosine: [K, K] mean cosine over steps and blocks.
        pair_conflict: [K, K] share of (step, block) in which the pair's cosine is below zero.
    """

    method: str
    granularity: str
    steps: np.ndarray
    blocks: list[str]
    objectives: list[str]
    conflict: np.ndarray
    control: np.ndarray
    cosine: np.ndarray
    control_cosine: np.ndarray
    norm_ratio: np.ndarray
    weights: np.ndarray
    pair_cosine: np.ndarray
    pair_conflict: np.ndarray


@dataclass
class ConflictSummary:
    """Means over the chosen steps. Shares are of products below zero; unrelated directions would give 0.5.

    Attributes:
        steps: [T] the steps that the means are over.
        conflict, control, cosine, control_cosine, norm_ratio: [B] per block, as in `BlockSeries`.
        pair_cosine, pair_conflict: [K, K], as in `BlockSeries`.
    """

    method: str
    granularity: str
    steps: np.ndarray
    blocks: list[str]
    objectives: list[str]
    conflict: np.ndarray
    control: np.ndarray
    cosine: np.ndarray
    control_cosine: np.ndarray
    norm_ratio: np.ndarray
    pair_cosine: np.ndarray
    pair_conflict: np.ndarray

    @property
    def total(self) -> tuple[float, float]:
        """(conflict share, same-language control) over all blocks; NaN for what was never measured."""
        return float(nanmean(self.conflict)), float(nanmean(self.control))


def nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is not NaN; NaN, without numpy's warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)
        return np.nanmean(values, axis=axis)


def block_series(metrics: Metrics, since: int = 0) -> BlockSeries:
    """Gathers the "blocks" lines of a run from step `since` on into arrays.

    Raises:
        ValueError: the run has logged no such line.
    """
    if not metrics.blocks:
        raise ValueError(f'{metrics.path} holds no "blocks" line: the run has not reached its first logging interval')
    lines = [line for line in metrics.blocks if line["step"] >= since]
    if not lines:
        raise ValueError(f"since={since}: the last logged step of {metrics.path} is {metrics.blocks[-1]['step']}")
    blocks = list(dict.fromkeys(block["block"] for line in lines for block in line["blocks"]))
    objectives = list(dict.fromkeys(name for line in lines for name in line["objectives"]))
    block_index = {name: j for j, name in enumerate(blocks)}
    t, b, k = len(lines), len(blocks), len(objectives)
    scalars = {name: np.full((t, b), np.nan) for name in (*SCALARS, "cosine")}
    weights = np.full((t, b, k), np.nan)
    # The pairs are summed as they come: [T, B, K, K] would not fit for a long run with many languages.
    total, measured, negative = np.zeros((3, k, k))
    for i, line in enumerate(lines):
        columns = np.array([objectives.index(name) for name in line["objectives"]])
        grid = np.ix_(columns, columns)
        for block in line["blocks"]:
            j = block_index[block["block"]]
            for name in SCALARS:
                scalars[name][i, j] = np.nan if block[name] is None else block[name]
            active = np.array(block["active"])
            weights[i, j, columns] = np.where(active, np.array(block["weights"], dtype=float), np.nan)
            pairs = np.array(block["cosine"], dtype=float)  # None becomes NaN, here as in the weights
            known = active[:, None] & active[None, :] & ~np.eye(len(active), dtype=bool) & ~np.isnan(pairs)
            total[grid] += np.where(known, pairs, 0)
            measured[grid] += known
            negative[grid] += known & (pairs < 0)
            scalars["cosine"][i, j] = pairs[known].mean() if known.any() else np.nan
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a pair that never met
        pair_cosine, pair_conflict = total / measured, negative / measured
    return BlockSeries(
        method=lines[-1]["method"],
        granularity=lines[-1]["granularity"],
        steps=np.array([line["step"] for line in lines]),
        blocks=blocks,
        objectives=objectives,
        conflict=scalars["conflict_share"],
        control=scalars["control_share"],
        cosine=scalars["cosine"],
        control_cosine=scalars["control_cosine"],
        norm_ratio=scalars["norm_ratio"],
        weights=weights,
        pair_cosine=pair_cosine,
        pair_conflict=pair_conflict,
    )


def conflict_summary(metrics: Metrics, since: int = 0) -> ConflictSummary:
    """Means of the conflict statistics over the logged steps >= `since`.

    Raises:
        ValueError: no "blocks" line was logged from step `since` on.
    """
    series = block_series(metrics, since)
    means = {
        name: nanmean(getattr(series, name), axis=0)
        for name in ("conflict", "control", "cosine", "control_cosine", "norm_ratio")
    }
    same = ("method", "granularity", "steps", "blocks", "objectives", "pair_cosine", "pair_conflict")
    return ConflictSummary(**{name: getattr(series, name) for name in same}, **means)


def cell(value: float, form: str = ".2f") -> str:
    """A number for a table, a dash where it was not measured."""
    return "-" if np.isnan(value) else format(value, form)


def conflict_table(summary: ConflictSummary, rows: int = 12) -> Table:
    """The `rows` blocks with most conflict, beside the control of the same language."""
    what = f"{summary.method}, blocks by {summary.granularity}"
    title = f"Conflict by block: {what}, steps {summary.steps[0]}-{summary.steps[-1]}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("block", "conflict share", "same language", "cosine", "same language", "|d|/|mean|"):
        table.add_column(name, justify="left" if name == "block" else "right")
    order = np.argsort(-np.nan_to_num(summary.conflict, nan=-1), kind="stable")
    columns = (summary.conflict, summary.control, summary.cosine, summary.control_cosine, summary.norm_ratio)
    for i in order[:rows]:
        table.add_row(summary.blocks[i], *(cell(values[i]) for values in columns))
    table.add_section()
    table.add_row("all blocks", *(cell(float(nanmean(values))) for values in columns))
    if len(order) > rows:
        table.caption = f"the {rows} of {len(order)} blocks with most conflict"
    return table
