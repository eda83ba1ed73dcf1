"""Tables of eval.json files, several runs side by side: exact match per split and per language.

Exact match of a language pools its tasks: all correct answers over all questions. The mean of a split is over
languages, each counting the same, and only over languages that every run was asked about: runs are compared
on the same questions or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from megatron_moo.analysis.reader import Run, read_run

CONTROL = "mean"  # the method that others are compared with


@dataclass
class Score:
    """Exact match of one run on one split: the mean over languages, and the worst language."""

    mean: float
    worst: float
    worst_language: str
    languages: int


def language_scores(run: Run, split: str) -> dict[str, float]:
    """Exact match (0 to 1) per language of one split, tasks pooled; empty where the run lacks it."""
    languages = run.evaluation["splits"].get(split, {}) if run.evaluation else {}
    return {
        name: sum(task["correct"] for task in tasks.values()) / sum(task["total"] for task in tasks.values())
        for name, tasks in languages.items()
        if tasks
    }


def split_score(scores: dict[str, float]) -> Score | None:
    """Mean and worst of exact match per language; None without languages."""
    if not scores:
        return None
    worst = min(scores, key=scores.__getitem__)
    return Score(sum(scores.values()) / len(scores), scores[worst], worst, len(scores))


def evaluated_runs(run_dirs: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs that hold an eval.json, and the names of those that do not.

    Raises:
        ValueError: no run was evaluated, or a directory is none of a run.
    """
    runs = [read_run(path) for path in run_dirs]
    found = [run for run in runs if run.evaluation]
    if not found:
        names = ", ".join(str(run.path) for run in runs) or "no directory"
        raise ValueError(f"no eval.json in {names}: a run writes it when its evaluation ends")
    return found, [run.name for run in runs if not run.evaluation]


def _splits(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(split for run in runs for split in run.evaluation["splits"]))


def _common(runs: Sequence[Run], split: str) -> tuple[list[dict[str, float]], list[str]]:
    """Per run the scores of the languages that all runs with this split share, and the languages left out."""
    scores = [language_scores(run, split) for run in runs]
    asked = [set(score) for score in scores if score]
    shared = set.intersection(*asked) if asked else set()
    dropped = sorted(set().union(*asked) - shared)
    return [{name: value for name, value in score.items() if name in shared} for score in scores], dropped


def _control(runs: Sequence[Run]) -> Run | None:
    """The run of the control method that the others are compared with; None if there is none or several."""
    controls = [run for run in runs if run.method == CONTROL]
    return controls[0] if len(controls) == 1 and len(runs) > 1 else None


def _header(table: Table, runs: Sequence[Run]) -> None:
    for run in runs:
        steps = run.evaluation.get("steps")
        note = f"{run.method}, {steps} steps" if steps is not None else run.method
        table.add_column(f"{run.name}\n[dim]{note}[/dim]", justify="right", overflow="fold")


def _percent(value: float | None, control: float | None) -> str:
    """A share in percent, and the difference to the control's in points."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    if control is None:
        return text
    difference = 100 * (value - control)
    colour = "green" if difference >= 0.05 else "red" if difference <= -0.05 else "dim"
    return f"{text} [{colour}]{difference:+5.1f}[/{colour}]"


def _mean_cell(score: Score | None, against: Score | None) -> str:
    return _percent(score.mean, against.mean if against else None) if score else "-"


def _worst_cell(score: Score | None, against: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.worst_language}  {_percent(score.worst, against.worst if against else None)}"


def _caption(missing: Sequence[str], dropped: dict[str, list[str]], control: Run | None) -> str:
    lines = [f"signed: points against {control.name}, the run of method {CONTROL}"] if control else []
    lines += [
        f"{split}: left out, not asked of every run: {', '.join(names)}" for split, names in dropped.items() if names
    ]
    lines += [f"not evaluated: {', '.join(missing)}"] if missing else []
    return "\n".join(lines)


def evaluation_table(run_dirs: Sequence[str | Path]) -> Table:
    """Exact match of several runs side by side: per split the mean over languages and the worst language.

    Where exactly one of the runs is of method "mean", the others show their difference to it.

    Raises:
        ValueError: no run was evaluated, or a directory is none of a run.
    """
    runs, missing = evaluated_runs(run_dirs)
    control = _control(runs)
    table = Table(
        title="Exact match, % (mean over languages, worst language)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("split", no_wrap=True)
    table.add_column("languages", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    _header(table, runs)
    dropped = {}
    for split in _splits(runs):
        shared, dropped[split] = _common(runs, split)
        scores = [split_score(score) for score in shared]
        reference = scores[runs.index(control)] if control else None
        # The control is not compared with itself.
        against = [None if run is control else reference for run in runs]
        pairs = list(zip(scores, against, strict=True))
        count = next((str(score.languages) for score in scores if score), "0")
        table.add_row(split, count, "mean", *(_mean_cell(*pair) for pair in pairs))
        table.add_row("", "", "worst", *(_worst_cell(*pair) for pair in pairs), end_section=True)
    table.caption = _caption(missing, dropped, control)
    return table


def validation_table(run_dirs: Sequence[str | Path]) -> Table:
    """Validation loss of several runs side by side: the last one of each language, and the lowest of the run.

    Raises:
        ValueError: no run was validated, or a directory is none of a run.
    """
    runs = [run for run in map(read_run, run_dirs) if run.metrics and run.metrics.validations]
    if not runs:
        raise ValueError("no run was validated: the data need a validation split, the run --eval-interval")
    table = Table(title="Validation loss per language: last (lowest)", title_justify="left")
    table.add_column("language", no_wrap=True)
    for run in runs:
        table.add_column(f"{run.name}\nstep {run.metrics.validations[-1]['step']}", justify="right")
    for language in dict.fromkeys(
        name for run in runs for line in run.metrics.validations for name in line["objectives"]
    ):
        cells = []
        for run in runs:
            found = [line["objectives"].get(language, {}).get("loss") for line in run.metrics.validations]
            known = [loss for loss in found if loss is not None]
            cells.append(f"{known[-1]:.4f} ({min(known):.4f})" if known else "-")
        table.add_row(language, *cells)
    return table


def language_table(run_dirs: Sequence[str | Path], split: str | None = None) -> Table:
    """Exact match of several runs side by side, one row a language, for one split or all of them.

    Raises:
        ValueError: no run was evaluated, no run holds `split`, or a directory is none of a run.
    """
    runs, missing = evaluated_runs(run_dirs)
    splits = _splits(runs)
    if split is not None and split not in splits:
        raise ValueError(f'no run was asked about split "{split}"; evaluated splits: {", ".join(splits)}')
    control = _control(runs)
    table = Table(title="Exact match per language, %", title_justify="left", caption_justify="left")
    table.add_column("split", no_wrap=True)
    table.add_column("language", no_wrap=True)
    _header(table, runs)
    for name in splits if split is None else [split]:
        scores = [language_scores(run, name) for run in runs]
        reference = scores[runs.index(control)] if control else {}
        languages = list(dict.fromkeys(language for score in scores for language in score))
        for i, language in enumerate(languages):
            cells = [
                _percent(score.get(language), None if run is control else reference.get(language))
                for run, score in zip(runs, scores, strict=True)
            ]
            table.add_row(name if i == 0 else "", language, *cells, end_section=i == len(languages) - 1)
    table.caption = _caption(missing, {}, control)
    return table
