"""Training a SentencePiece tokenizer, balanced over languages; the command is tools/train_tokenizer.py."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from megatron_moo.data.files import DataError, sha256_file, write_json
from megatron_moo.data.rows import read_rows

_CHUNK = 1000  # characters; SentencePiece silently skips sentences of more than 4192 bytes


def read_texts(files: Sequence[str | Path]) -> dict[str, list[str]]:
    """The lines of all texts of the rows, by language, in the order of the sorted files."""
    texts: dict[str, list[str]] = {}
    for file in sorted(map(str, files)):
        for row in read_rows(file):
            lines = texts.setdefault(row.lang, [])
            for segment in row.segments:
                for line in segment.text.split("\n"):
                    lines += [line[i : i + _CHUNK] for i in range(0, len(line), _CHUNK)]
    return texts


def balanced(texts: dict[str, list[str]], characters: int) -> Iterator[str]:
    """Lines of each language up to the same number of characters: `characters`, or the size of the largest.

    A larger language is thinned evenly over its length, a smaller one is repeated.
    """
    sizes = {lang: sum(map(len, lines)) for lang, lines in texts.items()}
    budget = min(characters, max(sizes.values()))
    for lang in sorted(texts):
        stride = max(1, sizes[lang] // budget)
        lines = [line for start in range(stride) for line in texts[lang][start::stride]]
        taken = 0
        for line in cycle(lines):
            if taken >= budget:
                break
            taken += len(line)
            yield line


def train_sentencepiece(
    files: Sequence[str | Path],
    out: str | Path,
    vocab_size: int = 2048,
    model_type: str = "bpe",
    characters: int = 1_000_000,
    coverage: float = 0.995,
    symbols: tuple[str, ...] = (),
    force: bool = False,
) -> str:
    """Train on JSONL rows and write `out` and `out` + `.json` (what it was trained on).

    Args:
        files: JSONL files; their order does not matter.
        out: the `.model` file.
        vocab_size: pieces, of which 256 are bytes and 4 control pieces (unk 0, bos 1, eos 2, pad 3).
        model_type: `bpe` or `unigram`.
        characters: the most that one language gives.
        coverage: share of character occurrences that get a piece of their own.
        symbols: texts that are always one token; the line break is one anyway.
        force: train even if `out` was trained on this input with these options.

    Returns:
        A line that says what was done.

    Raises:
        DataError: bad rows (see read_rows), or sizes that SentencePiece cannot meet.
    """
    from sentencepiece import SentencePieceTrainer

    out = Path(out)
    if vocab_size < 300:
        raise DataError(f"--vocab-size must be at least 300 (256 are bytes), got {vocab_size}")
    if not 0.9 <= coverage <= 1:
        raise DataError(f"--coverage must be in [0.9, 1], got {coverage}")
    if characters < 1:
        raise DataError(f"--characters must be at least 1, got {characters}")
    texts = read_texts(files)
    sources = sorted(sha256_file(file) for file in files)
    stamp = {"sources": sources, "options": [vocab_size, model_type, characters, coverage, list(symbols)]}
    note = out.with_name(out.name + ".json")
    if not force and _trained_on(stamp, out, note):
        return f"{out}: up to date; --force trains again"
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=balanced(texts, characters), model_writer=model, vocab_size=vocab_size,
            model_type=model_type, character_coverage=coverage, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            user_defined_symbols=["\n", *symbols], unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=1,
            shuffle_input_sentence=False, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise DataError(f"SentencePiece refuses --vocab-size {vocab_size}, --coverage {coverage}: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, out)
    write_json(note, {**stamp, "languages": sorted(texts), "sha256": sha256_file(out)})
    return f"{out}: {vocab_size} pieces from {len(texts)} languages, sha256 {sha256_file(out)[:12]}"


def _trained_on(stamp: dict, out: Path, note: Path) -> bool:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return {key: found.get(key) for key in stamp} == stamp and sha256_file(out) == found["sha256"]
    except (OSError, ValueError, KeyError):
        return False
