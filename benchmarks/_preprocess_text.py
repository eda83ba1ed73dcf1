"""Text of made-up words in several scripts, and a byte-level BPE trained on it; the same for the same seed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS = 20_000  # of each script
MEAN_WORDS = 200  # of a document
BASE_BYTES = 16_000_000  # larger texts repeat this much
TRAINING_BYTES = 125  # for each token of the vocabulary
EOS = "<|endoftext|>"
CLAUSE = 10  # words between punctuation
# First and last character of each alphabet, what stands between words, and between clauses.
SCRIPTS = {
    "Latin": ("az", " ", ", "),
    "Cyrillic": ("ая", " ", ", "),
    "Greek": ("αω", " ", ", "),
    "Arabic": ("بي", " ", "، "),
    "Devanagari": ("कह", " ", ", "),
    "Georgian": ("აჰ", " ", ", "),
    "Hangul": ("가낗", " ", ", "),
    "Han": ("一些", "", "，"),
}


def documents(seed: int) -> Iterator[str]:
    """Endless documents, each of one script: words of a fixed lexicon by Zipf's law, log-normal lengths."""
    random = np.random.default_rng(seed)
    lexicons = []
    for (first, last), space, pause in SCRIPTS.values():
        longest = 3 if space == "" else 12
        sizes = np.minimum(1 + random.poisson(longest / 2, WORDS), longest)
        letters = "".join(map(chr, random.integers(ord(first), ord(last) + 1, sizes.sum())))
        ends = np.cumsum(sizes)
        lexicons.append(([letters[end - size : end] for end, size in zip(ends, sizes, strict=True)], space, pause))
    # Zipf's law by inverting its distribution: rank = exp(uniform * log(WORDS)).
    while True:
        words, space, pause = lexicons[random.integers(len(lexicons))]
        length = max(int(random.lognormal(math.log(MEAN_WORDS) - 0.5, 1.0)), 1)
        ranks = np.exp(random.random(length) * math.log(WORDS)).astype(int) - 1
        found = [words[rank] for rank in ranks]
        yield pause.join(space.join(found[start : start + CLAUSE]) for start in range(0, length, CLAUSE))


def write_text(path: Path, size: int, seed: int) -> int:
    """Write about `size` bytes of JSONL, {"text": ...} a line; returns the bytes written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    lines: list[bytes] = []
    with open(path, "wb") as stream:
        for text in documents(seed):
            lines.append(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            written += stream.write(lines[-1])
            if written >= min(size, BASE_BYTES):
                break
        for line in itertools.cycle(lines):
            if written >= size:
                break
            written += stream.write(line)
    return written


def train_tokenizer(folder: Path, seed: int, vocabulary: int) -> Path:
    """A Hugging Face directory with a byte-level BPE trained on such text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[EOS],
        show_progress=False,
    )  # fmt: skip
    texts, size = [], 0
    for text in documents(seed):
        texts.append(text)
        size += len(text.encode())
        if size > TRAINING_BYTES * vocabulary:
            break
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS).save_pretrained(folder)
    return folder
