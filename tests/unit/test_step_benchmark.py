"""The cost harness: that it runs, that its rivals compute what we compute, and that its statistics are right."""

import importlib
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMALL = "--dp 2 --seq-length 16 --micro-batches 2 --rounds 2"


@pytest.fixture(scope="module")
def harness():
    """The script as a module, which imports its neighbours as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """A tiny run of everything: two ranks, two waves, fewer languages than rows."""
    return _run(
        tmp_path_factory,
        f"{SMALL} --waves 2 --languages 3 --hidden 64 --layers 1 --bucket-size 20000 --granularities model --profile 1",
    )


def _run(tmp_path_factory, options: str) -> dict:
    out = tmp_path_factory.mktemp("bench") / "step.json"
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "step.py", *options.split(), "--out", out, "--plot", out.with_suffix(".svg")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "<svg" in out.with_suffix(".svg").read_text()
    for word in ("x plain", "buckets", "CPU ratio", "met"):
        assert word in run.stdout
    assert ("Where a step goes" in run.stdout) == ("--profile" in options)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one_wave(tmp_path_factory) -> dict:
    """A small run of one wave, of a model that is large beside tables of blocks."""
    return _run(tmp_path_factory, f"{SMALL} --waves 1 --hidden 256 --layers 2 --bucket-size 300000 --no-others")


def _row(report: dict, variant: str) -> dict:
    return next(row for row in report["rows"] if row["variant"] == variant)


def test_all_ways_give_the_same_gradient(report):
    """Catches: a rival that does less (or other) work than ours, which no table would show."""
    ours, plain = "cagrad model", "plain"
    for rival in ("K-pass", "reconstruct"):
        assert _row(report, rival)["difference"]["all"][ours] < 1e-5
    for same in ("plain, a2a", "mean bucket"):
        assert _row(report, same)["difference"]["all"][plain] < 1e-6
    # Or the checks above would hold for anything that adds gradients up.
    assert _row(report, ours)["difference"]["all"][plain] > 1e-3


def test_bytes_are_what_each_way_must_send(report):
    """Catches: a collective that the harness does not see, or counts for the wrong variant."""
    plain = _row(report, "plain")
    vectors = plain["sent"]["reduce_scatter_tensor"]
    assert vectors == plain["gradient_bytes"] / 2 == _row(report, "plain, a2a")["sent"]["all_to_all_single"]
    assert _row(report, "cagrad model")["sent"]["all_to_all_single"] == 2 * vectors
    reconstruct = _row(report, "reconstruct")
    # 8 bytes a wave: every rank's number of tokens.
    gathered = reconstruct["sent"]["all_gather_into_tensor"] - reconstruct["parameter_gather"]
    assert gathered == pytest.approx(2 * 2 * vectors, abs=2 * 8)
    assert _row(report, "K-pass")["sent"]["all_reduce"] == pytest.approx(3 * 2 * vectors, abs=100)


def test_memory_and_time_are_there(report):
    """Catches: JSON that cannot be drawn or compared later, an empty phase, a verdict on nothing."""
    whole = _row(report, "plain")["gradient_bytes"]
    assert _row(report, "K-pass")["extra_memory"]["live"] == pytest.approx(3 * whole, rel=0.05)
    assert _row(report, "reconstruct")["extra_memory"]["live"] == pytest.approx(4 * whole, rel=0.05)
    for row in report["rows"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert len(row["seconds"]) == 2 and row["step"]["median"] > 0
    phases = _row(report, "cagrad model")["phases"]
    assert all(
        phases[name][0] > 0 for name in ("post", "land", "Gramian", "all-reduce", "solve", "combine", "optimizer")
    )
    goals = [verdict["goal"] for verdict in report["verdicts"]]
    assert len(goals) == len(set(goals)) == 7
    assert {"date", "device", "cores", "backend"} <= report["machine"].keys()


def test_one_wave_costs_the_bytes_of_plain_and_one_bucket(one_wave):
    """Catches: a gradient that is sent, or held, once more than it must be, at any granularity."""
    ours = [row for row in one_wave["rows"] if row["ours"]]
    assert {row["variant"].split()[-1] for row in ours} == {"bucket", "layer", "tensor", "model"}
    for row in ours:
        assert row["vector_ratio"] == 1
        assert 0.9 * row["largest_bucket_bytes"] < row["extra_memory"]["peak"] <= 1.01 * row["largest_bucket_bytes"]
    decided = [verdict for verdict in one_wave["verdicts"] if "step time" not in verdict["goal"]]
    assert len(decided) >= 2 * len(ours) and all(verdict["met"] for verdict in decided), decided


def test_the_interval_covers_the_median_as_often_as_it_says(harness):
    """Catches: an off-by-one in the order statistics, which makes a noisy ratio look certain.

    Exact: whether each of n draws lies below the median is a fair coin; all outcomes are counted.
    """
    median_interval = sys.modules[harness.make_rows.__module__].median_interval
    for n in (1, 2, 5, 6, 9, 12, 15):
        found = median_interval([float(i) for i in range(n)])
        low = int(found["low"])
        assert found["high"] == n - 1 - low
        # The median lies in [x_low, x_high] if more than `low` draws are below it, and more than `low` above.
        outcomes = [sum(1 for _ in combinations(range(n), below)) for below in range(n + 1)]
        covered = sum(outcomes[low + 1 : n - low]) / 2**n
        assert found["level"] == pytest.approx(covered)
        assert covered >= 0.95 or low == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--micro-batches 3 --waves 2", "multiple of every --waves"),
        ("--languages 9 --dp 2 --waves 2", "ranks x waves"),
        ("--rounds 0", "--rounds must be at least 1"),
    ],
)
def test_what_cannot_run_is_said_at_once(harness, capsys, options, words):
    """Catches: minutes of measuring before a division fails."""
    with pytest.raises(SystemExit):
        harness.parse_args(options.split())
    assert words in capsys.readouterr().err
