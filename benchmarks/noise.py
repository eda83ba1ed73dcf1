"""Noise-aware Gramians on synthetic gradients, where the truth is known: what is biased, what the gate lets through.

    python benchmarks/noise.py --out docs/figures/noise.svg --json runs/bench/noise.json

Rows of known mean and known noise, two per objective, as a step of training has them:
  squares  how far |g_k|^2 is from the mean's, plain and with `unbiased = yes`, against the predicted bias
  gate     the share of pairs whose true product is zero that stay negative, against the level asked for
  power    the share of steps in which a real conflict passes the gate
  cosines  how far the cosines that a method sees are from the true ones, under each option

Every number has the standard error of its mean over independent blocks. The figure needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _report import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_moo.aggregation import Mean, Problem, RowNoise, fold_rows
from megatron_moo.aggregation.noise_aware import NoiseAware

ROWS = 2
DIMENSIONS = 64
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # of noise in a square
LEVELS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
STEPS = (1, 10)
BLOCKS = {2: 6000, 4: 1500, 8: 400, 16: 120}  # more for few pairs: about as many pairs each
TABLE_LEVEL, TABLE_STEPS = 0.05, (1, 10, 50)
TABLE_SHARES = (0.05, 0.5, 0.95)
POWER_STEPS = (1, 20)
OPTIONS: dict[str, dict[str, float | str]] = {
    "plain": {"gate": 0.5},  # which changes nothing
    "unbiased": {"unbiased": "yes"},
    "smoothing": {"smoothing": 0.9},
    "both": {"unbiased": "yes", "smoothing": 0.9},
    "shrink": {"shrink": "yes"},
    "all three": {"unbiased": "yes", "smoothing": 0.9, "shrink": "yes"},
}
# Readable on white and on black: the figure's background is transparent.
BLUE, VERMILION, INK = "#2B83D6", "#D55E00", "#7A828B"


class Probe(Mean):
    """The mean; keeps the Gramian that a method would be given."""

    def _weights(self, problem: Problem) -> Tensor:
        self.gram_BKK = problem.gram_BKK
        return super()._weights(problem)


def draw(generator: torch.Generator, mean_KN: Tensor, share: float, blocks: int) -> tuple[Tensor, RowNoise]:
    """Gramian and noise of independent steps whose squares are noise to the given share (for means of length 1)."""
    k, n = mean_KN.shape
    objective = torch.arange(k).repeat_interleave(ROWS)
    deviation = (ROWS * share / (1 - share) / n) ** 0.5
    noise = torch.randn(blocks, k * ROWS, n, generator=generator, dtype=torch.float64)
    rows = mean_KN[objective] + deviation * noise
    return fold_rows(rows @ rows.mT, objective, torch.ones(k * ROWS), k)


def mean_and_error(values: Tensor) -> dict[str, float]:
    """Mean and its standard error, over the first axis."""
    return {"mean": values.mean().item(), "error": values.std().item() / len(values) ** 0.5}


def orthogonal(k: int) -> Tensor:
    """Means whose products are zero [K, N]."""
    return torch.eye(DIMENSIONS, dtype=torch.float64)[:k]


def squares(blocks: int) -> list[dict[str, Any]]:
    """Errors of |g_k|^2, relative to the mean's square, by the share of noise."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for share in SHARES:
        gram, noise = draw(generator, orthogonal(4), share, blocks)
        plain = gram.diagonal(dim1=1, dim2=2)
        found.append(
            {
                "noise_share": share,
                "predicted": share / (1 - share),
                "plain": mean_and_error((plain - 1).mean(1)),
                "unbiased": mean_and_error((plain - noise.bias_BK - 1).mean(1)),
            }
        )
    return found


def negative(gram_BKK: Tensor) -> dict[str, float]:
    """Share of negative products among pairs."""
    off = ~torch.eye(gram_BKK.shape[1], dtype=torch.bool)
    return mean_and_error((gram_BKK < 0)[:, off].double().mean(1))


