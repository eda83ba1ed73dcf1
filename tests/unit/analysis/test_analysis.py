"""Readers, statistics, tables and plots of a run directory, on small runs written by hand."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_moo import analysis
from megatron_moo.analysis import plots

ROOT = Path(__file__).resolve().parents[3]


def step_line(step: int, loss: float = 2.0, **objectives: float | None) -> dict:
    objectives = objectives or {"en": loss, "fa": loss}
    entries = {name: {"loss": value, "tokens": 0 if value is None else 7} for name, value in objectives.items()}
    line = {"kind": "step", "step": step, "time": 1e9, "loss": loss, "grad_norm": 1.0, "lr": 1e-3}
    return line | {"objectives": entries}


def block(name: str = "layer 0", cosine: float | None = -0.5, **fields) -> dict:
    """A block of two objectives with one pair of the given cosine."""
    value = {
        "block": name,
        "cosine": [[1.0, cosine], [cosine, 1.0]],
        "conflict_share": None if cosine is None else float(cosine < 0),
        "control_share": 0.25,
        "control_cosine": 0.5,
        "weights": [0.75, 0.25],
        "norm_ratio": 0.9,
        "active": [True, True],
    }
    return value | fields


def blocks_line(step: int, *blocks: dict, objectives: tuple[str, ...] = ("en", "fa"), **fields) -> dict:
    line = {"kind": "blocks", "step": step, "method": "cagrad", "granularity": "layer"}
    return line | {"objectives": list(objectives), "blocks": list(blocks) or [block()]} | fields


def write_lines(path: Path, *lines: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def write_evaluation(run: Path, method: str, **splits: dict[str, tuple[int, int]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    content = {
        split: {name: {"sum": {"correct": c, "total": n}} for name, (c, n) in languages.items()}
        for split, languages in splits.items()
    }
    (run / "eval.json").write_text(json.dumps({"splits": content, "method": method, "steps": 10}))
    return run


def text_of(table) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


# Reading


def test_lines_are_sorted_by_kind(tmp_path):
    """Catches: lines of one kind lost among the others; unknown fields refused, so that none can be added."""
    path = write_lines(
        tmp_path / "metrics.jsonl", step_line(1), {"kind": "event", "what": "start"}, blocks_line(1, extra=3)
    )
    metrics = analysis.read_metrics(path)
    assert (len(metrics.steps), len(metrics.blocks), len(metrics.events)) == (1, 1, 1)
    assert metrics.objectives == ["en", "fa"]


def test_a_resumed_run_counts_its_last_life_only(tmp_path):
    """Catches: steps counted twice, or steps of the life that was given up left among the new ones."""
    path = write_lines(
        tmp_path / "metrics.jsonl",
        *(step_line(step, loss=9.0) for step in (1, 2, 3, 4)),
        blocks_line(2, method="old"),
        blocks_line(4, method="old"),
        {"kind": "event", "what": "resume"},
        *(step_line(step, loss=1.0) for step in (2, 3)),
        blocks_line(3, method="new"),
    )
    metrics = analysis.read_metrics(path)
    assert [(line["step"], line["loss"]) for line in metrics.steps] == [(1, 9.0), (2, 1.0), (3, 1.0)]
    assert [(line["step"], line["method"]) for line in metrics.blocks] == [(3, "new")]


def without(line: dict, field: str) -> dict:
    return {name: value for name, value in line.items() if name != field}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "step", ', "not JSON"),
        ("[1]", '"kind" is one of step, blocks, validation, event'),
        ({"kind": "stepp"}, "found {'kind': 'stepp'}"),
        (without(step_line(1), "lr"), 'step line lacks "lr"'),
        (step_line(1) | {"step": 1.5}, '"step" must be a whole number'),
        (step_line(1) | {"loss": True}, '"loss" must be a number or null, found True'),
        (step_line(1) | {"objectives": {"en": {"loss": 1.0}}}, 'objective "en" lacks "tokens"'),
        (blocks_line(1) | {"blocks": []}, '"blocks" must be a list of blocks'),
        (blocks_line(1, block(weights=[1.0])), 'block "layer 0": "weights" must be a list of 2 values'),
        (blocks_line(1, block(active=[1, 0])), '"active" must be a list of 2 values'),
        (blocks_line(1, block(cosine=2.0)), '"cosine" must be 2 lists of 2 numbers from -1 to 1'),
        (blocks_line(1, block(conflict_share=1.1)), '"conflict_share" must be a number from 0 to 1'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    """Catches: a malformed line that is skipped, or an error that does not say where."""
    path = write_lines(tmp_path / "metrics.jsonl", step_line(1), line, step_line(2))
    with pytest.raises(ValueError) as error:
        analysis.read_metrics(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_a_line_cut_by_a_kill_is_left_out_and_can_be_cut_off(tmp_path):
    """Catches: a killed run that cannot be read; a resumed one whose first line is glued to half a line."""
    path = write_lines(tmp_path / "metrics.jsonl", step_line(1))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "step", "st\xc3')
    assert len(analysis.read_metrics(path).steps) == 1
    assert analysis.drop_unfinished_line(path)
    assert path.read_bytes() == whole
    assert not analysis.drop_unfinished_line(path)
    assert not analysis.drop_unfinished_line(tmp_path / "none")


def test_a_diverged_run_can_be_read(tmp_path):
    """Catches: a diverged run, the very one to look at, refused by the reader or fatal to the statistics."""
    for lost in (math.nan, None):
        line = blocks_line(1, block(weights=[lost, lost], norm_ratio=lost) | {"cosine": [[lost, lost]] * 2})
        step = step_line(1) | {
            "loss": lost,
            "grad_norm": lost,
            "objectives": {"en": {"loss": lost, "tokens": 3}},
        }
        metrics = analysis.read_metrics(write_lines(tmp_path / "metrics.jsonl", step, line))
        assert np.isnan(analysis.conflict_summary(metrics).cosine).all()
        assert np.isnan(analysis.block_series(metrics).weights).all()


def _validation(step: int, **losses: float) -> dict:
    cells = {name: {"loss": loss, "tokens": 3} for name, loss in losses.items()}
    return {"kind": "validation", "step": step, "time": 1.0, "loss": 2.0, "objectives": cells}


def test_validation_is_shown_by_language(tmp_path):
    """Would catch: validation of a life that was given up, the best loss in place of the last one, broken plots."""
    lines = (_validation(10, en=3.0, fa=4.0), _validation(20, en=1.0, fa=9.0), _validation(20, en=2.5, fa=3.5))
    run = tmp_path / "run"
    write_lines(run / "metrics.jsonl", step_line(10), *lines, step_line(30), _validation(30, en=2.75))
    assert [line["step"] for line in analysis.read_run(run).metrics.validations] == [10, 20, 30]
    write_lines(tmp_path / "again" / "metrics.jsonl", *lines, step_line(15))
    assert [line["step"] for line in analysis.read_run(tmp_path / "again").metrics.validations] == [10]
    text = text_of(analysis.validation_table([run]))
    assert "2.7500 (2.5000)" in text and "3.5000 (3.5000)" in text and "step 30" in text
    assert (run / "plots" / "loss_per_language.png") in analysis.plot_run(run)
    with pytest.raises(ValueError, match="no run was validated"):
        analysis.validation_table([write_evaluation(tmp_path / "other", "mean", seen={"en": (1, 2)})])


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    """Catches: an empty report for a mistyped path."""
    with pytest.raises(ValueError, match="holds none of"):
        analysis.read_run(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        analysis.read_run(tmp_path / "typo")


def test_a_bad_evaluation_is_named(tmp_path):
    """Catches: 12 correct answers of 10 shown as 120 %."""
    run = write_evaluation(tmp_path / "run", "mean", seen={"en": (12, 10)})
    with pytest.raises(ValueError, match=r"eval.json: seen/en/sum: 12 correct of 10"):
        analysis.read_run(run)


# Statistics


def test_summary_means_over_steps_and_blocks(tmp_path):
    """Catches: absent values taken as zero, inactive objectives counted, objectives matched by position."""
    idle = block("b", cosine=None, active=[True, False], control_share=None, weights=[1.0, 0.0])
    path = write_lines(
        tmp_path / "metrics.jsonl",
        blocks_line(1, block("a", -0.5), block("b", 0.3)),
        blocks_line(2, block("a", 0.1, control_share=None), idle),
        # The same pair, named the other way round, beside a third objective.
        blocks_line(3, block("a", -0.2, weights=[0.1, 0.9]), objectives=("fa", "en")),
        blocks_line(4, block("a", 0.6), objectives=("ja", "en")),
    )
    metrics = analysis.read_metrics(path)
    summary = analysis.conflict_summary(metrics)
    assert summary.objectives == ["en", "fa", "ja"] and summary.blocks == ["a", "b"]
    assert summary.conflict == pytest.approx([0.5, 0.0])
    assert summary.control == pytest.approx([0.25, 0.25])
    assert summary.cosine == pytest.approx([0.0, 0.3])
    assert summary.pair_cosine[0, 1] == summary.pair_cosine[1, 0] == pytest.approx((-0.5 + 0.3 + 0.1 - 0.2) / 4)
    assert summary.pair_conflict[0, 1] == pytest.approx(0.5)
    assert summary.pair_cosine[0, 2] == pytest.approx(0.6)
    assert np.isnan(summary.pair_cosine[1, 2]) and np.isnan(summary.pair_cosine[0, 0])
    assert summary.total == pytest.approx((0.25, 0.25))
    series = analysis.block_series(metrics)
    assert series.weights[2, 0] == pytest.approx([0.9, 0.1, np.nan], nan_ok=True)
    assert np.isnan(series.weights[1, 1, 1])
    late = analysis.conflict_summary(metrics, since=3)
    assert list(late.steps) == [3, 4] and late.blocks == ["a"]
    with pytest.raises(ValueError, match="since=5: the last logged step"):
        analysis.conflict_summary(metrics, since=5)


def test_summary_before_the_first_interval_is_an_error(tmp_path):
    """Catches: a crash inside numpy for a run that has just started."""
    metrics = analysis.read_metrics(write_lines(tmp_path / "metrics.jsonl", step_line(1)))
    with pytest.raises(ValueError, match="has not reached its first logging interval"):
        analysis.conflict_summary(metrics)


def test_the_conflict_table_shows_the_worst_blocks_and_dashes(tmp_path):
    """Catches: a table that hides the blocks with conflict, or prints nan for a control not measured."""
    quiet = [block(f"quiet {i}", 0.5, control_share=None, control_cosine=None) for i in range(5)]
    loud = block("loud", -0.5, control_share=None, control_cosine=None)
    metrics = analysis.read_metrics(write_lines(tmp_path / "m.jsonl", blocks_line(1, *quiet, loud)))
    text = text_of(analysis.conflict_table(analysis.conflict_summary(metrics), rows=2))
    assert "loud" in text and "quiet 4" not in text and "the 2 of 6 blocks" in text
    assert "nan" not in text and " - " in text


# Evaluation


def test_evaluation_compares_like_with_like(tmp_path):
    """Catches: a mean over other languages than the control's, a pooled mean, or a wrong worst language."""
    control = write_evaluation(tmp_path / "control", "mean", seen={"en": (50, 100), "fa": (1, 10), "ja": (9, 9)})
    other = write_evaluation(tmp_path / "other", "mgda", seen={"en": (40, 100), "fa": (3, 10)}, far={"ko": (0, 4)})
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text("{}")
    text = text_of(analysis.evaluation_table([control, other, tmp_path / "young"]))
    rows = [line for line in text.splitlines() if "mean" in line or "worst" in line]
    seen_mean = next(line for line in rows if "seen" in line)
    assert "30.0" in seen_mean and "35.0" in seen_mean and "+5.0" in seen_mean
    seen_worst = rows[rows.index(seen_mean) + 1]
    assert "fa  10.0" in seen_worst and "fa  30.0" in seen_worst and "+20.0" in seen_worst
    far_mean = next(line for line in rows if "far" in line)
    assert "-" in far_mean and "0.0" in far_mean
    assert "seen: left out, not asked of every run: ja" in text
    assert "not evaluated: young" in text


