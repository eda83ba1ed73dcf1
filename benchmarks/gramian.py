"""The Gramian of a shard: our one pass, a loop over segments, one plain product, and a mere read, in one run.

    python benchmarks/gramian.py --out runs/bench/gramian.json
    python benchmarks/gramian.py --device cuda --elements 100000000

One shard of N elements, rows of fp32 and of bf16, cut into blocks in several ways:
  one block     granularity model
  layers        a GPT's layers (a dozen tensors each), a block per layer
  tensors       the same, a block per tensor
  adapters      norms and low-rank adapters alone: short tensors throughout, a block per tensor

What is measured, medians of rounds (--fastest: minima) in which all ways take turns; nothing is reduced over ranks:
  read    a sum over the bytes of the rows: what memory allows
  plain   rows @ rows.T, one product for the whole shard, so without blocks; bf16 rows are made fp32 first
  bf16    the same in bf16, result too: what rounding costs
  loop    a product per segment, as our code once was
  ours    megatron_moo.distributed.gramian.ShardGramian
  GB/s    bytes of the rows over our time
Where there are more rows than half rows (R > H) ours and the loop fold them first; plain does not.

Errors are against fp64, the worst over blocks and pairs of |<x, y> - exact| / (|x| |y|): what a cosine is off by.
On a shared machine trust ratios, and those only roughly; more --threads than free cores make them worthless.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _report import machine, write_json
from rich.console import Console
from rich.table import Table

from megatron_moo.distributed.blocks import BlockMap, Segment
from megatron_moo.distributed.gramian import ShardGramian
from megatron_moo.distributed.rows import RowPlan, Rows

LOOP_CHUNK = 32768
LOOP_PIECE = 2**22
DTYPES = (torch.float32, torch.bfloat16)
FOLDED = (64, 8)  # rows and half rows of the case that folds
OFFSET = 13  # of the first tensor in the shard: slots cut buckets anywhere


@dataclass(frozen=True)
class Layout:
    """A shard cut into blocks: the length of every segment, and its block."""

    name: str
    segments: list[tuple[int, int]]

    def block_map(self) -> BlockMap:
        segments, at = [], 0
        for length, block in self.segments:
            segments.append(Segment(0, at, at + length, block, True))
            at += length
        names = [str(block) for block in range(max(block for _, block in self.segments) + 1)]
        return BlockMap(names, segments, partial=[], tied_buckets=[], tied_blocks=[], replicated_blocks=[])


def layouts(elements: int, hidden: int) -> list[Layout]:
    """The four ways to cut a shard of about ``elements``."""
    h = hidden
    layer = [h, h, 3 * h * h, 3 * h, h * h, h, h, h, 4 * h * h, 4 * h, 4 * h * h, h]
    tensors = layer * max(elements // sum(layer), 1)
    adapter = [h, 4 * h, 12 * h, 4 * h, 4 * h, h, 4 * h, 16 * h, 16 * h, 4 * h]  # rank 4
    adapters = adapter * max(elements // sum(adapter), 1)
    return [
        Layout("one block", [(sum(tensors), 0)]),
        Layout("layers", [(OFFSET, 0)] + [(sum(layer), b + 1) for b in range(len(tensors) // len(layer))]),
        Layout("tensors", [(length, block) for block, length in enumerate([OFFSET, *tensors])]),
        Layout("adapters", [(length, block) for block, length in enumerate([OFFSET, *adapters])]),
    ]


def looped(rows: Sequence[Rows], blocks: BlockMap, plan: RowPlan) -> torch.Tensor:
    """The Gramian segment by segment, in fp32 over LOOP_CHUNK columns at most: [B, H, H] float64."""
    half_rows, device = plan.num_halves, plan.half_R.device
    gram_BHH = torch.zeros(len(blocks.names), half_rows, half_rows, dtype=torch.float64, device=device)
    columns = max(LOOP_PIECE // (plan.half_R.numel() * LOOP_CHUNK), 1) * LOOP_CHUNK
    for segment in blocks.segments:
        for start in range(segment.start, segment.end, columns):
            end = min(start + columns, segment.end)
            waves = [wave[:, start:end] for wave in rows[segment.bucket]]
            part = (waves[0] if len(waves) == 1 else torch.cat(waves)).float()
            if plan.folds:
                part = part.new_zeros(half_rows, part.shape[1]).index_add_(0, plan.half_R, part)
            whole = part.shape[1] // LOOP_CHUNK * LOOP_CHUNK
            rest = part[:, whole:]
            gram_BHH[segment.block] += (rest @ rest.T).double()
            if whole:
                chunks = part[:, :whole].unflatten(1, (-1, LOOP_CHUNK)).transpose(0, 1)
                gram_BHH[segment.block] += torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64)
    if not plan.folds:
        order = torch.argsort(plan.half_R)
        gram_BHH = gram_BHH[:, order][:, :, order]
    return gram_BHH


def exact(rows: torch.Tensor, blocks: BlockMap) -> torch.Tensor:
    """[B, R, R] float64, products in fp64."""
    gram = torch.zeros(len(blocks.names), len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for segment in blocks.segments:
        for part in rows[:, segment.start : segment.end].split(2**17, dim=1):
            part = part.double()
            gram[segment.block] += part @ part.T
    return gram


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    length = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    return float(((found.double() - expected).abs() / length[..., :, None] / length[..., None, :]).max())


def make_rows(num_rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows with cosines of about a half, like gradients of related languages: [R, N]."""
    generator = torch.Generator(device).manual_seed(num_rows)
    rows = torch.randn(num_rows, columns, generator=generator, device=device)
    return rows.add_(torch.randn(columns, generator=generator, device=device)).to(dtype)


