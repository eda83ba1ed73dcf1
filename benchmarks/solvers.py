"""The aggregators against torchjd, block by block, and against LibMTL: time and accuracy, in one run.

    python benchmarks/solvers.py --out runs/bench/solvers.json
    python benchmarks/solvers.py --blocks 200 --objectives 16 --methods mgda pcgrad --budget 2

Both get the same float64 Gramians, on the CPU. Ours solves all B blocks in one call; torchjd takes one at a time. The
rows are built to be easy on public code: no zero rows, no dependent ones, no gradient too small for its thresholds.

What is measured:
  ms          one call for all blocks, after a warm-up, median of rounds in which ours and torchjd take turns. A loop
              that takes longer than --budget is timed on fewer blocks and scaled up: marked ~
  x           torchjd's time over ours
  LibMTL      per block, if it is importable: its methods start from gradients, so this holds the inner products, of
              short rows (2K + 8 elements), too. Its PyPI release (1.1.5) can be had by `pip install --no-deps LibMTL`
  KKT         how far optimality conditions are from holding; mgda, cagrad: duality gap over the value (cagrad: over the
              size of its terms; ours solves with a noise of 1e-6 of each row's length, which shows here); dualproj:
              worst of primal and dual feasibility and complementarity; upgrad: feasibility; nash-mtl, fairgrad: spread
              of (Gw)_k w_k^(1/alpha); imtl-g, config: spread of the cosines
  excess      of the objective over a certified lower bound (mgda, cagrad) or over scipy's active-set solution
              (dualproj), relative; upgrad: distance of the direction from the exact one, relative to its length
  cosine      min_k cos(g_k, d): negative means that the update hurts somebody
Accuracy is the mean over the first 8 blocks, the first call of each; the JSON holds the worst cosine, too.

--threads is torch's own number unless given (`make bench` sets it to 1). On a shared machine use 1: a second thread
that has to wait for a core costs milliseconds at each of many small steps.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import machine, write_json
from _solvers_cases import ACCURACY_BLOCKS, DESCRIPTION, Answer, Case, accuracy, make_case
from _solvers_peers import LibMTL, Solve, torchjd_maker
from _solvers_tables import accuracy_table, time_table, verdicts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megatron_moo.aggregation import AGGREGATORS, Aggregator, build_aggregator

_ROUNDS = (3, 15)  # of one cell: at least, at most


class Loop:
    """Another library's solver of one method and one K: an instance for each block, since some keep state."""

    def __init__(self, make: Callable[[int], Solve], case: Case) -> None:
        self._make, self._objectives = make, case.gram_BKK.shape[1]
        # Tensors are cut up here: taking one block of a batch is not the solver's work.
        pairs = zip(case.rows_BKN.unbind(), case.gram_BKK.unbind(), strict=True)
        self.blocks = [(make(self._objectives), rows, gram) for rows, gram in pairs]

    def __call__(self, count: int) -> list[Tensor]:
        """Answers for the first blocks, one after the other."""
        return [solve(rows, gram) for solve, rows, gram in self.blocks[:count]]

    def first_call(self, count: int) -> tuple[Tensor, float]:
        """Weights [A, K] of the first blocks, and the seconds a block takes."""
        self._make(self._objectives)(*self.blocks[0][1:])  # imports and caches, without touching the blocks' state
        seconds, answers = _timed(lambda: self(count))
        weights = [_as_weights(answer, rows) for answer, (_, rows, _) in zip(answers, self.blocks, strict=False)]
        return torch.stack(weights), seconds / count


