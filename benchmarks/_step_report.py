"""What `step.py` makes of its numbers: rows of the result, intervals, verdicts, tables, the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _step_model import Settings
from _step_variants import K_PASS, PLAIN, PLAIN_A2A, RECONSTRUCT, Variant
from rich.table import Table

MODEL = "model"
TIME_GOAL, MEMORY_GOAL, GRADIENT_GOAL = 1.03, 1.01, 1e-5
LEVEL = 0.95  # of intervals
NUMBERS_PER_ROW = 8  # token counts, flags: what is not a vector or a Gramian
INK, BLUE, VERMILION = "#767676", "#0072b2", "#d55e00"


def median_interval(values: Sequence[float], level: float = LEVEL) -> dict[str, float]:
    """Median, quartiles, and an interval for the median by order statistics: no assumption on the distribution.

    The interval is the narrowest symmetric pair of order statistics that covers the median with probability ``level``
    for independent draws; with fewer than six values there is none, and the range is given with what it does cover.

    Returns:
        ``median``, ``q1``, ``q3``, ``low``, ``high``, ``level`` (the coverage of [low, high]).
    """
    ordered, n = sorted(values), len(values)
    # All draws but `low` lie on one side of the median with a sum of binomial terms; both sides count.
    low, outside = 0, 2 / 2**n
    while (wider := outside + 2 * math.comb(n, low + 1) / 2**n) <= 1 - level:
        low, outside = low + 1, wider
    q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if n > 1 else ordered * 3
    middle = statistics.median(ordered)
    return {"median": middle, "q1": q1, "q3": q3, "low": ordered[low], "high": ordered[-1 - low], "level": 1 - outside}


def half_rows(settings: Settings) -> int:
    """H: half rows of a step, at most two a language."""
    languages = [k for wave in settings.assignment for k in wave]
    return sum(min(languages.count(k), 2) for k in set(languages))


def make_rows(
    settings: Settings,
    ways: Sequence[Variant],
    steps: Mapping[str, Mapping[str, Any]],
    memory: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One row of the result for each variant of one number of slots and waves."""
    plain = steps[PLAIN]
    gather = plain["sent"]["all_gather_into_tensor"]  # of parameters, the same for all
    vectors = plain["sent"]["reduce_scatter_tensor"]
    plain_sent = sum(plain["sent"].values()) - gather
    model_label = Variant(settings.method, MODEL).label
    rows = []
    for way in ways:
        found = steps[way.label]
        sent = sum(found["sent"].values()) - gather
        gramian = 8 * found["blocks"] * half_rows(settings) ** 2
        row = {"dp": settings.dp, "waves": settings.waves, "languages": settings.languages, "variant": way.label}
        row |= {"ours": way.ours, **found, "parameter_gather": gather, "gradients_sent": sent}
        row["sent_ratio"] = sent / plain_sent if plain_sent else None
        row["vector_ratio"] = found["sent"]["all_to_all_single"] / vectors if way.ours and vectors else None
        row["beyond_bytes"] = sent - settings.waves * vectors if way.ours else sent - vectors
        row["gramian_bytes"] = 2 * gramian * (settings.dp - 1) // settings.dp if way.ours else None
        row["memory"] = dict(memory[way.label])
        row["extra_memory"] = {name: value - memory[PLAIN][name] for name, value in memory[way.label].items()}
        row["step"] = median_interval([value for value in found["seconds"] if value is not None])
        row["cpu_step"] = median_interval([value for value in found["cpu_seconds"] if value is not None])
        row["ratio"] = _ratio(found["seconds"], plain["seconds"])
        row["cpu_ratio"] = _ratio(found["cpu_seconds"], plain["cpu_seconds"])
        row["a2a_ratio"] = _ratio(found["seconds"], steps[PLAIN_A2A]["seconds"])
        row["difference"] = {
            "of": "plain" if way.method in (PLAIN, PLAIN_A2A, "mean") else model_label,
            "all": found["difference"],
        }
        row["difference"]["value"] = found["difference"].get(row["difference"]["of"])
        rows.append(row)
    return rows


