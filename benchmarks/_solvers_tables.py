"""Tables and verdicts of `solvers.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = dict[str, Any]


def time_table(times: Sequence[Row], accuracies: Sequence[Row], marked: Collection[str], libmtl: bool) -> Table:
    """Times in ms; a dagger at torchjd's for the ``marked`` methods, which have a note."""
    at = {(row["method"], row["blocks"], row["objectives"]): row for row in times}
    sizes = list(dict.fromkeys(row["blocks"] for row in times))
    table = _table("Time of one call, ms" + " (LibMTL: of one block)" * libmtl)
    for blocks in sizes:
        for head in (f"B={blocks}\nours", "\ntorchjd", "\nx"):
            table.add_column(head, justify="right", no_wrap=True)
    if libmtl:
        table.add_column("\nLibMTL", justify="right", no_wrap=True)
    for row, first in _with_sections(accuracies, table):
        cells = [str(row["objectives"]) if first else "", row["method"]]
        for blocks in sizes:
            cell = at[row["method"], blocks, row["objectives"]]
            cells.append(_milliseconds(cell["ours_seconds"]))
            if cell["ratio"] is None:
                cells += ["-" if cell["why"] == "none" else _short(cell["why"]), ""]
                continue
            marks = "~" * cell["extrapolated"], "†" * (row["method"] in marked)
            cells += [f"{marks[0]}{_milliseconds(cell['torchjd_seconds'])}{marks[1]}", _count(cell["ratio"])]
        if libmtl:
            seconds = row["libmtl_seconds_per_block"]
            cells.append("-" if seconds is None else _milliseconds(seconds))
        table.add_row(*cells)
    return table


def accuracy_table(accuracies: Sequence[Row], libmtl: bool) -> Table:
    """Accuracies of both sides."""
    table = _table("Accuracy, mean of a few blocks" + " (LibMTL: cosine)" * libmtl)
    for measure in ("KKT", "excess", "cosine"):
        for head in (f"{measure}\nours", "\ntorchjd"):
            table.add_column(head, justify="right", no_wrap=True)
    if libmtl:
        table.add_column("\nLibMTL", justify="right", no_wrap=True)
    for row, first in _with_sections(accuracies, table):
        cells = [str(row["objectives"]) if first else "", row["method"]]
        for key, form in (("kkt", ".0e"), ("excess", ".0e"), ("cosine", "+.3f")):
            for side in ("ours", "torchjd"):
                value = row[side][key] if row[side] else None
                cells.append("-" if value is None else format(value, form))
        if libmtl:
            cells.append(f"{row['libmtl']['cosine']:+.3f}" if "libmtl" in row else "-")
        table.add_row(*cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, header_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\nK", justify="right")
    table.add_column("\nmethod", no_wrap=True)
    return table


def _with_sections(rows: Sequence[Row], table: Table) -> Iterator[tuple[Row, bool]]:
    """Rows, and whether each is the first of its K."""
    last = None
    for row in rows:
        first = row["objectives"] != last
        if first and last is not None:
            table.add_section()
        last = row["objectives"]
        yield row, first


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _short(why: str) -> str:
    """A reason that fits into a cell; all of it stands below."""
    return why.partition(",")[0] if why.startswith("needs ") else "failed"


def verdicts(times: Sequence[Row]) -> list[Row]:
    """The targets, for 2 CPU cores: whether they are met (None: not measured), and what was found."""
    at = {(row["method"], row["blocks"], row["objectives"]): row for row in times}
    cells = [row for (_, *size), row in at.items() if size == [200, 16]]
    compared = [row for row in cells if row["ratio"] is not None]
    alone = ", ".join(row["method"] for row in cells if row["ratio"] is None)
    vaccine = [row for key, row in at.items() if key == ("gradvac", 200, 64)]

    def verdict(target: str, rows: list[Row], fails: Callable[[Row], bool], show: Callable[[Row], str]) -> Row:
        """``rows`` from worst to best: all that fail are shown, or else the worst."""
        shown = ", ".join(map(show, [row for row in rows if fails(row)] or rows[:1]))
        return {"target": target, "met": not any(map(fails, rows)) if rows else None, "found": shown}

    found = [
        verdict(
            "B = 200, K = 16: every method under 50 ms",
            sorted(cells, key=lambda row: -row["ours_seconds"]),
            lambda row: row["ours_seconds"] >= 0.05,
            lambda row: f"{row['method']} {_milliseconds(row['ours_seconds'])} ms",
        ),
        verdict(
            "B = 200, K = 16: at least 50 times torchjd's loop",
            sorted(compared, key=lambda row: row["ratio"]),
            lambda row: row["ratio"] < 50,
            lambda row: f"{row['method']} {_count(row['ratio'])}x",
        ),
        verdict(
            "B = 200, K = 64: gradvac under 0.5 s",
            vaccine,
            lambda row: row["ours_seconds"] >= 0.5,
            lambda row: f"{row['ours_seconds']:.3f} s, {_count(row['ratio'] or 0)}x torchjd's loop",
        ),
    ]
    if compared and alone:
        found[1]["found"] += f"; no loop to compare with: {alone}"
    return found
