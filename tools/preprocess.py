"""Prepare JSONL rows for training: Megatron's .bin/.idx with a mask pair per language, and a manifest.

    python tools/preprocess.py --data data/locale-tasks --tokenizer-model data/spm.model --out data/prepared

DATA holds SPLIT/LANG.jsonl with rows {"prompt", "completion", "lang"} or {"messages", "lang"}; every row's
lang must be the file's. Loss is on the completion (or the assistant turns) and the end-of-document token. The
languages of the train split are the objectives. Nothing is written when a row is bad; nothing is done when
OUT was made from this input.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_moo.data.files import DataError
from megatron_moo.data.manifest import Manifest
from megatron_moo.data.preprocess import Request, count_lines, find_sources, prepare
from megatron_moo.data.tokenizers import KINDS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with SPLIT/LANG.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; an earlier output is replaced")
    parser.add_argument("--tokenizer-type", choices=KINDS, default="sentencepiece", help="default %(default)s")
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                        help="SentencePiece .model, Hugging Face directory or tokenizer.json")  # fmt: skip
    parser.add_argument("--eod-token", help="Hugging Face: the token that ends a document, if not the eos token")
    parser.add_argument("--languages", nargs="+", default=(), metavar="LANG",
                        help="which, in the order of the objectives (default: all, sorted)")  # fmt: skip
    parser.add_argument("--splits", nargs="+", default=(), metavar="SPLIT", help="which splits (default: all)")
    parser.add_argument("--train-split", default="train", help="its languages are the objectives (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="prepare even if OUT is up to date")
    return parser.parse_args(argv)


def counts_table(manifest: Manifest) -> Table:
    """Documents and tokens per split and language."""
    table = Table(header_style="bold")
    for column in ("split", "lang"):
        table.add_column(column)
    for column in ("documents", "tokens", "answer tokens", "mean", "longest"):
        table.add_column(column, justify="right")
    for split in manifest.splits:
        for lang in manifest.languages(split):
            e = manifest.splits[split][lang]
            mean = f"{e.tokens / e.documents:.1f}"
            table.add_row(split, lang, str(e.documents), str(e.tokens), str(e.answer_tokens), mean, str(e.longest))
        table.add_section()
    return table


def run(args: argparse.Namespace, console: Console) -> None:
    """Prepare with a progress bar and print the counts."""
    request = Request(args.data, args.out, args.tokenizer_type, args.tokenizer_model, args.eod_token,
                      tuple(args.languages), tuple(args.splits), args.train_split)  # fmt: skip
    rows = count_lines([path for langs in find_sources(request).values() for path in langs.values()])
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=rows, rate="")

        def progress(name: str, count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[0].speed
            bar.update(task, description=name, rate=f"{speed:,.0f} rows/s" if speed else "")

        quiet = (lambda name, count: None) if bar.disable else progress
        manifest, done = prepare(request, quiet, args.force)
    if not done:
        console.print(f"{args.out}: up to date; --force prepares again", highlight=False)
        return
    console.print(counts_table(manifest))
    console.print(f"wrote {args.out}: objectives {' '.join(manifest.objectives)}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    # megatron.core warns at import that GPU libraries are missing, which this tool does not need.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        run(args, Console())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
