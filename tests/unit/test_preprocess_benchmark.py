"""The benchmark of preprocessing: that it runs, and that both ways do the same work."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.preparing import fork

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The module, with ways that are forked: a fresh process takes seconds to import Megatron."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _preprocess_ways as ways
    import megatron.core.datasets.indexed_dataset
    import megatron.core.tokenizers  # noqa: F401
    import preprocess

    fresh = preprocess.run

    def forked(way, data, tokenizer, out, args, sample=False):
        if sample:  # memory is that of a fresh process
            return fresh(way, data, tokenizer, out, args, sample)
        shutil.rmtree(out, ignore_errors=True)
        arguments = [way, data, tokenizer, out, args.workers, args.shard_mb]

        def work() -> int:
            sys.argv = ["ways", *map(str, arguments)]
            return ways.main()

        code, log = fork(work, tmp_path.parent / f"{way}.log").wait()
        assert code == 0, log
        return json.loads(log.splitlines()[-1])

    monkeypatch.setattr(preprocess, "run", forked)
    yield preprocess
    del sys.modules["preprocess"]  # tools/ has one of this name


def test_a_tiny_run(benchmark, tmp_path, monkeypatch, capsys):
    """Catches: a benchmark that broke with what it measures, ways whose tokens differ, a JSON without its numbers."""
    out = tmp_path / "preprocess.json"
    options = "--mb 1 --rounds 1 --vocabulary 600 --shard-mb 0.3 --memory 1".split()
    monkeypatch.setattr(sys, "argv", ["preprocess", *options, "--folder", str(tmp_path), "--out", str(out)])
    assert benchmark.main() == 0
    report = json.loads(out.read_text())
    speed, (memory,) = report["speed"], report["memory"]
    assert speed["tokens"] > speed["documents"] > 0 and speed["bytes"] >= 10**6
    assert set(speed["median_seconds"]) == {"ours", "megatron"} and speed["median_ratio"] > 0
    assert memory["peak_bytes"] > 10**7
    printed = capsys.readouterr().out
    assert "token files are equal" in printed and "peak MB" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["preprocess.json"]
