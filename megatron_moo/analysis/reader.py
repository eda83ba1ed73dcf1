"""Readers of a run directory: config.json, metrics.jsonl, eval.json.

    runs/<name>/{config.json, metrics.jsonl, eval.json, tensorboard/, checkpoints/, plots/}

metrics.jsonl is only ever appended to. A run that resumes from a checkpoint goes back some steps and writes
them again, so a line of step s makes every earlier line of its kind with a step >= s void, and a `step` line those
of all kinds: the last life of a step wins, and steps of a life that was given up do not show among the new ones.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moo.analysis.schema import Record, check_evaluation, check_record


@dataclass
class Metrics:
    """The lines of one metrics.jsonl by kind; all but `events` have strictly increasing "step"."""

    path: Path
    steps: list[Record] = field(default_factory=list)
    blocks: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)

    @property
    def objectives(self) -> list[str]:
        """Every objective named anywhere; blocks lines come first, as theirs is the run's order."""
        names = [name for record in self.blocks + self.steps for name in record["objectives"]]
        return list(dict.fromkeys(names))

    def add(self, record: Record) -> None:
        """Files a checked record under its kind; one that goes back in time voids what it repeats."""
        if record["kind"] == "event":
            self.events.append(record)
            return
        kinds = {"step": self.steps, "blocks": self.blocks, "validation": self.validations}
        own = kinds[record["kind"]]
        # The step's line comes first of all of its step: it ends an earlier life of every kind.
        for lines in kinds.values() if record["kind"] == "step" else [own]:
            while lines and lines[-1]["step"] >= record["step"]:
                lines.pop()
        own.append(record)


@dataclass
class Run:
    """One run directory. `metrics` and `evaluation` are None until the run has written them."""

    path: Path
    config: dict[str, Any]
    metrics: Metrics | None
    evaluation: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def method(self) -> str:
        """The method, from the first to name it of eval.json, metrics.jsonl, config.json; else "?"."""
        if self.evaluation and "method" in self.evaluation:
            return self.evaluation["method"]
        if self.metrics and self.metrics.blocks:
            return self.metrics.blocks[-1]["method"]
        return self.config.get("method", "?")


def read_metrics(path: str | Path) -> Metrics:
    """Reads and checks a metrics.jsonl.

    A last line without its line break is left out if it does not parse: the run is writing it now, or was
    killed while it did.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON or not of the schema; names file, line number and what is wrong.
    """
    path = Path(path)
    metrics = Metrics(path)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    break
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            try:
                check_record(record)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            metrics.add(record)
    return metrics


def drop_unfinished_line(path: str | Path) -> bool:
    """Cuts off a last line without its line break; returns whether there was one.

    A writer calls this before it appends to the file of a run that was killed: the first new line would be
    glued to the half one, and the file unreadable from there on.
    """
    path = Path(path)
    if not path.exists():
        return False
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        file.truncate(end)
    return end < len(data)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Reads and checks an eval.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON or not of the schema; names the file and what is wrong.
    """
    path = Path(path)
    evaluation = _read_json(path)
    try:
        check_evaluation(evaluation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return evaluation


def read_run(run_dir: str | Path) -> Run:
    """Reads what a run directory holds so far.

    Raises:
        ValueError: the directory does not exist, holds no file of a run, or a file in it is malformed.
    """
    path = Path(run_dir)
    files = {name: path / name for name in ("config.json", "metrics.jsonl", "eval.json")}
    found = {name for name, file in files.items() if file.is_file()}
    if not found:
        what = "holds none of " + ", ".join(files) if path.is_dir() else "is no directory"
        raise ValueError(f"{path} {what}: give the directory of a run, such as runs/<name>")
    return Run(
        path=path,
        config=_read_json(files["config.json"]) if "config.json" in found else {},
        metrics=read_metrics(files["metrics.jsonl"]) if "metrics.jsonl" in found else None,
        evaluation=read_evaluation(files["eval.json"]) if "eval.json" in found else None,
    )
