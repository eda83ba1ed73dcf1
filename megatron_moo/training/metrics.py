"""What a run writes while it trains: metrics.jsonl (schema in docs/metrics.md), TensorBoard scalars, a log line.

Legend: K objectives, B blocks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from megatron_moo.analysis import drop_unfinished_line
from megatron_moo.distributed import StepRecord


class LossRecorder:
    """Loss and tokens of every objective in the current step, summed on the device.

    A sum that is not finite is one objective's alone: sums are kept apart, and never multiplied by zero.
    """

    def __init__(self, num_objectives: int) -> None:
        self._num_objectives = num_objectives
        self._sums_K2: torch.Tensor | None = None

    def add(self, objective: int, loss_sum: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one micro-batch: the sum of its token losses, and how many tokens."""
        if self._sums_K2 is None:
            self._sums_K2 = torch.zeros(self._num_objectives, 2, dtype=torch.float64, device=loss_sum.device)
        self._sums_K2[objective] += torch.stack([loss_sum.detach(), tokens.detach().to(loss_sum)]).double()

    def sums(self) -> torch.Tensor | None:
        """This rank's sums so far, [K, 2]: token losses, tokens; None where no loss was seen (earlier stages)."""
        return self._sums_K2

    def clear(self) -> None:
        """Forget what was counted."""
        self._sums_K2 = None

    def reduce(self, group: dist.ProcessGroup) -> torch.Tensor | None:
        """Sums [K, 2] over a group, and start afresh; None where no loss was seen (earlier stages).

        Context-parallel ranks see parts of a sequence: with them, the group is data x context parallel.
        """
        sums, self._sums_K2 = self._sums_K2, None
        if sums is not None:
            dist.all_reduce(sums, group=group)
        return sums


def block_rows(record: StepRecord) -> list[dict[str, Any]]:
    """JSON rows of a stage's blocks; copies to the host, so only at logging intervals."""
    columns = {
        "cosine": record.cosine_BKK(),
        "norms": record.norm_BK(),
        "conflict_share": record.conflict_share_B(),
        "control_share": record.control_share_B(),
        "control_cosine": record.control_cosine_B(),
        "weights": record.weights_BK,
        "norm_ratio": record.norm_ratio_B(),
        "active": record.active_BK,
        "kkt_residual": record.kkt_residual_B,
        "gated_share": record.gated_share_B(),
    }
    lists = {name: _jsonable(tensor.tolist()) for name, tensor in columns.items() if tensor is not None}
    return [
        {"block": block} | {name: values[b] for name, values in lists.items()} for b, block in enumerate(record.blocks)
    ]


def gather_blocks(record: StepRecord, pp_group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Rows of all pipeline stages, first stage first; a block that lives on two stages appears once."""
    stages: list[Any] = [None] * pp_group.size()
    dist.all_gather_object(stages, block_rows(record), group=pp_group)
    rows: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for row in stage:
            rows.setdefault(row["block"], row)
    return list(rows.values())


def _jsonable(value: Any) -> Any:
    """Numbers rounded to six digits; NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        digits = ".3f" if abs(value) >= 1e5 else ".6g"  # clock times keep their milliseconds
        return float(format(value, digits)) if math.isfinite(value) else None
    return value


class MetricsFile:
    """Appends one JSON object per line, whole lines only."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_unfinished_line(path)  # a killed run may have left half of one
        self._file: TextIO = path.open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, **fields: Any) -> None:
        row = {"kind": kind} | _jsonable(fields)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")


def step_fields(
    iteration: int,
    objectives: list[str],
    sums_K2: torch.Tensor,
    learning_rate: float,
    grad_norm: Any,
    quarantined: Sequence[str] = (),
) -> dict[str, Any]:
    """The ``step`` line: losses, and who was left out of the step."""
    fields = {
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "lr": learning_rate,
    }
    return (
        loss_fields(iteration, objectives, sums_K2)
        | fields
        | ({"quarantined": list(quarantined)} if quarantined else {})
    )


def loss_fields(iteration: int, objectives: list[str], sums_K2: torch.Tensor) -> dict[str, Any]:
    """What a ``step`` and a ``validation`` line have in common: the loss over all tokens, and each objective's own.

    A loss that is not finite stays its objective's: the loss over all tokens is that of the others.
    """
    sums = sums_K2.tolist()
    finite = [(loss, n) for loss, n in sums if math.isfinite(loss)]
    tokens = sum(n for _, n in finite)
    return {
        "step": iteration,
        "time": time.time(),
        "loss": sum(loss for loss, _ in finite) / tokens if tokens else None,
        "objectives": {
            name: {"loss": loss / n if n else None, "tokens": int(n)}
            for name, (loss, n) in zip(objectives, sums, strict=True)
        },
    }


def mean_of(rows: list[dict[str, Any]], field: str) -> float | None:
    """Mean of a per-block number over the blocks that have it."""
    values = [row[field] for row in rows if row[field] is not None]
    return sum(values) / len(values) if values else None
