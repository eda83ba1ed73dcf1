"""Texts to indexed tokens: ours against Megatron-LM's documented way, on the same text with the same tokenizer.

    python benchmarks/preprocess.py --mb 64 --workers 2 --out runs/bench/preprocess.json
    python benchmarks/preprocess.py --mb 0 --memory 10 1024

The text is made up: words of eight scripts by Zipf's law, documents of some 200 words (--seed). The tokenizer is a
byte-level BPE (--vocabulary) trained on such text, a Hugging Face directory. Ours is tools/preprocess.py: tokens,
mask, counts, hashes. Theirs is what tools/preprocess_data.py of Megatron-LM does with --append-eod (see
_preprocess_ways.py): tokens alone. Each run is a process of its own, timed from after the imports to the finished
files, start of workers and loading of tokenizers included; rounds take turns. CPU seconds are of all its processes.
The token files must be equal, byte by byte.

--memory MB ...: most memory that the processes of one run hold together (the sum of their proportional set sizes, every
0.05 s), for texts of these sizes. Page cache is not in it.
On a shared machine trust ratios, and those only roughly.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _preprocess_text import train_tokenizer, write_text
from _report import machine, write_json
from rich.console import Console
from rich.table import Table

WAYS = ("ours", "megatron")
WAYS_SCRIPT = Path(__file__).with_name("_preprocess_ways.py")
SAMPLE_SECONDS = 0.05
LANG = "mul"  # several languages


def descendants(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += descendants(int(child))
    return found


def proportional_bytes(pids: list[int]) -> int:
    """Memory of processes together: shared pages count once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def run(way: str, data: Path, tokenizer: Path, out: Path, args: argparse.Namespace, sample: bool = False
        ) -> dict[str, Any]:  # fmt: skip
    """One run of one way; its output stays in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, WAYS_SCRIPT, way, data, tokenizer, out, args.workers, args.shard_mb]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    peak = 0
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while sample and process.poll() is None:
            peak = max(peak, proportional_bytes(descendants(process.pid)))
            time.sleep(SAMPLE_SECONDS)
        output, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"{way} failed:\n{error}")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": peak}


def speed(folder: Path, tokenizer: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways by turns."""
    from megatron_moo.data.indexed import read_lengths

    data = folder / "data"
    size = write_text(data / "train" / f"{LANG}.jsonl", args.mb * 10**6, args.seed)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(args.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            found = run(way, data, tokenizer, folder / way, args)
            seconds[way].append(found["seconds"])
            cpu[way].append(found["cpu_seconds"])
    prefix = Path("train") / LANG
    for suffix in (".bin", ".idx"):
        if not filecmp.cmp(
            f"{folder / WAYS[0] / prefix}{suffix}", f"{folder / WAYS[1] / prefix}{suffix}", shallow=False
        ):
            raise SystemExit(f"the two ways wrote different {suffix} files")
    lengths, _ = read_lengths(folder / "ours" / prefix)
    shutil.rmtree(data)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["megatron"], strict=True)]
    return {
        "bytes": size, "documents": len(lengths), "tokens": int(lengths.sum()), "workers": args.workers,
        "shard_mb": args.shard_mb, "seconds": seconds, "median_seconds": medians, "cpu_seconds": cpu,
        "median_cpu_seconds": {way: statistics.median(times) for way, times in cpu.items()}, "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }  # fmt: skip


def memory(folder: Path, tokenizer: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of ours for texts of several sizes."""
    found = []
    for mb in args.memory:
        data = folder / "data"
        size = write_text(data / "train" / f"{LANG}.jsonl", mb * 10**6, args.seed)
        result = run("ours", data, tokenizer, folder / "ours", args, sample=True)
        shutil.rmtree(data)
        found.append({"bytes": size, "workers": args.workers, "shard_mb": args.shard_mb, **result})
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """The tables."""
    if found := result.get("speed"):
        console.print(f"{found['bytes'] / 1e6:,.1f} MB, {found['documents']:,} documents, {found['tokens']:,} tokens, "
                      f"{found['workers']} workers; token files are equal", highlight=False)  # fmt: skip
        table = Table("way", header_style="bold")
        for column in ("seconds", "tokens/s", "MB/s", "CPU seconds"):
            table.add_column(column, justify="right")
        for way, median in found["median_seconds"].items():
            rates = (f"{found['tokens'] / median:,.0f}", f"{found['bytes'] / 1e6 / median:.2f}")
            table.add_row(way, f"{median:.2f}", *rates, f"{found['median_cpu_seconds'][way]:.2f}")
        console.print(table)
        rounds = " ".join(f"{ratio:.2f}" for ratio in found["ratios"])
        console.print(
            f"megatron's time over ours: median {found['median_ratio']:.2f} (rounds: {rounds})", highlight=False
        )
    if found := result.get("memory"):
        table = Table(header_style="bold")
        for column in ("text MB", "workers", "shard MB", "peak MB", "seconds"):
            table.add_column(column, justify="right")
        for row in found:
            table.add_row(f"{row['bytes'] / 1e6:,.0f}", str(row["workers"]), f"{row['shard_mb']:g}",
                          f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['seconds']:.1f}")  # fmt: skip
        console.print(table)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64, help="text for the speed, 0: none (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of both ways (default %(default)s)")
    parser.add_argument("--shard-mb", type=float, default=4, help="of ours (default %(default)s)")
    parser.add_argument("--memory", type=int, nargs="*", default=[], metavar="MB", help="texts for the memory")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens of the tokenizer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the text (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="for text and output, then removed (default: a temporary one)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the results")
    args = parser.parse_args()
    if min(args.rounds, args.workers, *args.memory, 1) < 1 or args.mb < 0 or args.shard_mb <= 0:
        parser.error("--rounds, --workers, --memory and --shard-mb must be positive, --mb not negative")
    return args


def main() -> int:
    """Measure, print, write."""
    args = parse_args()
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder / "tokenizer", args.seed, args.vocabulary)
        if args.mb:
            result["speed"] = speed(folder, tokenizer, args)
        if args.memory:
            result["memory"] = memory(folder, tokenizer, args)
    show(result, Console())
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
