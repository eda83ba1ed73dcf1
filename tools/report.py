"""Tables and plots of finished or running fine-tunings: python tools/report.py runs/cagrad runs/mean"""

import argparse
import sys

from rich.console import Console

from megatron_moo.analysis import (
    conflict_summary,
    conflict_table,
    evaluation_table,
    language_table,
    plot_run,
    read_run,
    validation_table,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, shown side by side")
    parser.add_argument("--split", help="show the languages of this split only (default: all)")
    parser.add_argument("--since", type=int, default=0, metavar="STEP", help="conflict statistics from this step on")
    parser.add_argument("--no-plots", action="store_true", help="do not draw into RUN/plots/")
    return parser.parse_args()


def report(options: argparse.Namespace, console: Console) -> None:
    """Prints the tables and draws the plots of all runs. Raises ValueError for malformed or missing files."""
    runs = [read_run(path) for path in options.runs]
    for run in runs:
        if run.metrics and run.metrics.blocks:
            console.print(conflict_table(conflict_summary(run.metrics, options.since)))
        else:
            console.print(f"{run.name}: no conflict statistics logged yet")
    if any(run.metrics and run.metrics.validations for run in runs):
        console.print(validation_table(options.runs))
    if any(run.evaluation for run in runs):
        console.print(language_table(options.runs, options.split))
        console.print(evaluation_table(options.runs))
    else:
        console.print("no run was evaluated yet")
    if not options.no_plots:
        for path in (path for run in runs if run.metrics for path in plot_run(run.path)):
            console.print(f"wrote {path}")


def main() -> int:
    try:
        console = Console()
        # A pipe or a file has no width of its own; 80 columns would fold the tables.
        report(parse(), console if console.is_terminal else Console(width=160))
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