def test_the_language_table_shows_every_language(tmp_path):
    """Catches: a language that only one run was asked about missing from the table."""
    control = write_evaluation(tmp_path / "control", "mean", seen={"en": (5, 10), "ja": (9, 10)})
    other = write_evaluation(tmp_path / "other", "mgda", seen={"en": (4, 10), "fa": (3, 10)})
    text = text_of(analysis.language_table([control, other]))
    assert "-10.0" in text and "90.0" in text and "30.0" in text
    with pytest.raises(ValueError, match='split "sean"; evaluated splits: seen'):
        analysis.language_table([control], "sean")
    with pytest.raises(ValueError, match="no eval.json in"):
        analysis.evaluation_table([])


# Plots


def make_run(run: Path, objectives: int, blocks: int, steps: int, control: bool = True) -> Path:
    """A run whose values are of no matter, with a language that is absent now and then."""
    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(objectives)]
    lines = []
    for step in range(1, steps + 1):
        losses = {name: None if (step + i) % 5 == 0 else float(rng.random()) for i, name in enumerate(names)}
        lines.append(step_line(step, **losses))
        if step % 2 == 0:
            active = [losses[name] is not None for name in names]
            cosine = [[float(rng.uniform(-1, 1)) if a and b else None for b in active] for a in active]
            entry = block(weights=rng.random(objectives).tolist(), active=active)
            entry |= {"cosine": cosine, "control_share": 0.1 if control else None}
            entry["control_cosine"] = 0.5 if control else None
            lines.append(blocks_line(step, *(entry | {"block": f"b{j}"} for j in range(blocks)), objectives=names))
    write_lines(run / "metrics.jsonl", *lines)
    return run


