"""One run of one way, in a process of its own: prints {"seconds", "cpu_seconds"} from after the imports
to the finished files; the latter of all its processes.

    python benchmarks/_preprocess_ways.py ours|megatron DATA TOKENIZER OUT WORKERS SHARD_MB

`megatron` does what Megatron-LM documents, `tools/preprocess_data.py --json-keys text --append-eod` with a Hugging Face
tokenizer, by Megatron's own classes: a pool of processes takes lines in chunks of 32, each builds its tokenizer at its
start and gives back lists of ids; the parent appends them to an IndexedDatasetBuilder. The script itself is not part of
the wheel, so this stands for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

_CHUNK = 32
_state: dict[str, Any] = {}


def ours(data: Path, tokenizer: Path, out: Path, workers: int, shard_mb: float) -> None:
    """tools/preprocess.py without its printing: tokens, mask, counts, hashes, manifest."""
    from megatron_moo.data.preparing.preprocess import Request, prepare

    prepare(Request(data, out, "huggingface", tokenizer, workers=workers, shard_mb=shard_mb))


def _build(path: str) -> Any:
    from megatron.core.tokenizers import MegatronTokenizer

    options = {"chat_template": None, "vocab_file": None, "merges_file": None, "additional_special_tokens": [],
               "use_fast": True, "trust_remote_code": False, "include_special_tokens": True}  # fmt: skip
    return MegatronTokenizer.from_pretrained(tokenizer_path=path, metadata_path={"library": "huggingface"}, **options)


def _begin(path: str) -> None:
    _state["tokenizer"] = _build(path)


def _encode(line: str) -> list[int]:
    tokenizer = _state["tokenizer"]
    ids = tokenizer.tokenize(json.loads(line)["text"])
    return [*ids, tokenizer.eod] if ids else []


def documented(data: Path, tokenizer: Path, out: Path, workers: int) -> None:
    """Tokens alone."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    (source,) = data.glob("*/*.jsonl")
    prefix = str(out / source.parent.name / source.stem)
    Path(prefix).parent.mkdir(parents=True)
    vocabulary = _build(str(tokenizer)).vocab_size
    with (
        open(source, encoding="utf-8") as stream,
        multiprocessing.get_context("fork").Pool(workers, _begin, (str(tokenizer),)) as pool,
    ):
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocabulary))
        for ids in pool.imap(_encode, stream, _CHUNK):
            builder.add_document(ids, [len(ids)])
        builder.finalize(prefix + ".idx")


def clocks() -> tuple[float, float]:
    """Seconds by the wall, and of processor time of this process and the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> int:
    """Run one way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("ours", "megatron"))
    for name in ("data", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("workers", type=int)
    parser.add_argument("shard_mb", type=float)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    # The imports are not timed: they take the same seconds for any amount of text.
    logging.disable(logging.WARNING)
    if args.way == "ours":
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

        import megatron_moo.data.preparing.preprocess  # noqa: F401

        begin = clocks()
        ours(args.data, args.tokenizer, args.out, args.workers, args.shard_mb)
    else:
        import megatron.core.datasets.indexed_dataset  # noqa: F401
        import megatron.core.tokenizers  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

        begin = clocks()
        documented(args.data, args.tokenizer, args.out, args.workers)
    seconds, cpu_seconds = (after - before for before, after in zip(begin, clocks(), strict=True))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