def _as_weights(answer: Tensor, rows_KN: Tensor) -> Tensor:
    """Weights [K] of a direction [N] (rows are independent, N > K); weights are left as they are."""
    answer = answer.double()
    if len(answer) == len(rows_KN):
        return answer
    return torch.linalg.lstsq(rows_KN.T, answer[:, None]).solution[:, 0]


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _ours(method: Aggregator, case: Case, blocks: int) -> Callable[[], Tensor]:
    """One call for the first blocks."""
    gram, losses = case.gram_BKK[:blocks], case.losses_BK[:blocks]
    generator = torch.Generator().manual_seed(0) if method.random else None
    extra = {"losses_K": losses} if method.needs_losses else {}
    return lambda: method(gram, generator=generator, **extra)


def time_cell(ours: Callable[[], Tensor], loop: Loop | None, blocks: int, per_block: float, budget: float) -> dict:
    """Seconds of both for all blocks, taking turns."""
    ours()
    rough, _ = _timed(ours)
    count = max(1, min(blocks, int(budget / _ROUNDS[0] / per_block))) if loop else 0
    low, high = _ROUNDS
    rounds = max(low, min(high, int(budget / (rough + count * per_block))))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        seconds[0].append(_timed(ours)[0])
        if loop:
            seconds[1].append(_timed(lambda: loop(count))[0] * blocks / count)
    row = {"rounds": rounds, "ours_seconds": statistics.median(seconds[0]), "ours_best": min(seconds[0])}
    row["ours_quartiles"] = _quartiles(seconds[0])
    row |= {"torchjd_seconds": None, "torchjd_blocks_timed": count, "extrapolated": 0 < count < blocks, "ratio": None}
    if loop:
        row["torchjd_seconds"] = statistics.median(seconds[1])
        row["torchjd_quartiles"] = _quartiles(seconds[1])
        row["ratio"] = row["torchjd_seconds"] / row["ours_seconds"]
    return row


