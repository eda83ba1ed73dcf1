"""What a run directory says: readers, conflict statistics, plots and tables.

    from megatron_moo.analysis import conflict_summary, evaluation_table, plot_run, read_metrics

    metrics = read_metrics("runs/cagrad/metrics.jsonl")
    conflict_summary(metrics).total                     # (between languages, same-language control)
    plot_run("runs/cagrad")                             # PNGs into runs/cagrad/plots/
    rich.print(evaluation_table(["runs/cagrad", "runs/mean"]))

docs/metrics.md describes the files. Nothing here needs torch or Megatron, so runs can be read on any machine.
"""

from megatron_moo.analysis.evaluation import (
    evaluation_table,
    language_scores,
    language_table,
    split_score,
    validation_table,
)
from megatron_moo.analysis.plots import plot_run
from megatron_moo.analysis.reader import (
    Metrics,
    Run,
    drop_unfinished_line,
    read_evaluation,
    read_metrics,
    read_run,
)
from megatron_moo.analysis.schema import check_evaluation, check_record
from megatron_moo.analysis.summary import (
    BlockSeries,
    ConflictSummary,
    block_series,
    conflict_summary,
    conflict_table,
)

__all__ = [
    "BlockSeries",
    "ConflictSummary",
    "Metrics",
    "Run",
    "block_series",
    "check_evaluation",
    "check_record",
    "conflict_summary",
    "conflict_table",
    "drop_unfinished_line",
    "evaluation_table",
    "language_scores",
    "language_table",
    "plot_run",
    "read_evaluation",
    "read_metrics",
    "read_run",
    "split_score",
    "validation_table",
]
