"""Tokenizers behind one small protocol: SentencePiece, Hugging Face, and bytes (for tests).

Texts are encoded as they stand: no beginning-of-sequence token, no special tokens; the end-of-document token
is added by the caller.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Protocol

from megatron_moo.data.files import DataError, sha256_file

KINDS = ("sentencepiece", "huggingface", "byte")
# What a Hugging Face tokenizer directory may consist of; model weights beside them are neither hashed nor
# copied.
_HF_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    eod: int  # end of document
    vocab_size: int  # ids are in [0, vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens give nothing."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255, 256 ends a document."""

    eod = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer; broken UTF-8 gives replacement characters."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model with an end-of-sentence piece."""

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(f"tokenizer {path}: not a SentencePiece model ({error})") from None
        self.eod = self._model.eos_id()
        self.vocab_size = self._model.vocab_size()
        if self.eod < 0:
            raise DataError(f"tokenizer {path}: has no end-of-sentence piece; train it with an eos id")

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A directory written by `save_pretrained`, or a bare `tokenizer.json`; read from disk only."""

    def __init__(self, path: str | Path, eod_token: str | None = None):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(path)
        try:
            if path.is_dir():
                self._model = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            else:
                self._model = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:
            raise DataError(f"tokenizer {path}: not a Hugging Face tokenizer ({str(error).splitlines()[0]})") from None
        self.vocab_size = len(self._model)
        token = eod_token or self._model.eos_token
        known = self._model.get_vocab()
        if token is None or token not in known:
            found = "has no end-of-sequence token" if token is None else f"has no token {token!r}"
            raise DataError(f"tokenizer {path}: {found}; name the token that ends a document with --eod-token")
        self.eod = known[token]

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """See Tokenizer."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(kind: str, path: str | Path | None = None, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer of a kind.

    Args:
        kind: one of KINDS.
        path: SentencePiece `.model`; Hugging Face directory or `tokenizer.json`; unused for `byte`.
        eod_token: Hugging Face only: the token that ends a document, where it is not the end-of-sequence
            token.

    Raises:
        DataError: unknown kind, missing or unreadable file, no end-of-document token.
    """
    if kind not in KINDS:
        raise DataError(f"--tokenizer-type: unknown {kind!r}; known: {', '.join(KINDS)}")
    if kind == "byte":
        return ByteTokenizer()
    if path is None or not Path(path).exists():
        raise DataError(f"--tokenizer-model: no such file: {path}; train one with tools/train_tokenizer.py")
    return SentencePieceTokenizer(path) if kind == "sentencepiece" else HuggingFaceTokenizer(path, eod_token)


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files a tokenizer consists of, sorted by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    return sorted({file for pattern in _HF_PATTERNS for file in path.glob(pattern) if file.is_file()})


def tokenizer_sha256(path: str | Path) -> str:
    """SHA-256 of a tokenizer: of its file, or of the names and hashes of its directory's files."""
    if Path(path).is_file():
        return sha256_file(path)
    lines = (f"{file.name} {sha256_file(file)}\n" for file in tokenizer_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def copy_tokenizer(path: str | Path, folder: Path) -> str:
    """Copy a tokenizer into `folder`; returns the name it has there (a file, or a directory)."""
    path = Path(path)
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
        return path.name
    (folder / "tokenizer").mkdir()
    for file in tokenizer_files(path):
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    return "tokenizer"