def _quartiles(seconds: Sequence[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive")


class Run:
    """All cells; the results are filled in as it goes.

    Attributes:
        times: one row a method, B and K.
        accuracies: one row a method and K.
        notes: what the reader must know of a method's counterpart.
    """

    def __init__(self, methods: Sequence[str], blocks: Sequence[int], budget: float, seed: int) -> None:
        self.methods, self.blocks, self.budget, self.seed = methods, blocks, budget, seed
        self.libmtl = LibMTL()
        self.times: list[dict[str, Any]] = []
        self.accuracies: list[dict[str, Any]] = []
        self.notes: dict[str, str] = {}

    def measure(self, objectives: int, done: Callable[[], None]) -> None:
        """All methods and numbers of blocks, for one K; ``done`` is called after each cell."""
        case = make_case(objectives, max(*self.blocks, ACCURACY_BLOCKS), self.seed)
        for name in self.methods:
            settings = build_aggregator(name).settings
            make, note = torchjd_maker(name, settings)
            if note not in ("", "none"):
                self.notes[name] = note
            maker = self.libmtl.maker(name, settings)
            loop, answer, per_block = self._loop(name, "torchjd", make, case)
            libmtl, libmtl_answer, libmtl_seconds = self._loop(name, "LibMTL", maker, case)
            answers = {"ours": Answer(self._weights(name, case), 1 + settings["c"] if name == "cagrad" else 1.0)}
            answers |= {"torchjd": Answer(answer)} if loop else {}
            row = {"method": name, "objectives": objectives, "ours": None, "torchjd": None}
            row |= accuracy(name, case, answers, settings)
            row["libmtl_seconds_per_block"] = libmtl_seconds if libmtl else None
            if libmtl:  # in units of its own: only the direction compares
                row["libmtl"] = accuracy("mean", case, {"libmtl": Answer(libmtl_answer)}, {})["libmtl"]
            self.accuracies.append(row)
            for blocks in self.blocks:
                ours = _ours(build_aggregator(name), case, blocks)
                cell = time_cell(ours, loop, blocks, per_block, self.budget)
                missing = "" if loop else self.notes.get(name, "none")
                self.times.append({"method": name, "blocks": blocks, "objectives": objectives, "why": missing} | cell)
                done()

    def _weights(self, name: str, case: Case) -> Tensor:
        return _ours(build_aggregator(name), case, ACCURACY_BLOCKS)()

    def _loop(
        self, name: str, library: str, make: Callable[[int], Solve] | None, case: Case
    ) -> tuple[Loop | None, Tensor, float]:
        """Another library's solvers, their answers, and seconds per block; no loop if there is none or it fails."""
        if make is None:
            return None, torch.empty(0), 1.0
        torch.manual_seed(self.seed)  # torchjd draws from the global state
        try:
            loop = Loop(make, case)
            return loop, *loop.first_call(ACCURACY_BLOCKS)
        except Exception as error:  # their code, any input: report it and go on
            why = f"{type(error).__name__} at K = {case.gram_BKK.shape[1]}: {str(error).strip().partition(chr(10))[0]}"
            if library == "torchjd":
                self.notes[name] = why
            else:
                self.libmtl.reasons[name] = why
            return None, torch.empty(0), 1.0


def installed() -> dict[str, str | None]:
    """Versions of what is compared with, and of what it needs."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "torchjd", "numpy", "scipy", "cvxpy", "clarabel", "quadprog"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="write every number there")
    add("--blocks", nargs="+", type=int, default=[1, 32, 200], help="numbers of blocks (default: 1 32 200)")
    sizes = [4, 8, 16, 32, 64]
    add("--objectives", nargs="+", type=int, default=sizes, help="numbers of objectives (default: 4 8 16 32 64)")
    add("--methods", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS), help="default: all")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    add("--budget", type=float, default=0.5, help="seconds of a cell's loop, roughly (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the rows and of torchjd's random orders (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(*args.blocks, args.threads) < 1 or min(args.objectives) < 2 or args.budget <= 0:
        parser.error(
            "--blocks and --threads must be at least 1, --objectives at least 2 and --budget above 0, found "
            f"{args.blocks}, {args.threads}, {args.objectives} and {args.budget}"
        )
    return args


def measure_all(args: argparse.Namespace) -> Run:
    """All cells, with progress on stderr."""
    run = Run(args.methods, args.blocks, args.budget, args.seed)
    stderr = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    total = len(args.objectives) * len(args.methods) * len(args.blocks)
    start = time.monotonic()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for objectives in args.objectives:
            progress.update(task, description=f"K = {objectives}")
            run.measure(objectives, lambda: progress.advance(task))
            if not stderr.is_terminal:
                stderr.print(f"K = {objectives} done after {time.monotonic() - start:.0f} s", highlight=False)
    return run


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # other libraries' habits
    where = machine(versions=installed())
    run = measure_all(args)
    console = Console()
    if not console.is_terminal:
        console.width = 120

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(f"{', '.join(f'{key} {value}' for key, value in where.items() if key != 'versions')}")
    say(", ".join(f"{key} {value or 'not installed'}" for key, value in where["versions"].items()))
    say(f"LibMTL: {run.libmtl.how}\nBlocks: {DESCRIPTION}\n")
    libmtl = run.libmtl.found
    console.print(time_table(run.times, run.accuracies, marked=run.notes, libmtl=libmtl))
    for name, note in run.notes.items():
        say(f"† torchjd, {name}: {note}")
    for name, note in run.libmtl.reasons.items():
        say(f"LibMTL, {name}: {note}")
    console.print()
    console.print(accuracy_table(run.accuracies, libmtl=libmtl))
    results = verdicts(run.times)
    for row in results:
        met = {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        say(f"{met}: {row['target']}" + (f": {row['found']}" if row["found"] else ""))
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        report = {"machine": where, "settings": settings, "blocks": DESCRIPTION, "libmtl": run.libmtl.how}
        report |= {"notes": {"torchjd": run.notes, "libmtl": run.libmtl.reasons}, "times": run.times}
        report |= {"accuracy": run.accuracies, "verdicts": results}
        write_json(args.out, report)
        say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
