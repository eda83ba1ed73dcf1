"""The manifest of prepared data: what `OUT/manifest.json` holds and how it is checked.

    {"schema": 1, "fingerprint": sha256 of everything that decides the output,
     "tokenizer": {"type", "file", "sha256", "vocab_size", "eod"},
     "objectives": ["de", "en", ...],            the order is the objective number
     "splits": {"train": {"de": {"prefix", "documents", "tokens", "answer_tokens", "longest", "idx_sha256",
                                 "mask_idx_sha256", "source", "source_sha256"}, ...}, ...}}

Paths are relative to the manifest, so that the directory can be moved; the tokenizer's files are copied into
it. Each prefix stands for Megatron's `.bin/.idx` pair of the tokens and for a `.mask.bin/.mask.idx` pair of
the same lengths.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moo.data.corpus import Corpus, read_lengths
from megatron_moo.data.files import DataError, sha256_file
from megatron_moo.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_sha256

SCHEMA = 1
FILE = "manifest.json"
_REMEDY = "run tools/preprocess.py again"


@dataclass(frozen=True)
class Entry:
    """One language of one split; counts are in documents and tokens."""

    prefix: str
    documents: int
    tokens: int
    answer_tokens: int  # tokens that are targets, the end of document included
    longest: int
    idx_sha256: str
    mask_idx_sha256: str
    source: str
    source_sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer the ids belong to; `file` is relative to the manifest, empty for bytes."""

    type: str
    file: str
    sha256: str
    vocab_size: int
    eod: int
    eod_token: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Prepared data. Made by `Manifest.load`."""

    folder: Path
    fingerprint: str
    tokenizer: TokenizerInfo
    objectives: tuple[str, ...]
    splits: dict[str, dict[str, Entry]]

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read and check `folder/manifest.json`.

        Raises:
            DataError: no manifest, another schema, a file missing, or a file that is not the one prepared.
                Index hashes, sizes of the data files, and the tokenizer's hash are compared; the data files'
                contents are not.
        """
        path = Path(folder) / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; prepare the data with tools/preprocess.py") from None
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else None
            raise DataError(f"{path}: schema {found!r}, this version reads {SCHEMA}; {_REMEDY}")
        try:
            manifest = cls._from_json(Path(folder), raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest of this version ({error}); {_REMEDY}") from None
        manifest._verify()
        return manifest

    @classmethod
    def _from_json(cls, folder: Path, raw: dict[str, Any]) -> "Manifest":
        splits = {s: {lang: Entry(**entry) for lang, entry in langs.items()} for s, langs in raw["splits"].items()}
        tokenizer = TokenizerInfo(**raw["tokenizer"])
        return cls(folder, raw["fingerprint"], tokenizer, tuple(raw["objectives"]), splits)

    def _verify(self) -> None:
        if self.tokenizer.file:
            path = self.folder / self.tokenizer.file
            if not path.exists() or tokenizer_sha256(path) != self.tokenizer.sha256:
                raise DataError(f"{path}: missing or not the tokenizer the data was made with; {_REMEDY}")
        for langs in self.splits.values():
            for entry in langs.values():
                prefix = self.folder / entry.prefix
                _verify_pair(f"{prefix}", entry.idx_sha256)
                _verify_pair(f"{prefix}.mask", entry.mask_idx_sha256)

    def languages(self, split: str) -> tuple[str, ...]:
        """Languages of a split, objectives first and in their order.

        Raises:
            DataError: unknown split.
        """
        if split not in self.splits:
            raise DataError(f"split {split!r} is not in {self.folder / FILE}; known: {', '.join(self.splits)}")
        known = self.splits[split]
        return tuple(k for k in self.objectives if k in known) + tuple(k for k in known if k not in self.objectives)

    def prefix(self, split: str, lang: str) -> str:
        """Path prefix of a language's token files.

        Raises:
            DataError: unknown split or language.
        """
        known = self.languages(split)
        if lang not in known:
            raise DataError(
                f"language {lang!r} is not in split {split!r} of {self.folder / FILE}; known: {', '.join(known)}"
            )
        return str(self.folder / self.splits[split][lang].prefix)

    def corpus(self, split: str, lang: str, max_tokens: int | None = None) -> Corpus:
        """Samples of a language, those longer than `max_tokens` left out (see Corpus)."""
        return Corpus(self.prefix(split, lang), lang, max_tokens)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer the data was made with."""
        path = self.folder / self.tokenizer.file if self.tokenizer.file else None
        return load_tokenizer(self.tokenizer.type, path, self.tokenizer.eod_token)


def _verify_pair(prefix: str, idx_sha256: str) -> None:
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataError(f"{prefix}{suffix}: missing; {_REMEDY}")
    if sha256_file(prefix + ".idx") != idx_sha256:
        raise DataError(f"{prefix}.idx: its hash is not the one in {FILE}; {_REMEDY}")
    lengths, dtype = read_lengths(prefix)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    if (found := os.path.getsize(prefix + ".bin")) != expected:
        raise DataError(f"{prefix}.bin: {found} bytes where its index says {expected}; {_REMEDY}")
