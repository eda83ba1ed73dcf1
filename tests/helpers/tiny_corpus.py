"""Indexed files of a language, written from lists."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_moo.data.indexed import write_index


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> str:
    """Token and mask files of `documents`, and their prefix."""
    for name, rows, dtype in ((str(prefix), documents, np.uint16), (f"{prefix}.mask", masks, np.uint8)):
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        Path(name + ".bin").write_bytes(b"".join(np.array(row, dtype=dtype).tobytes() for row in rows))
        write_index(name + ".idx", dtype, lambda lengths=lengths: [lengths])
    return str(prefix)


def random_pair(prefix: Path, lengths: Sequence[int], seed: int = 0) -> tuple[str, list, list]:
    """A pair with documents of these lengths: random tokens, and a random mask. Returns prefix, tokens and masks."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 1000, length).tolist() for length in lengths]
    masks = [rng.integers(0, 2, length).tolist() for length in lengths]
    return write_pair(prefix, documents, masks), documents, masks
