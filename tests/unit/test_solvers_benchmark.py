"""The benchmark of solvers: that it runs, and that its measures of accuracy tell right from wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("scipy")


def test_a_tiny_run(tmp_path):
    """Catches: a benchmark that broke with the library it measures, a JSON without the numbers of its table."""
    out = tmp_path / "solvers.json"
    options = "--blocks 1 --objectives 4 --methods mean mgda pcgrad --budget 0.01".split()
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "solvers.py", *options, "--out", out],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert report["settings"]["objectives"] == [4] and report["machine"]["threads"] == 1
    assert {"date", "device", "cores", "versions"} <= report["machine"].keys()
    methods = ["mean", "mgda", "pcgrad"]
    assert [row["method"] for row in report["times"]] == methods == [row["method"] for row in report["accuracy"]]
    for row in report["times"]:
        assert row["blocks"] == 1 and row["objectives"] == 4 and row["ours_seconds"] > 0
        assert {"torchjd_seconds", "extrapolated", "ratio", "rounds", "why"} <= row.keys()
    mgda = report["accuracy"][1]["ours"]
    assert 0 <= mgda["kkt"] < 1e-9 and abs(mgda["excess"]) < 1e-9 and mgda["cosine"] > 0
    assert [row["met"] for row in report["verdicts"]] == [None] * 3
    for word in ("torchjd", "excess", "not measured"):
        assert word in run.stdout


def test_methods_are_all_mapped():
    """Catches: a new method without a word on whether torchjd has it."""
    script = "import _solvers_peers as p; from megatron_moo.aggregation import AGGREGATORS; "
    script += "print(*(set(AGGREGATORS) - set(p.TORCHJD)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.split()


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _solvers_cases

    return _solvers_cases


def test_accuracy_tells_exact_from_inexact(cases):
    """Catches: a residual that is zero for anything, or that no exact solution can bring to zero."""
    case = cases.make_case(5, 8, seed=3)
    exact = {
        "mgda": cases._reference("hull", case, 8),
        "dualproj": cases._reference("projected mean", case, 8),
        "upgrad": cases._reference("projected rows", case, 8),
    }
    for method, weights in exact.items():
        right = cases.Answer(cases.torch.from_numpy(weights))
        wrong = cases.Answer(right.weights_AK + 0.01)
        found = cases.accuracy(method, case, {"right": right, "wrong": wrong}, {})
        assert abs(found["right"]["kkt"]) < 1e-9 and abs(found["right"]["excess"]) < 1e-9
        assert found["wrong"]["excess"] > 1e-4
        assert found["right"]["cosine"] > -1e-9


def test_closed_forms(cases):
    """Catches: wrong conventions (powers, cosines), which would blame a right answer or pass a wrong one."""
    torch = cases.torch
    gram = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))[None]
    case = cases.Case(torch.empty(1, 3, 3), gram, torch.ones(1, 3))
    length = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    for method, settings, weights in (
        ("nash-mtl", {}, 1 / length),  # G w = 1 / w
        ("fairgrad", {"alpha": 2.0}, 1 / length ** (4 / 3)),  # G w = w^(-1/2)
        ("config", {}, 1 / length),  # equal cosines
        ("mgda", {}, 1 / length**2),
        ("cagrad", {"c": 0.5}, None),
    ):
        if weights is None:
            # Equal lengths: the mean itself is the best direction, 1 + c times as long.
            equal = cases.Case(case.rows_BKN, torch.eye(3, dtype=torch.float64)[None], case.losses_BK)
            weights = torch.full((1, 3), 1.5 / 3, dtype=torch.float64)
            found = cases.accuracy(method, equal, {"a": cases.Answer(weights)}, settings)["a"]
        else:
            found = cases.accuracy(method, case, {"a": cases.Answer(weights)}, settings)["a"]
            off = weights * torch.tensor([1.0, 1.1, 1.0], dtype=torch.float64)
            assert cases.accuracy(method, case, {"a": cases.Answer(off)}, settings)["a"]["kkt"] > 1e-2
        assert abs(found["kkt"]) < 1e-12, method
