"""Two lines in a plain Megatron-core script: examples/plain_megatron/train.py with and without them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.multiprocess import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "plain_megatron" / "train.py"


def _run(rank: int, *flags: str) -> list[tuple[float, float]]:
    """The script's main on a forked rank."""
    spec = importlib.util.spec_from_file_location("plain_megatron_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*flags])


def test_the_two_lines_change_nothing_with_mean():
    """Would catch: an installation that needs more of a script than the two lines."""
    plain, mean = (run_ranks(_run, 4, "--steps", "8", "--tensor-parallel", "2", "--method", m) for m in ("off", "mean"))
    for stock, ours in zip(plain, mean, strict=True):
        for values in (0, 1):  # losses, gradient norms
            assert [pair[values] for pair in ours] == pytest.approx([pair[values] for pair in stock], rel=1e-6)


def test_the_script_runs_as_its_first_lines_say():
    """Would catch: a command in the documentation that fails, or a model that does not learn."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), "--steps", "30"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step .*loss (\S+)  grad norm .*mean cosine", result.stdout, re.M)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