def _ratio(seconds: Sequence[float | None], other: Sequence[float]) -> dict[str, float]:
    """Of the rounds in which both took part."""
    return median_interval([a / b for a, b in zip(seconds, other, strict=True) if a is not None])


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the project promises, and whether this run shows it; None where it cannot tell."""
    found = []
    for row in rows:
        where = f"{row['dp']} ranks, {row['waves']} waves, {row['variant']}"
        if row["ours"]:
            found += _verdicts_on_ours(row, where)
        elif row["variant"] in (K_PASS, RECONSTRUCT) and row["difference"]["value"] is not None:
            distance = row["difference"]["value"]
            found.append(_verdict(f"{where}: the same gradient as ours", distance <= GRADIENT_GOAL, f"{distance:.1e}"))
    return found


def _verdicts_on_ours(row: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    if row["difference"]["of"] == "plain":
        distance = row["difference"]["value"]
        yield _verdict(f"{where}: plain Megatron's gradient", distance <= GRADIENT_GOAL, f"{distance:.1e}")
    if row["vector_ratio"] is not None:
        text = (
            f"{row['vector_ratio']:.3f} x and {row['beyond_bytes']:.0f} B, {row['gramian_bytes']:.0f} of the Gramians"
        )
        few = row["gramian_bytes"] + NUMBERS_PER_ROW * 8 * row["waves"] * row["dp"]
        met = row["vector_ratio"] == row["waves"] and row["beyond_bytes"] <= few
        yield _verdict(
            f"{where}: {row['waves']} x plain's gradient vectors, Gramians, {NUMBERS_PER_ROW} numbers a row", met, text
        )
    buckets = row["largest_bucket_bytes"]
    earlier = (row["waves"] - 1) * row["gradient_bytes"]
    peak = row["extra_memory"]["peak"]
    if row["waves"] == 1:
        text = f"{peak / 1e6:+.2f} MB, {peak / buckets:.3f} buckets"
        yield _verdict(f"{where}: peak memory at most one bucket + 1%", peak <= MEMORY_GOAL * buckets, text)
        ratio = row["ratio"]
        met = None  # too few rounds for an interval, or the goal lies within it
        if ratio["level"] >= LEVEL and not ratio["low"] <= TIME_GOAL < ratio["high"]:
            met = ratio["high"] <= TIME_GOAL
        text = f"{ratio['median']:.3f} ({_interval(ratio)}), CPU {row['cpu_ratio']['median']:.3f}"
        yield _verdict(f"{where}: step time at most {TIME_GOAL} x plain's", met, text)
    else:
        kept = row["extra_memory"]["live"]
        text = f"{kept / 1e6:+.2f} MB beside {earlier / 1e6:.2f} MB of rows"
        met = kept <= earlier + MEMORY_GOAL * buckets
        yield _verdict(f"{where}: keeps (W-1) gradients and at most one bucket + 1%", met, text)


def _verdict(goal: str, met: bool | None, found: str) -> dict[str, Any]:
    return {"goal": goal, "met": met, "found": found}


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The result for people. MB is 10^6 bytes."""
    loopback = "loopback" in rows[0]
    heads = ["blocks", "RS", "A2A", "AG", "AR", "x plain", "beyond B", "Gramian B"] + ["loopback"] * loopback
    columns = {
        "Sent by a rank in a step for gradients, MB (parameters' gather left out)": (heads, _wire_cells),
        "Memory of a rank": (["MB", "kept", "peak", "buckets", "RSS"], _memory_cells),
        "Time of a step": (["ms", "quartiles", "ratio", "95%", "to a2a", "CPU s", "CPU ratio", "95%"], _time_cells),
    }
    for title, (names, cells) in columns.items():
        table = Table(title=title, header_style="bold", title_justify="left")
        for name in ("DP", "W", "variant", *names):
            table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
        last = None
        for row in rows:
            if last not in (None, (row["dp"], row["waves"])):
                table.add_section()
            last = row["dp"], row["waves"]
            table.add_row(str(row["dp"]), str(row["waves"]), row["variant"], *cells(row))
        yield table


def _wire_cells(row: Mapping[str, Any]) -> list[str]:
    sent = dict(row["sent"])
    sent["all_gather_into_tensor"] -= row["parameter_gather"]
    names = ("reduce_scatter_tensor", "all_to_all_single", "all_gather_into_tensor", "all_reduce")
    ratio, gramian = row["sent_ratio"], row["gramian_bytes"]
    cells = [str(row["blocks"] or "-"), *(f"{sent[name] / 1e6:.2f}" if sent[name] > 1e4 else "-" for name in names)]
    cells += ["-" if ratio is None else f"{ratio:.3f}", f"{row['beyond_bytes']:.0f}"]
    cells.append("-" if gramian is None else f"{gramian:.0f}")
    return cells + ([f"{row['loopback'] / 1e6:.2f}"] if "loopback" in row else [])


