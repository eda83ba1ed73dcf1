"""What a step costs beside plain Megatron and two other ways to resolve conflicts, side by side in one run.

    python benchmarks/step.py                                   4 ranks, 1 and 2 waves: the project's promises, checked
    python benchmarks/step.py --profile 5 --no-others           where the time of ours goes
    python benchmarks/step.py --dp 2 4 8 --layers 2 --plot step.svg --out step.json
    unshare -rn sh -c 'ip link set lo up; python benchmarks/step.py --loopback'

Trains a GPT on random tokens with data parallelism, the distributed optimizer and overlapped gradient communication.
CPU: gloo, one process a rank, for every size of --dp. CUDA: NCCL, one rank a GPU; on one GPU K languages are K waves
(--waves 4). The variants, which all see the same samples:

  plain         Megatron as it is
  plain, a2a    Megatron's own reduce-scatter by all-to-all (--ddp-reduce-scatter-with-fp32-accumulation). On gloo the
                fairer rival: gloo's reduce-scatter sends twice what it must
  mean bucket   the exchange, combining by the mean: equal to plain
  METHOD ...    the exchange with --method, per bucket, layer, tensor and model
  K-pass        a forward/backward schedule per language over all ranks, each gradient all-reduced and kept whole on
                every rank, the whole model resolved there
  reconstruct   a backward pass per wave as ours, but every rank gathers all gradients and resolves the whole model
The last two are written on Megatron's model, buffers, overlap and optimizer (benchmarks/_step_variants.py says exactly
what they do); the run checks that they give the gradient of METHOD model, and `mean` that of plain.

What is measured:
  sent      bytes a rank sends for gradients, by collective (RS reduce-scatter, A2A all-to-all, AG all-gather, AR
            all-reduce), from the sizes of the tensors handed over, for algorithms that send no more than they must;
            `beyond`: what is not gradient vectors (for plain and ours, which sends them once a wave), and how much of
            that are inner products. The gather of parameters is the same for all and left out
  loopback  bytes per rank that really crossed the loopback, parameters included (--loopback). Give it a network of its
            own, as above, or it counts other programs too
  memory    MB: most live tensor bytes during the second step of a run of its own. Beyond plain's: kept after it, peak
            (plain's may lie elsewhere in the step), the peak in units of the largest bucket; RSS of the process
            (noisy; buffers inside gloo count here only). On CUDA the allocator's numbers
  time      variants take turns in the same processes, step by step, in changing order; the slowest rank counts. The
            ratio is to the mean of plain's two steps of the same turn; median, and a 95% interval of the median by
            order statistics (~: the range, where rounds are too few; the last two variants run in every third one
            only). CPU: seconds that all ranks together computed. On a shared machine trust CPU ratios first
  profile   (--profile N, extra steps) phases of a step; wall time on busy cores is mostly waiting for others
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from _report import machine, write_json
from _step_model import VOCAB, Settings
from _step_ranks import measure_memory, measure_steps, quiet
from _step_report import make_rows, plot, profile_table, tables, verdicts
from _step_variants import K_PASS, PLAIN, PLAIN_A2A, RECONSTRUCT, Variant
from rich.console import Console

from megatron_moo.aggregation import AGGREGATORS
from megatron_moo.distributed.config import GRANULARITIES

# What needs losses or random numbers would need them in the other ways, too.
METHODS = [name for name, method in AGGREGATORS.items() if not (method.needs_losses or method.random)]


def variants(method: str, granularities: Sequence[str], others: bool) -> list[Variant]:
    """Plain Megatron first; the mean needs one granularity, it does not depend on blocks."""
    ours = [Variant("mean", "bucket"), *(Variant(method, granularity) for granularity in granularities)]
    ways = [Variant(PLAIN), Variant(PLAIN_A2A), *dict.fromkeys(ours)]
    return ways + [Variant(K_PASS), Variant(RECONSTRUCT)] * others


def run_cell(settings: Settings, ways: Sequence[Variant]) -> list[dict[str, Any]]:
    """All variants with one number of ranks and waves: one row of the result each."""
    start_method = "spawn" if settings.cuda else "fork"  # CUDA does not survive a fork
    start = functools.partial(mp.start_processes, nprocs=settings.dp, start_method=start_method)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = replace(settings, directory=directory)
        start(measure_steps, args=(settings, ways))
        for way in ways:
            start(measure_memory, args=(settings, way))
        steps = json.loads(Path(directory, "steps.json").read_text())
        memory = {way.label: json.loads(Path(directory, f"memory {way.label}.json").read_text()) for way in ways}
    return make_rows(settings, ways, steps, memory)


def needed_bytes(settings: Settings, ways: Sequence[Variant]) -> int:
    """Roughly what all ranks hold while variants take turns: every model, and whole gradients of the last two."""
    elements = 12 * settings.hidden**2 * settings.layers + 2 * VOCAB * settings.hidden
    models = len(ways) * (8 + 12 / settings.dp)  # bytes an element: weight, gradient, optimizer's shard
    rows = 4 * (settings.waves - 1) * sum(way.ours for way in ways)
    whole = 4 * (settings.languages + settings.rows) * any(way.method == K_PASS for way in ways)
    return int(settings.dp * (elements * (models + rows + whole) + 400e6))


def free_bytes(cuda: bool) -> int | None:
    """Memory that is free now, where the system says."""
    if cuda:
        return torch.cuda.mem_get_info()[0] * torch.cuda.device_count()
    path = Path("/proc/meminfo")
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text, add = parser.add_argument, functools.partial(parser.add_argument, type=int, metavar="N")
    text("--out", type=Path, metavar="FILE.json", help="write every number there, times of all steps too")
    text("--plot", type=Path, metavar="FILE", help="draw bytes, memory and time (.svg or .png; needs matplotlib)")
    add("--dp", nargs="+", default=[4], help="numbers of ranks (default: 4; on CUDA always one a GPU)")
    add("--waves", nargs="+", default=[1, 2], help="forward/backward passes a step (default: 1 2)")
    add("--languages", help="K, at most ranks x waves (default: one for every row of the step)")
    text("--method", choices=METHODS, default="cagrad", help="measured beside the mean (default: %(default)s)")
    text(
        "--wave-memory",
        choices=("device", "host"),
        default="device",
        help="for rows of earlier waves (default: device)",
    )
    text("--granularities", nargs="*", choices=GRANULARITIES, default=list(GRANULARITIES), help="default: all four")
    text("--others", action=argparse.BooleanOptionalAction, default=True, help="K-pass and reconstruct (default: yes)")
    add("--hidden", default=512, help="hidden size (default: %(default)s)")
    add("--layers", default=2, help="transformer layers (default: %(default)s)")
    add("--seq-length", default=128, help="tokens of a sample (default: %(default)s)")
    add("--micro-batch-size", default=1, help="samples of a micro-batch (default: %(default)s)")
    add("--micro-batches", default=8, help="of a rank in a step; W waves divide them (default: %(default)s)")
    add("--bucket-size", default=1_000_000, help="gradient elements of a bucket (default: %(default)s)")
    add("--rounds", default=9, help="timed steps of each variant (default: %(default)s)")
    add("--profile", default=0, help="steps of each variant to profile by phase (default: none)")
    text("--loopback", action="store_true", help="also count what really crosses the loopback (CPU)")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        args.dp = [torch.cuda.device_count()]
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    names = "waves dp hidden layers seq_length micro_batch_size micro_batches bucket_size rounds".split()
    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if args.hidden % max(1, args.hidden // 64):
        parser.error(f"--hidden must be below 128 or a multiple of 64 (heads of 64), found {args.hidden}")
    for waves in args.waves:
        if args.micro_batches % waves:
            parser.error(f"--micro-batches must be a multiple of every --waves, found {args.micro_batches} and {waves}")
    rows = min(args.dp) * min(args.waves)
    if args.languages is not None and not 1 <= args.languages <= rows:
        parser.error(f"--languages must be from 1 to ranks x waves, {rows} at the least here; found {args.languages}")
    if args.profile < 0:
        parser.error(f"--profile must be at least 0, found {args.profile}")


def _settings(args: argparse.Namespace, dp: int, waves: int, cuda: bool) -> Settings:
    names = (
        "method wave_memory hidden layers seq_length micro_batch_size micro_batches bucket_size rounds profile".split()
    )
    same = {name: getattr(args, name) for name in names}
    return Settings(
        dp=dp,
        waves=waves,
        languages=args.languages or dp * waves,
        loopback=args.loopback and not cuda,
        cuda=cuda,
        **same,
    )


def _report(rows: list[dict[str, Any]], profiled: bool, console: Console) -> list[dict[str, Any]]:
    size = f"{rows[0]['parameters'] / 1e6:.1f} M parameters, {rows[0]['gradient_bytes'] / 1e6:.1f} MB of gradients"
    console.print(f"{size}, largest bucket {rows[0]['largest_bucket_bytes'] / 1e6:.2f} MB", highlight=False)
    for table in tables(rows):
        console.print(table)
    if profiled:
        for where in dict.fromkeys((row["dp"], row["waves"]) for row in rows):
            console.print(profile_table([row for row in rows if (row["dp"], row["waves"]) == where]))
    found = verdicts(rows)
    for verdict in found:
        met = {True: "met", False: "NOT MET", None: "open"}[verdict["met"]]
        console.print(f"{met:8}{verdict['goal']}: {verdict['found']}", highlight=False, soft_wrap=True)
    return found


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available()
    quiet()
    if not cuda:
        import megatron.training.training  # noqa: F401  forked ranks have it imported already
    console = Console()
    if not console.is_terminal:
        console.width = 140
    versions = {"megatron-core": importlib.metadata.version("megatron-core")}
    where, rows = machine(cuda, backend="nccl" if cuda else "gloo", **versions), []
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), highlight=False)
    ways = variants(args.method, args.granularities, args.others)
    for dp in args.dp:
        for waves in args.waves:
            settings, start = _settings(args, dp, waves, cuda), time.monotonic()
            needed, free = needed_bytes(settings, ways), free_bytes(cuda)
            if free is not None and needed > free:
                raise SystemExit(
                    f"{dp} ranks and {waves} waves need about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free: "
                    "they would be killed halfway; take fewer --layers, --dp or --waves, or --no-others"
                )
            rows += run_cell(settings, ways)
            took = time.monotonic() - start
            console.print(f"{dp} ranks, {waves} waves, {settings.languages} languages: {took:.0f} s", highlight=False)
    found = _report(rows, args.profile > 0, console)
    if args.plot:
        plot(rows, args.plot)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
        write_json(args.out, {"machine": where, "settings": settings, "rows": rows, "verdicts": found})
    for path in filter(None, (args.plot, args.out)):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
