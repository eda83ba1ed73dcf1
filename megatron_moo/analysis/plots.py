"""Plots of one run, from its metrics.jsonl: loss by language, conflict by block, weights.

matplotlib is an extra (`pip install megatron-moo[plot]`). Colours keep their order for colour-blind readers
and in grey print: cividis for shares, purple to orange around a neutral middle, and for lines blue against
vermilion (Okabe and Ito). Shape letters: T logged steps, B blocks, K objectives.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_moo.analysis.reader import Metrics, read_run
from megatron_moo.analysis.summary import BlockSeries, block_series, nanmean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY, PALE = "#0072B2", "#D55E00", "#767676", "#D9D9D9"
SHARES, AROUND = "cividis", "PuOr"
FEW_BLOCKS = 3  # fewer blocks than this make curves, not a map
MAX_LABELS = 28  # more names than this along one axis cannot be read


def require_matplotlib() -> Any:
    """matplotlib. Raises ModuleNotFoundError, naming the extra, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        message = "plots need matplotlib, which is not installed: pip install 'megatron-moo[plot]'"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    return matplotlib


def new_figure(width: float, height: float) -> "Figure":
    """A figure outside pyplot's global list: a training process draws without a display and leaks nothing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG under a temporary name and renames it, so that a viewer never meets half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)
    return path


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of `window` values that leaves out NaN; NaN stays where a window holds nothing."""
    known = ~np.isnan(values)
    kernel = np.ones(max(1, min(window, len(values))))
    total = np.convolve(np.where(known, values, 0), kernel, mode="same")
    count = np.convolve(known, kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def label_rows(axes: "Axes", names: list[str]) -> None:
    """Names the rows of a heat map, every n-th one where there are too many."""
    every = -(-len(names) // MAX_LABELS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)


def clean(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def heat(axes: "Axes", values: np.ndarray, cmap: str, **norm: Any) -> Any:
    """A heat map with pale cells where there is no value."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=cmap, **norm)
    axes.set_facecolor(PALE)
    axes.tick_params(labelsize=8, length=2)
    return image


def scale(figure: "Figure", image: Any, axes: Any, label: str) -> None:
    """The colour bar of a heat map."""
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def step_ticks(axes: "Axes", steps: np.ndarray, count: int = 6) -> None:
    """Writes step numbers under the columns of a heat map whose columns are logged steps."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int))
    axes.set_xticks(chosen, steps[chosen], fontsize=8)
    axes.set_xlabel("step", fontsize=9)


def _losses(metrics: Metrics) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Steps [T], K objectives, losses [T, K] with NaN where an objective had no tokens."""
    names = [name for name in metrics.objectives if any(name in line["objectives"] for line in metrics.steps)]
    values = np.full((len(metrics.steps), len(names)), np.nan)
    for i, line in enumerate(metrics.steps):
        for j, name in enumerate(names):
            loss = line["objectives"].get(name, {}).get("loss")
            values[i, j] = np.nan if loss is None else loss
    return np.array([line["step"] for line in metrics.steps]), names, values


def _validation(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a language, where it had any."""
    lines = [(line["step"], line["objectives"].get(name, {}).get("loss")) for line in metrics.validations]
    known = [(step, loss) for step, loss in lines if loss is not None]
    return [step for step, _ in known], [loss for _, loss in known]


def plot_losses(metrics: Metrics, title: str) -> "Figure":
    """One small panel a language on common axes: its loss, smoothed, over the mean of all languages in grey.

    The language with the highest loss at the end stands out in vermilion.

    Raises:
        ValueError: the run has logged no step.
    """
    steps, names, losses = _losses(metrics)
    if not names:
        raise ValueError(f'{metrics.path} holds no "step" line with a language: there is no loss to draw')
    window = max(1, len(steps) // 25)
    curves = np.stack([smooth(losses[:, j], window) for j in range(len(names))], axis=1)
    mean = nanmean(curves, axis=1)
    tail = max(1, len(steps) // 20)
    final = nanmean(losses[-tail:], axis=0)
    worst = -1 if np.isnan(final).all() else int(np.nanargmax(final))
    columns = min(len(names), 6)
    rows = -(-len(names) // columns)
    figure = new_figure(1.2 + 2.0 * columns, 1.1 + 1.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for j, name in enumerate(names):
        axes, colour = grid.flat[j], VERMILION if j == worst else BLUE
        # Points: a language that is not in every step has no line to draw.
        axes.plot(steps, losses[:, j], ".", color=colour, alpha=0.25, markersize=2.5, markeredgewidth=0)
        axes.plot(steps, mean, color=GREY, linewidth=1.1, linestyle="--")
        axes.plot(steps, curves[:, j], color=colour, linewidth=1.7)
        axes.plot(*_validation(metrics, name), "D", color="black", markersize=3.5, markerfacecolor="white")
        note = " (worst)" if j == worst and len(names) > 1 else ""
        axes.set_title(f"{name}  {final[j]:.2f}{note}", fontsize=9, color=colour, loc="left")
        axes.grid(color=PALE, linewidth=0.5)
        clean(axes)
        if j + columns >= len(names):
            axes.tick_params(labelbottom=True)
    finite = losses[np.isfinite(losses)]
    if finite.size:
        # A few early spikes must not press the curves flat.
        grid[0, 0].set_ylim(0, 1.05 * np.percentile(finite, 99.5))
    figure.suptitle(f"Training loss per language: {title}", fontsize=11, x=0.01, ha="left")
    key = f"number: mean of the last {tail} steps; dashed: mean of all languages; dots: every step"
    key += "; diamonds: validation" if metrics.validations else ""
    figure.supxlabel(f"step   ({key})", fontsize=8)
    figure.supylabel("loss per answer token", fontsize=9)
    return figure


def _draw_shares(figure: "Figure", pair: list["Axes"], series: BlockSeries) -> None:
    """Conflict share and its control on one colour scale; as curves where blocks are too few for a map."""
    shown = [("between languages", series.conflict), ("control: rows of the same language", series.control)]
    # 0.5 is what directions without any relation give; the scale reaches it so that runs can be compared by
    # eye.
    top = max(0.5, float(np.nanmax(np.concatenate([[0.5], *(values.ravel() for _, values in shown)]))))
    image = None
    for axes, (name, values) in zip(pair, shown, strict=True):
        axes.set_title(name, fontsize=9, loc="left")
        if np.isnan(values).all():
            axes.text(
                0.5,
                0.5,
                "not measured:\nno language had two rows",
                ha="center",
                va="center",
                fontsize=9,
                color=GREY,
                transform=axes.transAxes,
            )
            axes.set(xticks=[], yticks=[])
        elif len(series.blocks) < FEW_BLOCKS:
            for j, block in enumerate(series.blocks):
                axes.plot(
                    series.steps,
                    values[:, j],
                    color=(BLUE, VERMILION)[j],
                    marker=".",
                    markersize=3,
                    linewidth=1,
                    label=block,
                )
            axes.set_ylim(-0.02, top)
            axes.set_ylabel("share of products below zero", fontsize=8)
            axes.set_xlabel("step", fontsize=9)
            axes.legend(fontsize=8, frameon=False)
            clean(axes)
        else:
            image = heat(axes, values.T, SHARES, vmin=0, vmax=top)
            step_ticks(axes, series.steps)
            label_rows(axes, series.blocks)
    if image is not None:
        scale(figure, image, pair, "share of products below zero")


def _draw_profile(axes: "Axes", series: BlockSeries) -> None:
    """Between languages against the same language: mean share by block; with few blocks cosine over steps."""
    rows, few = np.arange(len(series.blocks)), len(series.blocks) < FEW_BLOCKS
    for shares, cosines, colour, marker, name in (
        (series.conflict, series.cosine, VERMILION, "o", "between languages"),
        (series.control, series.control_cosine, BLUE, "s", "same language"),
    ):
        if np.isnan(shares).all():
            continue  # the control of a run whose languages have one row each
        style = {"color": colour, "marker": marker, "label": name}
        if few:
            axes.plot(series.steps, nanmean(cosines, axis=1), markersize=3, linewidth=1, **style)
        else:
            axes.plot(nanmean(shares, axis=0), rows, markersize=4.5, linestyle="none", **style)
    if few:
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title("mean cosine over steps", fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=9)
    else:
        axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(
            0.495,
            len(rows) - 0.6,
            "unrelated directions",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=7,
            color=GREY,
        )
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.02, None))
        axes.set_title("mean over the run, by block", fontsize=9, loc="left")
        axes.set_xlabel("share of products below zero", fontsize=9)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        label_rows(axes, series.blocks)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    clean(axes)


def _draw_pairs(figure: "Figure", axes: "Axes", series: BlockSeries) -> None:
    """Mean cosine of each pair of languages, [K, K]; the lower triangle says it all."""
    k = len(series.objectives)
    values = np.where(np.tri(k, k=-1, dtype=bool), series.pair_cosine, np.nan)
    found = values[~np.isnan(values)]
    reach = max(0.05, float(np.abs(found).max())) if found.size else 1.0
    image = heat(axes, values, AROUND, vmin=-reach, vmax=reach)
    axes.set_facecolor("white")
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(k - 1), series.objectives[:-1], rotation=90, fontsize=8)
    axes.set_yticks(range(1, k), series.objectives[1:], fontsize=8)
    axes.set_title("mean cosine of each pair, over blocks and steps", fontsize=9, loc="left")
    if k <= 12:
        for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
            dark = abs(values[i, j]) > 0.6 * reach
            axes.text(
                j,
                i,
                f"{values[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    scale(figure, image, axes, "cosine (orange: below zero)")


def plot_conflict(series: BlockSeries, title: str) -> "Figure":
    """Where languages conflict: blocks x steps beside the same-language control; block means; pairs."""
    tall = max(2.4, 1.3 + 0.19 * min(len(series.blocks), MAX_LABELS))
    low = max(3.4, 1.2 + 0.2 * len(series.objectives), tall * 0.8)
    figure = new_figure(12, tall + low + 0.8)
    upper, lower = figure.subfigures(2, 1, height_ratios=[tall, low])
    left, right = upper.subplots(1, 2, sharey=len(series.blocks) >= FEW_BLOCKS)
    _draw_shares(upper, [left, right], series)
    profile, pairs = lower.subplots(1, 2)
    _draw_profile(profile, series)
    _draw_pairs(lower, pairs, series)
    figure.suptitle(f"Conflict of the languages' gradients: {title}", fontsize=11, x=0.01, ha="left")
    return figure


def relative_weights(series: BlockSeries) -> np.ndarray:
    """Weights times the number of active objectives, [T, B, K]; 1 is the share that a plain mean gives."""
    active = (~np.isnan(series.weights)).sum(axis=2, keepdims=True)
    return series.weights * active


def _draw_weights(figure: "Figure", maps: list["Axes"], series: BlockSeries) -> None:
    """Weights as languages x steps (mean over blocks) and blocks x languages (mean over steps)."""
    from matplotlib.colors import TwoSlopeNorm

    weights, languages = relative_weights(series), series.objectives
    by_step, by_block = nanmean(weights, axis=1).T, nanmean(weights, axis=0)
    found = np.concatenate([by_step.ravel(), by_block.ravel(), [0.0, 1.1]])
    norm = TwoSlopeNorm(1.0, vmin=float(np.nanmin(found)), vmax=float(np.nanmax(found)))
    # PuOr runs from orange to purple; here orange is the raised weight.
    heat(maps[0], by_step, AROUND + "_r", norm=norm)
    step_ticks(maps[0], series.steps)
    maps[0].set_yticks(range(len(languages)), languages, fontsize=8)
    maps[0].set_title("over steps, mean of the blocks", fontsize=9, loc="left")
    image = heat(maps[1], by_block, AROUND + "_r", norm=norm)
    maps[1].set_xticks(range(len(languages)), languages, rotation=90, fontsize=8)
    label_rows(maps[1], series.blocks)
    maps[1].set_title("by block, mean of the steps", fontsize=9, loc="left")
    scale(figure, image, maps, "weight x active languages (1 = equal share)")


def _draw_norm_ratio(axes: "Axes", series: BlockSeries) -> None:
    """|d| / |mean| over steps: median of the blocks, and the span from the 10th to the 90th percentile."""
    known = ~np.isnan(series.norm_ratio).all(axis=1)
    if not known.any():
        axes.text(
            0.5,
            0.5,
            "|d| / |mean| was not measured",
            ha="center",
            va="center",
            fontsize=9,
            color=GREY,
            transform=axes.transAxes,
        )
        return
    low, middle, high = np.nanpercentile(series.norm_ratio[known], [10, 50, 90], axis=1)
    steps = series.steps[known]
    axes.fill_between(
        steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="10th to 90th percentile of the blocks"
    )
    axes.plot(steps, middle, color=BLUE, linewidth=1.6, label="median block")
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, None)
    axes.set_xlabel("step", fontsize=9)
    axes.set_title(
        "|d| / |mean|: length of the combined gradient over that of the unweighted mean",
        fontsize=9,
        loc="left",
    )
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="best")
    clean(axes)


def plot_weights(series: BlockSeries, title: str) -> "Figure":
    """Which languages a method raises or lowers, when and where, and how long its direction is."""
    rows = max(len(series.objectives), min(len(series.blocks), MAX_LABELS))
    tall = max(2.6, 1.4 + 0.19 * rows)
    figure = new_figure(12, tall + 2.9)
    upper, lower = figure.subfigures(2, 1, height_ratios=[tall, 2.2])
    _draw_weights(upper, list(upper.subplots(1, 2)), series)
    _draw_norm_ratio(lower.subplots(), series)
    figure.suptitle(f"Weights of the languages: {title}", fontsize=11, x=0.01, ha="left")
    return figure


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draws a run's plots into <run_dir>/plots/ and returns the paths written.

    loss_per_language.png always; conflict_heatmap.png and weights.png from the first logging interval on.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; names the extra.
        ValueError: the run has no metrics yet, or they are malformed.
    """
    require_matplotlib()
    run = read_run(run_dir)
    if run.metrics is None:
        raise ValueError(f"{run.path} holds no metrics.jsonl: there is nothing to draw yet")
    folder = run.path / "plots"
    series = block_series(run.metrics) if run.metrics.blocks else None
    what = f"{series.method}, blocks by {series.granularity}" if series else run.method
    title = f"{run.name} ({what})"
    written = [save(plot_losses(run.metrics, title), folder / "loss_per_language.png")]
    if series:
        written.append(save(plot_conflict(series, title), folder / "conflict_heatmap.png"))
        written.append(save(plot_weights(series, title), folder / "weights.png"))
    return written