def measure(ways: dict[str, Callable[[], Any]], rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Milliseconds of every way in every round; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if cuda:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def run_case(layout: Layout, half_rows: int, all_rows: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """One layout, number of rows and dtype, on as many columns of ``all_rows`` as the layout has."""
    blocks = layout.block_map()
    columns = blocks.segments[-1].end
    rows = all_rows[:, :columns].contiguous()
    num_rows, precision = len(rows), {torch.float32: "fp32", torch.bfloat16: "bf16"}[rows.dtype]
    objectives = num_rows if num_rows == half_rows else half_rows // 2
    plan = RowPlan.from_assignment([[r % objectives for r in range(num_rows)]], objectives, args.device)
    gramian = ShardGramian(blocks, [columns], args.device)
    words = rows.view(-1)[: rows.numel() // 2 * 2].view(torch.float32)  # the same bytes, of bf16 too
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "read": lambda: words.sum(),
        "plain": lambda: _plain(rows),
        "loop": lambda: looped([[rows]], blocks, plan),
        "ours": lambda: gramian([[rows]], plan),
    }
    if precision == "bf16":
        ways["bf16"] = lambda: rows @ rows.T
    times = measure(ways, args.rounds, args.device == "cuda")
    pick = min if args.fastest else statistics.median
    milliseconds = {name: pick(found) for name, found in times.items()}
    exact_BRR = exact(rows, blocks)
    fold_HR = torch.nn.functional.one_hot(plan.half_R, plan.num_halves).T.double()
    expected = {"ours": fold_HR @ exact_BRR @ fold_HR.T, "plain": exact_BRR.sum(0)}
    expected |= {"loop": expected["ours"], "bf16": expected["plain"]}
    size = rows.numel() * rows.element_size()
    return {
        "layout": layout.name,
        "columns": columns,
        "segments": len(blocks.segments),
        "blocks": len(blocks.names),
        "rows": num_rows,
        "half_rows": plan.num_halves,
        "dtype": precision,
        "bytes": size,
        "milliseconds": milliseconds,
        "all_milliseconds": times,
        "errors": {name: error(way(), expected[name]) for name, way in ways.items() if name in expected},
        "read_gb_per_second": size / milliseconds["read"] / 1e6,
        "gb_per_second": size / milliseconds["ours"] / 1e6,
    }


def _plain(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.float()
    return wide @ wide.T


def tables(results: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table per layout."""
    for name in dict.fromkeys(result["layout"] for result in results):
        mine = [result for result in results if result["layout"] == name]
        title = f"{name}: {mine[0]['columns']:,} columns, {mine[0]['segments']} segments, {mine[0]['blocks']} blocks"
        table = Table(title=title, header_style="bold", title_justify="left")
        heads = ("R", "H", "rows", "read ms", "plain", "bf16", "loop", "ours", "GB/s", "of read", "plain/ours")
        for head in (*heads, "loop/ours", "error", "plain's", "bf16's"):
            table.add_column(head, justify="right", no_wrap=True)
        for result in mine:
            ms, errors = result["milliseconds"], result["errors"]
            table.add_row(
                str(result["rows"]),
                str(result["half_rows"]),
                result["dtype"],
                *(f"{ms[way]:.1f}" if way in ms else "-" for way in ("read", "plain", "bf16", "loop", "ours")),
                f"{result['gb_per_second']:.1f}",
                f"{ms['read'] / ms['ours']:.0%}",
                *(f"{ms[way] / ms['ours']:.2f}" for way in ("plain", "loop")),
                *(f"{errors[way]:.0e}" if way in errors else "-" for way in ("ours", "plain", "bf16")),
            )
        yield table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every number there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--elements", type=int, default=2_000_000, help="of the shard, about (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the model (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="R = H, without folding (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of every way (default: %(default)s)")
    parser.add_argument("--fastest", action="store_true", help="take the fastest round, not the median (busy machines)")
    parser.add_argument("--threads", type=int, default=1, help="torch's, on the CPU (default: %(default)s)")
    args = parser.parse_args(argv)
    if (smallest := min(args.elements, args.hidden, args.rounds, args.threads, *args.rows)) < 1:
        parser.error(f"--elements, --hidden, --rows, --rounds and --threads must be at least 1, found {smallest}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device here; leave it out to measure on the CPU")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    where = machine(args.device == "cuda")
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), highlight=False)
    results: list[dict[str, Any]] = []
    cuts = layouts(args.elements, args.hidden)
    columns = max(sum(length for length, _ in layout.segments) for layout in cuts)
    for dtype in DTYPES:
        for num_rows, half_rows in [*((r, r) for r in args.rows), FOLDED]:
            rows = make_rows(num_rows, columns, dtype, args.device)
            results += [run_case(layout, half_rows, rows, args) for layout in cuts]
    for table in tables(results):
        console.print(table)
    ratios = [result["milliseconds"]["loop"] / result["milliseconds"]["ours"] for result in results]
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    console.print(f"loop/ours: {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}", highlight=False)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        write_json(args.out, {"machine": where, "settings": settings, "results": results})
        console.print(f"wrote {args.out}", highlight=False)


if __name__ == "__main__":
    main()
