"""Samples of one language, memory-mapped: Megatron's indexed tokens and the mask pair beside them.

One sample is one document. L: tokens of a sample.
"""

import struct

import numpy as np

from megatron_moo.data.files import DataError

_HEADER = b"MMIDIDX\x00\x00"  # Megatron's index format, version 1


def read_lengths(prefix: str) -> tuple[np.ndarray, type[np.number]]:
    """Sequence lengths (int32) and the numpy type of the tokens, from `prefix.idx`.

    Read directly, because importing megatron.core takes seconds and a check of hashes should not.
    """
    with open(prefix + ".idx", "rb") as stream:
        head = stream.read(34)
        if len(head) < 34 or head[:9] != _HEADER:
            raise DataError(f"{prefix}.idx: not an index of Megatron's; run tools/preprocess.py again")
        version, code, sequences, _ = struct.unpack("<QBQQ", head[9:])
        if version != 1:
            raise DataError(f"{prefix}.idx: index version {version}, 1 is known; run tools/preprocess.py again")
        lengths = np.fromfile(stream, dtype=np.int32, count=sequences)
    types = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
    return lengths, types[code]


class Corpus:
    """Samples of one language: `corpus[i]` gives (tokens [L] int64, mask [L] bool).

    `mask[t]` says that token t is a target. Samples of more than `max_tokens` tokens are left out, so that an
    epoch is made of samples that fit whole; `dropped` counts them.

    Args:
        prefix: of the token pair; the mask pair is `prefix.mask`.
        lang: for messages.
        max_tokens: the longest sample kept; None keeps all.

    Raises:
        DataError: nothing is left, or the mask does not belong to the tokens.
    """

    def __init__(self, prefix: str, lang: str, max_tokens: int | None = None):
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds to import

        self.lang = lang
        lengths, _ = read_lengths(prefix)
        if not np.array_equal(lengths, read_lengths(prefix + ".mask")[0]):
            raise DataError(f"{prefix}.mask.idx: other lengths than {prefix}.idx; run tools/preprocess.py again")
        self.kept = np.flatnonzero(lengths <= (max_tokens or np.iinfo(np.int32).max))
        self.dropped = len(lengths) - len(self.kept)
        if not len(self.kept):
            shortest = f", the shortest has {lengths.min()}" if len(lengths) else ""
            raise DataError(
                f"language {lang!r}: no sample of {prefix} has at most {max_tokens} tokens{shortest}; "
                "raise --seq-length"
            )
        self.lengths = lengths[self.kept]
        self._tokens = IndexedDataset(prefix)
        self._mask = IndexedDataset(prefix + ".mask")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        row = int(self.kept[i])
        return self._tokens.get(row).astype(np.int64), self._mask.get(row).astype(bool)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample kept."""
        return int(self.lengths.max())
