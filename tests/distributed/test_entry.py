"""`megatron_moo.finetune` from its command line: equal to stock where nothing is combined, resumable bit for bit, and
what a run leaves behind."""

import json
import os
import signal
from collections.abc import Callable

import pytest

from megatron_moo.analysis import plot_run, read_metrics, read_run
from tests.helpers.entry import LANGUAGES, differing, entry_argv, entry_main, prepare_data, run_entry, weights

STEPS, STOP = 5, 3
DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three languages, tokenised as bytes."""
    return prepare_data(tmp_path_factory.mktemp("data"))


# Ranks, sizes, flags. Interleaved: three waves on one slot, two micro-batches each. Experts: two slots of two
# data-parallel ranks, two waves.
LAYOUTS = {
    "tokens": (4, {"tp": 2}, "--calculate-per-token-loss --overlap-grad-reduce"),
    "slots": (4, {"tp": 2}, "--overlap-grad-reduce"),
    "interleaved": (
        2,
        {"pp": 2},
        "--num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --calculate-per-token-loss --overlap-grad-reduce "
        "--global-batch-size 12 --eval-interval 2 --eval-iters 1 --moo-eval-rows ROWS --moo-eval-new-tokens 2",
    ),
    "experts": (
        4,
        {},
        "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 --no-bias-gelu-fusion "
        "--calculate-per-token-loss --global-batch-size 16 --moo-eval-rows ROWS --moo-eval-new-tokens 2",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_trains_like_off(data, layout):
    """Would catch: waves, token counts, virtual stages or the peers of a slot that the entry hands to Megatron
    otherwise than stock does, and reports that are summed otherwise."""
    ranks, sizes, flags = LAYOUTS[layout]
    flags = flags.replace("ROWS", str(data.parent / "rows" / "test")).split()
    argv = {method: entry_argv(data, "--moo-method", method, *flags, **sizes) for method in ("off", "mean")}
    off, mean = (run_entry(argv[method], ranks) for method in argv)
    for stock, ours in zip(off, mean, strict=True):
        assert len(stock.grad_norms) == len(ours.grad_norms) == 4
        assert ours.losses == pytest.approx(stock.losses, rel=1e-6)
        assert ours.grad_norms == pytest.approx(stock.grad_norms, rel=1e-6)
    assert len(mean[-1].losses) == 4


def test_a_rotating_subset(data, tmp_path):
    """Would catch: a step of other languages than the sampler's subset, or waves for all of them."""
    flags = ("--moo-method", "mgda", "--moo-active", "2", "--moo-run-dir", str(tmp_path / "run"))
    run_entry(entry_argv(data, *flags, "--moo-check-assignment"), 2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["waves"], config["slots"], config["moo"]["active"]) == (1, 2, 2)
    run = read_run(tmp_path / "run")
    seen = [{name for name, cell in step["objectives"].items() if cell["tokens"]} for step in run.metrics.steps]
    assert [len(languages) for languages in seen] == [2] * 4
    assert seen[0] | seen[1] | seen[2] == set(LANGUAGES)
    for languages, record in zip(seen, run.metrics.blocks, strict=True):
        active = [name in languages for name in LANGUAGES]
        assert all(block["active"] == active for block in record["blocks"])


def _signalled(number: signal.Signals, ranks: tuple[int, ...]) -> Callable[[], None]:
    """The entry, which `number` reaches on `ranks` while step STOP runs."""

    def main() -> None:
        from megatron.training import training

        stock, steps = training.train_step, []

        def train_step(*args, **kwargs):
            steps.append(None)
            if len(steps) == STOP and int(os.environ["RANK"]) in ranks:
                os.kill(os.getpid(), number)
            return stock(*args, **kwargs)

        training.train_step = train_step
        entry_main()

    return main