@pytest.mark.parametrize(
    ("objectives", "blocks", "steps", "control"), [(1, 1, 2, False), (3, 2, 4, True), (13, 40, 12, True)]
)
def test_plots_are_drawn_for_any_shape_of_run(tmp_path, objectives, blocks, steps, control):
    """Catches: a plot that fails for one language, one block or one step, or leaves half a file."""
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", objectives, blocks, steps, control)
    written = analysis.plot_run(run)
    assert [path.name for path in written] == ["loss_per_language.png", "conflict_heatmap.png", "weights.png"]
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(path.name for path in written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_run_before_its_first_interval_gets_the_plot_there_is(tmp_path):
    """Catches: no loss curve for a run that was stopped early."""
    pytest.importorskip("matplotlib")
    write_lines(tmp_path / "run" / "metrics.jsonl", step_line(1))
    assert [path.name for path in analysis.plot_run(tmp_path / "run")] == ["loss_per_language.png"]


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    """Catches: a bare ModuleNotFoundError after an hour of training."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_lines(tmp_path / "run" / "metrics.jsonl", step_line(1))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'megatron-moo\[plot\]'"):
        analysis.plot_run(tmp_path / "run")


def test_smoothing_leaves_out_absent_values():
    """Catches: a language that is absent in a step pulled towards zero there."""
    values = np.array([1.0, np.nan, 1.0, np.nan, np.nan, np.nan, 4.0])
    assert plots.smooth(values, 3) == pytest.approx([1, 1, 1, 1, np.nan, 4, 4], nan_ok=True)
    assert plots.smooth(values[:1], 10) == pytest.approx([1.0])


def test_relative_weights_are_one_for_a_plain_mean(tmp_path):
    """Catches: weights scaled by all languages although some were not active."""
    entry = block(weights=[0.5, 0.5, 0.0], active=[True, True, False]) | {"cosine": [[1.0] * 3] * 3}
    line = blocks_line(1, entry, objectives=("en", "fa", "ja"))
    series = analysis.block_series(analysis.read_metrics(write_lines(tmp_path / "m.jsonl", line)))
    assert plots.relative_weights(series)[0, 0] == pytest.approx([1, 1, np.nan], nan_ok=True)


# The command and the document


def run_report(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_report_needs_neither_torch_nor_megatron(tmp_path):
    """Catches: an import that makes reading a run's tables cost seconds, or impossible on a laptop."""
    heavy = ("torch", "megatron", "matplotlib")
    code = f"import sys, megatron_moo.analysis; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_report_prints_tables_and_fails_in_one_line(tmp_path):
    """Catches: a report that shows a traceback for a mistyped path, or succeeds with nothing."""
    run = write_evaluation(make_run(tmp_path / "run", 3, 3, 4), "cagrad", seen={"en": (5, 10)})
    result = run_report(run, "--no-plots")
    assert result.returncode == 0, result.stderr
    assert "Conflict by block" in result.stdout and "50.0" in result.stdout
    result = run_report(tmp_path / "typo")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_the_documented_example_passes_the_validator():
    """Catches: docs/metrics.md and the validator drifting apart."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    examples = [part.split("```")[0] for part in text.split("```json\n")[1:]]
    step, evaluation = (json.loads(example) for example in examples)
    analysis.check_record(step)
    analysis.check_evaluation(evaluation)
    for field in copy.deepcopy(blocks_line(1))["blocks"][0]:
        assert f"`{field}`" in text
