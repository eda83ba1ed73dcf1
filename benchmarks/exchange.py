"""The exchange against stock Megatron: bytes, memory and time of a step, side by side in one run.

    python benchmarks/exchange.py --out runs/bench/exchange.json
    unshare -rn sh -c 'ip link set lo up; python benchmarks/exchange.py --loopback'

Trains a GPT on random tokens with data parallelism, the distributed optimizer and overlapped gradient communication:
once as stock Megatron (reduce-scatter), and with the exchange as `mean` and as --method per bucket, layer and model.
All see the same data; with W waves stock Megatron accumulates the same micro-batches in one pass. CPU: gloo, one
process a rank, in every size of --dp. CUDA: nccl, one rank a GPU.

What is measured, of one optimizer step (the mean over ranks of bytes and memory, the slowest rank of time):
  sent      bytes a rank sends, from the sizes of the tensors handed to each collective, for algorithms that send no
            more than they must
  loopback  bytes per rank that really crossed the loopback (--loopback): gloo's reduce-scatter sends more. Give it a
            network of its own, as above, or it counts other programs too
  kept      live tensor bytes after two steps, over stock Megatron's: receive buffer and rows of earlier waves
  peak      most live tensor bytes during the second step, over stock Megatron's (whose peak may lie elsewhere in the
            step: less than `kept` is possible)
  RSS       peak resident memory of a rank, over stock Megatron's (noisy; buffers inside gloo count here only)
  time      the variants take turns in the same processes, step by step; median and quartiles, and the median of the
            ratios to stock Megatron's step of the same turn. On a shared machine trust the ratio, and that only roughly
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from _exchange_ranks import STOCK, Settings, Variant, measure_memory, measure_steps, quiet
from _report import machine, write_json
from rich.console import Console
from rich.table import Table

from megatron_moo.aggregation import AGGREGATORS

GRANULARITIES = ("bucket", "layer", "model")
METHODS = [name for name, method in AGGREGATORS.items() if not method.needs_losses]


def variants(method: str) -> list[Variant]:
    """Stock Megatron first; the mean needs one granularity, it does not depend on blocks."""
    return [Variant(STOCK), Variant("mean", "bucket"), *(Variant(method, granularity) for granularity in GRANULARITIES)]


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
        memory = {way.label: json.loads(Path(directory, f"memory-{way.label}.json").read_text()) for way in ways}
    stock_seconds, stock_memory = steps[STOCK]["seconds"], memory[STOCK]
    rows = []
    for way in ways:
        seconds = steps[way.label]["seconds"]
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        rows.append(
            {"dp": settings.dp, "waves": settings.waves, "variant": way.label}
            | steps[way.label]
            | {f"extra_{key}": value - stock_memory[key] for key, value in memory[way.label].items()}
            | {"peak": memory[way.label]["peak"], "median_seconds": quartiles[1], "quartiles": quartiles}
            | {"ratio": statistics.median(a / b for a, b in zip(seconds, stock_seconds, strict=True))}
        )
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """The result for people. MB is 10^6 bytes."""
    loopback = "loopback" in rows[0]
    heads = ["reduce-scatter", "all-to-all", "all-gather", "all-reduce kB"] + ["loopback"] * loopback
    wire = _table("Sent by a rank in a step, in MB", ["blocks", *heads])
    cost = _table(
        "More than stock Megatron: memory of a rank; and the time of a step",
        ["kept MB", "peak MB", "RSS MB", "step ms", "quartiles", "ratio"],
    )
    last = None
    for row in rows:
        if last not in (None, (row["dp"], row["waves"])):
            wire.add_section()
            cost.add_section()
        last = row["dp"], row["waves"]
        stock, sent = row["variant"] == STOCK, row["sent"]
        first = [str(row["dp"]), str(row["waves"]), row["variant"]]
        names = ("reduce_scatter_tensor", "all_to_all_single", "all_gather_into_tensor")
        numbers = [f"{sent[name] / 1e6:.2f}" if name in sent else "-" for name in names]
        numbers += [f"{sent.get('all_reduce', 0) / 1e3:.2f}"] + [f"{row.get('loopback', 0) / 1e6:.2f}"] * loopback
        wire.add_row(*first, "-" if stock else str(row["blocks"]), *numbers)
        memory = ["-" if stock else f"{row[f'extra_{key}'] / 1e6:+.2f}" for key in ("live", "peak", "rss")]
        low, middle, high = (f"{1e3 * value:.0f}" for value in row["quartiles"])
        cost.add_row(*first, *memory, middle, f"{low}-{high}", f"{row['ratio']:.2f}")
    yield from (wire, cost)


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, header_style="bold", title_justify="left")
    for name in ("DP", "waves", "variant", *heads):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=int)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write every number there, times of all steps too"
    )
    add("--dp", nargs="+", default=[2, 4], help="numbers of ranks, on the CPU (default: 2 4)")
    add("--waves", nargs="+", default=[1, 2], help="forward/backward passes a step (default: 1 2)")
    parser.add_argument(
        "--method", choices=METHODS, default="cagrad", help="measured beside the mean (default: %(default)s)"
    )
    add("--hidden", default=256, help="hidden size (default: %(default)s)")
    add("--layers", default=4, help="transformer layers (default: %(default)s)")
    add("--seq-length", default=16, help="tokens of a sample; few, so that communication shows (default: %(default)s)")
    add("--micro-batch-size", default=1, help="samples of a micro-batch, one a wave (default: %(default)s)")
    add("--bucket-size", default=1_000_000, help="gradient elements of a bucket (default: %(default)s)")
    add("--rounds", default=9, help="timed steps of each variant (default: %(default)s)")
    parser.add_argument("--loopback", action="store_true", help="also count what really crosses the loopback (CPU)")
    args = parser.parse_args(argv)
    smallest = min(*args.dp, *args.waves, args.hidden, args.layers, args.rounds)
    if smallest < 1:
        parser.error(f"--dp, --waves, --hidden, --layers and --rounds must be at least 1, found {smallest}")
    if args.hidden % max(1, args.hidden // 64):
        parser.error(f"--hidden must be below 128 or a multiple of 64 (heads of 64), found {args.hidden}")
    return args


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available()
    quiet()
    if not cuda:
        import megatron.training.training  # noqa: F401  forked ranks have it imported already
    console = Console()
    if not console.is_terminal:
        console.width = 120
    versions = {"megatron-core": importlib.metadata.version("megatron-core")}
    where, rows = machine(cuda, backend="nccl" if cuda else "gloo", **versions), []
    for dp in [torch.cuda.device_count()] if cuda else args.dp:
        for waves in args.waves:
            console.print(f"{dp} ranks, {waves} waves ...", highlight=False)
            shape = {name: getattr(args, name) for name in ("hidden", "layers", "seq_length", "micro_batch_size")}
            shape |= {"bucket_size": args.bucket_size, "rounds": args.rounds, "loopback": args.loopback and not cuda}
            rows += run_cell(Settings(dp=dp, waves=waves, **shape, cuda=cuda, directory=""), variants(args.method))
    size = f"{rows[0]['parameters'] / 1e6:.1f} M parameters, {rows[0]['gradient_bytes'] / 1e6:.1f} MB of gradients"
    console.print(f"{size}; {', '.join(f'{key} {value}' for key, value in where.items())}", highlight=False)
    for table in tables(rows):
        console.print(table)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        write_json(args.out, {"machine": where, "settings": settings, "rows": rows})
        console.print(f"wrote {args.out}", highlight=False)


if __name__ == "__main__":
    main()