def false_conflicts(k: int, share: float, levels: tuple[float, ...], steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """Shares of negative products where all true products are zero, without the gate and with it at each level."""
    generator = torch.Generator().manual_seed(2)
    aggregators = {level: NoiseAware(Probe(), gate=level) for level in levels}
    found = []
    for step in range(1, max(steps) + 1):
        gram, noise = draw(generator, orthogonal(k), share, BLOCKS[k])
        for level, aggregator in aggregators.items():
            aggregator(gram, noise=noise)
            if step in steps:
                cell = {"objectives": k, "noise_share": share, "level": level, "step": step}
                found.append(cell | {"plain": negative(gram), "gated": negative(aggregator.inner.gram_BKK)})
    return found


def power(dimensions: int, share: float, smoothing: float) -> dict[int, float]:
    """Share of blocks in which the one real conflict among eight objectives passes the gate, by step."""
    mean = torch.eye(8, dimensions, dtype=torch.float64)
    mean[1, 0] = -0.4
    mean[1] /= mean[1].norm()  # the cosine is -0.37
    generator, aggregator = torch.Generator().manual_seed(5), NoiseAware(Probe(), gate=TABLE_LEVEL, smoothing=smoothing)
    found = {}
    for step in range(1, POWER_STEPS[-1] + 1):
        gram, noise = draw(generator, mean, share, 100)
        aggregator(gram, noise=noise)
        if step in POWER_STEPS:
            found[step] = (aggregator.inner.gram_BKK[:, 0, 1] < 0).double().mean().item()
    return found


def cosine_error(share: float, options: dict[str, float | str]) -> float:
    """Root mean square error of the cosines of eight objectives that have something in common, after 20 steps."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(8, DIMENSIONS, generator=generator, dtype=torch.float64)
    mean = mean + 0.7 * torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    mean = mean / mean.norm(dim=1, keepdim=True)
    off = ~torch.eye(8, dtype=torch.bool)
    aggregator = NoiseAware(Probe(), **options)
    for _ in range(20):
        gram, noise = draw(generator, mean, share, 60)
        aggregator(gram, noise=noise)
    found = aggregator.inner.gram_BKK
    inverse = found.diagonal(dim1=1, dim2=2).rsqrt()
    cosines = found * inverse[:, :, None] * inverse[:, None, :]
    return (cosines - mean @ mean.mT)[:, off].square().mean().sqrt().item()


def measure() -> dict[str, Any]:
    """All numbers: of the figure, and of the table by size and noise."""
    by_size = [
        cell
        for k in BLOCKS
        for share in TABLE_SHARES
        for cell in false_conflicts(k, share, (TABLE_LEVEL,), TABLE_STEPS)
    ]
    conflict = [
        {"dimensions": n, "noise_share": share, "smoothing": smoothing, "passed": power(n, share, smoothing)}
        for n in (64, 512)
        for share in (0.5, 0.9)
        for smoothing in (0.0, 0.9)
    ]
    cosines = [
        {"noise_share": share} | {name: cosine_error(share, options) for name, options in OPTIONS.items()}
        for share in (1 / 3, 2 / 3, 0.9)
    ]
    by_level = false_conflicts(8, 0.5, LEVELS, STEPS)
    return {"squares": squares(4000), "by_level": by_level, "by_size": by_size, "power": conflict, "cosines": cosines}


def tables(result: dict[str, Any]) -> list[Table]:
    """The result for people; in brackets the standard error of the last digits."""
    bias = Table(title="Error of |g_k|^2, in units of the mean's square", title_justify="left")
    for name in ("noise in square", "predicted", "plain", "unbiased"):
        bias.add_column(name, justify="right")
    for row in result["squares"]:
        numbers = [_with_error(row[name]) for name in ("plain", "unbiased")]
        bias.add_row(f"{row['noise_share']:.0%}", f"{row['predicted']:.3f}", *numbers)
    level = Table(title="False conflicts by level, K = 8, half noise", title_justify="left")
    for name in ("level", "no gate", *(f"gate, step {step}" for step in STEPS)):
        level.add_column(name, justify="right")
    for wanted in LEVELS:
        cells = [cell for cell in result["by_level"] if cell["level"] == wanted]
        level.add_row(f"{wanted:g}", _with_error(cells[0]["plain"]), *(_with_error(cell["gated"]) for cell in cells))
    size = Table(title=f"False conflicts with the gate at {TABLE_LEVEL:g}", title_justify="left")
    for name in ("K", "noise in square", *(f"step {step}" for step in TABLE_STEPS)):
        size.add_column(name, justify="right")
    for k in BLOCKS:
        for share in TABLE_SHARES:
            cells = [c for c in result["by_size"] if (c["objectives"], c["noise_share"]) == (k, share)]
            size.add_row(str(k), f"{share:.0%}", *(_with_error(cell["gated"]) for cell in cells))
    conflict = Table(title=f"A cosine of -0.37 passes the gate at {TABLE_LEVEL:g}", title_justify="left")
    for name in ("dimensions", "noise in square", "smoothing", *(f"step {step}" for step in POWER_STEPS)):
        conflict.add_column(name, justify="right")
    for row in result["power"]:
        passed = [f"{row['passed'][step]:.2f}" for step in POWER_STEPS]
        conflict.add_row(str(row["dimensions"]), f"{row['noise_share']:.0%}", f"{row['smoothing']:g}", *passed)
    cosines = Table(title="Error of the cosines (root mean square), after 20 steps", title_justify="left")
    for name in ("noise in square", *OPTIONS):
        cosines.add_column(name, justify="right")
    for row in result["cosines"]:
        cosines.add_row(f"{row['noise_share']:.0%}", *(f"{row[name]:.3f}" for name in OPTIONS))
    return [bias, level, size, conflict, cosines]


def _with_error(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['error']:.3f})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Two panels: bias of the squares, level of the gate. The same numbers give the same bytes."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit("the figure needs matplotlib: pip install 'megatron-moo[plot]'") from error
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    look = {"svg.hashsalt": "megatron-moo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(colours | look):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _plot_squares(left, result["squares"])
        _plot_levels(right, result["by_level"])
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, metadata=metadata, dpi=150)


def _plot_squares(axes: Any, rows: list[dict[str, Any]]) -> None:
    shares = [row["noise_share"] for row in rows]
    curve = [i / 100 for i in range(92)]
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot(curve, [s / (1 - s) for s in curve], color=INK, linestyle="--", label="predicted bias")
    for name, colour, mark in (("plain", VERMILION, "o"), ("unbiased", BLUE, "s")):
        means = [row[name]["mean"] for row in rows]
        errors = [2 * row[name]["error"] for row in rows]
        axes.errorbar(shares, means, errors, color=colour, marker=mark, markersize=5, linestyle="none", label=name)
    axes.set(title="Error of the squared lengths", xlabel="share of noise in a square, true")
    axes.set(ylabel="mean error / true square", xlim=(0, 0.95))
    axes.set_ylim(-1, 10.5)
    axes.legend(frameon=False, loc="upper left")


def _plot_levels(axes: Any, cells: list[dict[str, Any]]) -> None:
    axes.plot([0, 0.5], [0, 0.5], color=INK, linestyle="--", label="the level")
    first = [cell for cell in cells if cell["step"] == STEPS[0]]
    plain = [cell["plain"]["mean"] for cell in first]
    axes.plot(LEVELS, plain, color=VERMILION, marker="o", markersize=5, linewidth=1, label="no gate")
    for step, mark, fill in zip(STEPS, ("s", "D"), ("none", BLUE), strict=True):
        gated = [cell["gated"] for cell in cells if cell["step"] == step]
        means, errors = [g["mean"] for g in gated], [2 * g["error"] for g in gated]
        label = f"gate, after {step} step" + "s" * (step > 1)
        axes.errorbar(
            LEVELS, means, errors, color=BLUE, marker=mark, markersize=6 if fill == "none" else 3.5, fillstyle="full",
            markerfacecolor=fill, linestyle="none", label=label,
        )  # fmt: skip
    axes.set(title="Conflicts where the true product is 0", xlabel="level of the gate")
    axes.set(ylabel="share of pairs that are negative", xlim=(0, 0.52), ylim=(0, 0.6))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.02))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figure (.svg, .png), or the numbers (.json)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="the numbers, beside a figure")
    options = parser.parse_args()
    as_json = options.out is not None and options.out.suffix == ".json"
    result = measure()
    console = Console()
    for table in tables(result):
        console.print(table)
    for path in {options.json, options.out if as_json else None} - {None}:
        write_json(path, result)
    if options.out is not None and not as_json:
        plot(result, options.out)


if __name__ == "__main__":
    main()
