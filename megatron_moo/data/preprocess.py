"""JSONL to Megatron's indexed files with a mask pair and a manifest; the command is tools/preprocess.py.

The input is a directory `DATA/{split}/{lang}.jsonl`; the output is described in `manifest`. Loss is on the
completion (or the assistant turns) and on the end-of-document token after it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_moo.data.files import DataError, replaced_directory, sha256_file, write_json
from megatron_moo.data.manifest import FILE, SCHEMA, Entry, Manifest, TokenizerInfo
from megatron_moo.data.rows import TEMPLATE, Row, read_rows
from megatron_moo.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer, tokenizer_sha256

Progress = Callable[[str, int], None]  # (what is being read, rows since the last call)


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
        data: directory with `{split}/{lang}.jsonl`.
        out: directory to write.
        tokenizer_type, tokenizer_model, eod_token: see load_tokenizer.
        languages: which, and in which order the objectives are numbered; empty takes all, sorted.
        splits: which; empty takes all.
        train_split: the split whose languages are the objectives.
    """

    data: Path
    out: Path
    tokenizer_type: str = "sentencepiece"
    tokenizer_model: Path | None = None
    eod_token: str | None = None
    languages: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    train_split: str = "train"


def find_sources(request: Request) -> dict[str, dict[str, Path]]:
    """The JSONL files by split and language, in the order they are prepared.

    Raises:
        DataError: no such directory, or an unknown split or language was asked for.
    """
    if not request.data.is_dir():
        raise DataError(f"--data {request.data}: no such directory; it must hold SPLIT/LANG.jsonl")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(request.data.glob("*/*.jsonl")):
        found.setdefault(path.parent.name, {})[path.stem] = path
    if not found:
        raise DataError(f"--data {request.data}: empty corpus: no SPLIT/LANG.jsonl in it")
    for split in (*request.splits, request.train_split):
        if split not in found:
            raise DataError(f"split {split!r}: no {request.data / split}/LANG.jsonl; known splits: {', '.join(found)}")
    found = {split: found[split] for split in request.splits or found}
    known = sorted({lang for langs in found.values() for lang in langs})
    for lang in request.languages:
        if lang not in known:
            raise DataError(f"--languages: unknown language {lang!r}; {request.data} has: {', '.join(known)}")
        if request.languages.count(lang) > 1:
            raise DataError(f"--languages: {lang!r} is given twice")
    order = request.languages or known
    chosen = {split: {lang: langs[lang] for lang in order if lang in langs} for split, langs in found.items()}
    if request.train_split in chosen and not chosen[request.train_split]:
        raise DataError(f"--languages: none of {' '.join(order)} is in the split {request.train_split!r}")
    return {split: langs for split, langs in chosen.items() if langs}


def encode_row(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and mask (1: a target) of a row, the end-of-document token after each answer included.

    Raises:
        DataError: a prompt or an answer without tokens.
    """
    tokens: list[int] = []
    mask: list[int] = []
    for segment in row.segments:
        ids = tokenizer.encode(segment.text)
        if not ids:
            raise DataError(f"{row.where}: the tokenizer makes no token of {segment.text[:40]!r}")
        if segment.loss:
            ids = [*ids, tokenizer.eod]
        tokens += ids
        mask += [int(segment.loss)] * len(ids)
    return tokens, mask


def _prepare_file(source: Path, sha256: str, lang: str, split: str, folder: Path, tokenizer: Tokenizer,
                  progress: Progress) -> Entry:  # fmt: skip
    # Takes seconds to import.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    name = f"{split}/{lang}"
    (folder / split).mkdir(exist_ok=True)
    prefix = str(folder / name)
    token_file = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    mask_file = IndexedDatasetBuilder(prefix + ".mask.bin", dtype=np.uint8)
    total = answer = longest = 0
    try:
        for row in read_rows(source, lang):
            tokens, mask = encode_row(row, tokenizer)
            token_file.add_document(tokens, [len(tokens)])
            mask_file.add_document(mask, [len(mask)])
            total, answer, longest = total + len(tokens), answer + sum(mask), max(longest, len(tokens))
            progress(name, 1)
    finally:
        token_file.finalize(prefix + ".idx")
        mask_file.finalize(prefix + ".mask.idx")
    return Entry(
        prefix=name, documents=len(token_file.sequence_lengths),
        tokens=total, answer_tokens=answer, longest=longest,
        idx_sha256=sha256_file(prefix + ".idx"), mask_idx_sha256=sha256_file(prefix + ".mask.idx"),
        source=source.name, source_sha256=sha256,
    )  # fmt: skip


def _tokenizer_info(request: Request, tokenizer: Tokenizer) -> TokenizerInfo:
    path = request.tokenizer_model
    if request.tokenizer_type == "byte" or path is None:
        return TokenizerInfo(request.tokenizer_type, "", "", tokenizer.vocab_size, tokenizer.eod)
    name = path.name if path.is_file() else "tokenizer"
    sha256 = tokenizer_sha256(path)
    return TokenizerInfo(request.tokenizer_type, name, sha256, tokenizer.vocab_size, tokenizer.eod, request.eod_token)


def _up_to_date(out: Path, fingerprint: str) -> Manifest | None:
    try:
        manifest = Manifest.load(out)
    except DataError:
        return None
    return manifest if manifest.fingerprint == fingerprint else None


def prepare(
    request: Request, progress: Progress = lambda name, rows: None, force: bool = False
) -> tuple[Manifest, bool]:
    """Prepare the data, unless the output was made from this very input.

    Args:
        request: what to prepare.
        progress: called after each row.
        force: prepare even if the output is up to date.

    Returns:
        The manifest, and whether there was work to do.

    Raises:
        DataError: see find_sources, load_tokenizer, read_rows and replaced_directory. Nothing is written
            then.
    """
    sources = find_sources(request)
    tokenizer = load_tokenizer(request.tokenizer_type, request.tokenizer_model, request.eod_token)
    info = _tokenizer_info(request, tokenizer)
    hashes = {split: {lang: sha256_file(path) for lang, path in langs.items()} for split, langs in sources.items()}
    objectives = list(sources.get(request.train_split) or sources[next(iter(sources))])
    content = {
        "schema": SCHEMA,
        "template": TEMPLATE,
        "tokenizer": asdict(info),
        "objectives": objectives,
        "sources": hashes,
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if not force and (manifest := _up_to_date(request.out, fingerprint)):
        return manifest, False
    with replaced_directory(request.out, FILE) as folder:
        if info.file:
            copy_tokenizer(request.tokenizer_model, folder)  # type: ignore[arg-type]
        splits: dict[str, dict[str, dict]] = {}
        for split, langs in sources.items():
            for lang, path in langs.items():
                entry = _prepare_file(path, hashes[split][lang], lang, split, folder, tokenizer, progress)
                splits.setdefault(split, {})[lang] = asdict(entry)
        write_json(folder / FILE, {
            "schema": SCHEMA, "fingerprint": fingerprint, "tokenizer": asdict(info), "objectives": objectives,
            "splits": splits,
        })  # fmt: skip
    return Manifest.load(request.out), True


def count_lines(paths: Sequence[Path]) -> int:
    """Lines of the files together, for a progress bar."""
    total = 0
    for path in paths:
        with open(path, "rb") as stream:
            total += sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    return total
