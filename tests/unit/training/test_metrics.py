"""Lines of metrics.jsonl are what the reader accepts, whatever the numbers."""

import json
import math

import pytest
import torch

from megatron_moo.analysis import check_record, read_metrics
from megatron_moo.distributed import StepRecord
from megatron_moo.training import metrics
from tests.helpers.multiprocess import run_ranks


def _record(gram_BKK: torch.Tensor) -> StepRecord:
    """Two blocks of three objectives; the second has no gradient, and the third objective no rows."""
    return StepRecord(
        step=6,
        blocks=["a", "b"],
        gram_BHH=gram_BKK,
        objective_H=torch.tensor([0, 0, 1]),
        gram_BKK=gram_BKK,
        weights_BK=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).double(),
        active_BK=torch.tensor([[True, True, False], [True, True, False]]),
        preference_K=torch.tensor([0.5, 0.5, 0.0]).double(),
        count_K=torch.tensor([4, 4, 0]).double(),
    )


def _no_json(name: str) -> None:
    pytest.fail(f"{name} in the file, which is not JSON")


def test_a_line_with_every_kind_of_hole_is_read_back(tmp_path):
    """Would catch: NaN or infinity written as such, which is no JSON and stops every reader of the file."""
    gram = torch.tensor([[1.0, -0.5, 0], [-0.5, 2, 0], [0, 0, 0]]).double()
    record = _record(torch.stack([gram, torch.full_like(gram, math.nan)]))
    file = metrics.MetricsFile(tmp_path / "run" / "metrics.jsonl")
    sums = torch.tensor([[8.0, 4], [math.inf, 2], [0, 0]]).double()
    file.write("step", **metrics.step_fields(7, ["de", "en", "ru"], sums, 1e-3, math.nan))
    rows = metrics.block_rows(record)
    file.write("blocks", step=7, method="cagrad", granularity="layer", objectives=["de", "en", "ru"], blocks=rows)

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=_no_json) for line in text.splitlines()]
    for line in lines:
        check_record(line)
    step, blocks = read_metrics(tmp_path / "run" / "metrics.jsonl").steps[0], lines[1]["blocks"]
    assert step["objectives"]["de"] == {"loss": 2.0, "tokens": 4}
    assert step["objectives"]["ru"] == {"loss": None, "tokens": 0}
    assert step["grad_norm"] is None and "quarantined" not in step
    assert blocks[0]["conflict_share"] == 1.0 and blocks[0]["control_share"] == 1.0
    assert blocks[0]["cosine"][0][2] is None
    assert metrics.mean_of(rows, "conflict_share") is not None


def test_a_loss_that_is_not_finite_stays_its_languages_own(tmp_path):
    """Would catch: one language's NaN in the others' losses, in the loss over all tokens, or in the file."""
    losses = metrics.LossRecorder(3)
    for objective, total in ((0, 6.0), (1, math.nan), (1, 1.0), (2, 3.0)):
        losses.add(objective, torch.tensor(total), torch.tensor(3))
    fields = metrics.step_fields(4, ["de", "en", "ru"], losses.sums(), 1e-3, 1.0, ["en"])
    metrics.MetricsFile(tmp_path / "metrics.jsonl").write("step", **fields)
    step = read_metrics(tmp_path / "metrics.jsonl").steps[0]
    assert {name: cell["loss"] for name, cell in step["objectives"].items()} == {"de": 2.0, "en": None, "ru": 1.0}
    assert step["objectives"]["en"]["tokens"] == 6
    assert step["loss"] == 1.5 and step["quarantined"] == ["en"]
    assert metrics.step_fields(4, ["en"], torch.tensor([[math.nan, 2.0]]), 1e-3, 1.0)["loss"] is None


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    """Would catch: the first line after a resume glued to the rest of the last one before."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "event"}\n{"kind": "st')
    metrics.MetricsFile(path).write("event", name="resumed")
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["event", "event"]


def _reduced(rank: int) -> tuple[list, bool]:
    group = torch.distributed.group.WORLD
    losses = metrics.LossRecorder(3)
    for objective, total, tokens in ((rank, 2.0, 4), (rank, 1.0, 2), (2, 0.5, 1)):
        losses.add(objective, torch.tensor(total), torch.tensor(tokens))
    first = losses.reduce(group).tolist()
    return first, losses.reduce(group) is None


def test_losses_are_summed_per_language_over_ranks_and_start_afresh():
    """Would catch: a step's report that holds the step before, or one rank's languages alone."""
    for sums, empty in run_ranks(_reduced, 2):
        assert sums == [[3.0, 6.0], [3.0, 6.0], [1.0, 2.0]]
        assert empty