def _memory_cells(row: Mapping[str, Any]) -> list[str]:
    extra = row["extra_memory"]
    if row["variant"] == PLAIN:
        return [f"{row['memory']['peak'] / 1e6:.1f}", "-", "-", "-", "-"]
    cells = [f"{row['memory']['peak'] / 1e6:.1f}", *(f"{extra[name] / 1e6:+.2f}" for name in ("live", "peak"))]
    return [*cells, f"{extra['peak'] / row['largest_bucket_bytes']:.3f}", f"{extra['rss'] / 1e6:+.1f}"]


def _time_cells(row: Mapping[str, Any]) -> list[str]:
    step, cpu = row["step"], row["cpu_ratio"]
    cells = [f"{1e3 * step['median']:.0f}", f"{1e3 * step['q1']:.0f}-{1e3 * step['q3']:.0f}"]
    cells += [f"{row['ratio']['median']:.3f}", _interval(row["ratio"])]
    cells += [f"{row['a2a_ratio']['median']:.3f}", f"{row['cpu_step']['median']:.2f}"]
    return [*cells, f"{cpu['median']:.3f}", _interval(cpu)]


def _interval(found: Mapping[str, float]) -> str:
    """Marked where there are too few rounds for the level."""
    return f"{'~' * (found['level'] < LEVEL)}{found['low']:.3f}-{found['high']:.3f}"


def profile_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Phases of one cell: wall and CPU milliseconds of a rank's main thread."""
    title = f"Where a step goes, {rows[0]['dp']} ranks, {rows[0]['waves']} waves: wall / CPU ms of a rank's thread"
    table = Table(title=title, header_style="bold", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for row in rows:
        table.add_column(row["variant"], justify="right")
    for phase in rows[0]["phases"]:
        spent = [row["phases"][phase] for row in rows]
        cells = [f"{1e3 * wall:.1f} / {1e3 * cpu:.1f}" if wall > 1e-6 else "-" for wall, cpu in spent]
        table.add_row(phase, *cells)
    return table


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bytes, memory and time of every variant, one row of panels for each number of slots and waves."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'megatron-moo[plot]'") from error
    from matplotlib.figure import Figure

    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["dp"], row["waves"]), []).append(row)
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    look = {"svg.hashsalt": "megatron-moo", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(colours | look):
        figure = Figure(
            figsize=(9.6, 0.6 + sum(0.7 + 0.19 * len(cell) for cell in cells.values())), layout="constrained"
        )
        heights = [0.7 + 0.19 * len(cell) for cell in cells.values()]
        panels = figure.subplots(len(cells), 3, squeeze=False, height_ratios=heights)
        for axes, (where, cell) in zip(panels, cells.items(), strict=True):
            _draw(axes, where, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, metadata=metadata, dpi=150)


def _draw(axes: Sequence[Any], where: tuple[int, int], cell: Sequence[Mapping[str, Any]]) -> None:
    labels = [row["variant"] for row in cell]
    colours = [BLUE if row["ours"] else INK if row["variant"] in (PLAIN, PLAIN_A2A) else VERMILION for row in cell]
    ratios = [row["ratio"] for row in cell]
    around = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
    panels = (
        ("sent for gradients, MB", [row["gradients_sent"] / 1e6 for row in cell], None, None),
        ("peak memory beyond plain, MB", [row["extra_memory"]["peak"] / 1e6 for row in cell], None, None),
        ("step time over plain (95%)", [r["median"] for r in ratios], around, 1.0),
    )
    for i, (panel, (title, values, errors, line)) in enumerate(zip(axes, panels, strict=True)):
        panel.barh(labels, values, xerr=errors, color=colours, error_kw={"ecolor": INK, "elinewidth": 1})
        panel.set_title(title if i else f"{where[0]} ranks, {where[1]} waves: {title}", fontsize=8, loc="left")
        panel.invert_yaxis()
        panel.tick_params(left=False, labelleft=i == 0)
        if line is not None:
            panel.axvline(line, color=INK, linestyle="--", linewidth=0.8)