INTERVAL = ("--exit-interval", str(STOP))
SIGNALS = ("--exit-signal-handler",)
WRAPPED = "gradvac --moo-noise-smoothing 0.5 --moo-noise-unbiased yes --moo-smooth-decay 0.5 --moo-every-n 2"
RESUMED = {
    "gradvac-tp2-interval": ("gradvac", 2, 1, INTERVAL, entry_main),
    "pcgrad-tp2-sigterm": ("pcgrad", 2, 1, SIGNALS, _signalled(signal.SIGTERM, (1,))),
    "wrapped-gradvac-pp2-sigint": (WRAPPED, 1, 2, SIGNALS, _signalled(signal.SIGINT, (0, 1, 2, 3))),
    "famo-pp2-interval": ("famo", 1, 2, INTERVAL, entry_main),
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_run_ends_bit_for_bit_alike(data, tmp_path, case):
    """Would catch: aggregator state, random orders, dropout masks, data order or optimizer state lost at a stop."""
    method, tp, pp, flags, stopped_main = RESUMED[case]
    common = ("--moo-method", *method.split(), "--moo-granularity", "tensor", *DROPOUT, "--calculate-per-token-loss")

    def argv(name: str, *extra: str) -> list[str]:
        return entry_argv(data, *common, "--moo-run-dir", str(tmp_path / name), *extra, tp=tp, pp=pp, steps=STEPS)

    whole = run_entry(argv("whole"), 4, inspect=weights)
    stopped = run_entry(argv("stopped", *flags), 4, main=stopped_main)
    assert [trace.exit_code for trace in stopped] == [0] * 4
    assert [len(trace.grad_norms) for trace in stopped] == [STOP] * 4
    resumed = run_entry(argv("stopped", *flags), 4, inspect=weights)
    for rank, (one, first, second) in enumerate(zip(whole, stopped, resumed, strict=True)):
        assert first.grad_norms + second.grad_norms == one.grad_norms, rank
        assert differing(one.inspected, second.inspected) == [], rank
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    for of in ("steps", "blocks"):
        one, two = ([record | {"time": 0} for record in getattr(metrics, of)] for metrics in lines)
        assert [record["step"] for record in two] == list(range(1, STEPS + 1))
        assert one == two


def test_a_run_directory_holds_what_a_person_needs(data, tmp_path):
    """Would catch: a file of the run directory missing, malformed or empty."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, rows = tmp_path / "run", data.parent / "rows" / "test"
    flags = ("--moo-method", "cagrad", "--moo-granularity", "tensor", "--calculate-per-token-loss")
    flags += ("--moo-run-dir", str(run_dir), "--moo-log-interval", "2", "--moo-waves", "3", "--global-batch-size", "12")
    flags += ("--eval-interval", "2", "--eval-iters", "1")
    flags += ("--moo-eval-rows", str(rows), "--moo-eval-new-tokens", "3")
    run_entry(entry_argv(data, *flags), 2)

    assert json.loads((run_dir / "config.json").read_text())["moo"]["method"] == "cagrad"
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
    run = read_run(run_dir)  # checks every line
    assert run.method == "cagrad"
    assert [record["step"] for record in run.metrics.steps] == [1, 2, 3, 4]
    assert [record["step"] for record in run.metrics.blocks] == [2, 4]
    assert run.metrics.objectives == list(LANGUAGES)
    # Six rows, three languages: everybody has two, so there is a same-language control in each block.
    assert all(block["control_share"] is not None for record in run.metrics.blocks for block in record["blocks"])
    assert {len(tasks["count"]) for tasks in run.evaluation["splits"]["test"].values()} == {2}

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for lang in LANGUAGES:
        assert [event.step for event in events.Scalars(f"loss/{lang}")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("moo/conflict_share")] == [2, 4]
    assert {event.step for event in events.Scalars("lm loss validation")} == {2, 4}
    assert {path.name for path in plot_run(run_dir)} == {"loss_per_language.png", "conflict_heatmap.png", "weights.png"}
