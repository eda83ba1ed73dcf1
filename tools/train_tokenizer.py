"""Train a SentencePiece tokenizer with byte fallback on JSONL rows, balanced over their languages.

    python tools/train_tokenizer.py --input data/locale-tasks/train/*.jsonl --out data/spm.model

Every language gives the same number of characters (a small one is repeated), so that the vocabulary does not
follow the size of the corpora. Nothing is normalised: decoding gives back the text, except that U+2581,
SentencePiece's own mark, becomes a space. The same input and options give the same bytes.
"""

import argparse
import sys
from pathlib import Path

from megatron_moo.data.files import DataError
from megatron_moo.data.tokenizer_training import train_sentencepiece


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL files, in any order")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=2048, help="default %(default)s; 256 of them are bytes")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default %(default)s")
    parser.add_argument("--characters", type=int, default=1_000_000, metavar="N",
                        help="characters per language at most (default %(default)s)")  # fmt: skip
    parser.add_argument("--coverage", type=float, default=0.995,
                        help="share of characters with an own piece (default %(default)s)")  # fmt: skip
    parser.add_argument("--symbols", nargs="*", default=(), metavar="TEXT", help="texts that are always one token")
    parser.add_argument("--force", action="store_true", help="train even if OUT was trained on this input")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        print(train_sentencepiece(args.input, args.out, args.vocab_size, args.model_type, args.characters,
                                  args.coverage, tuple(args.symbols), args.force))  # fmt: skip
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
