"""Language-pure micro-batches for one data-parallel rank, in the order in which Megatron's schedule asks for them.

The target shift is done here: `labels[t]` is the token after `tokens[t]`, and `loss_mask[t]` says whether
that token is a target. All batches have S columns, because pipeline stages exchange tensors of one shape.

A slot may be several data-parallel ranks (with expert parallelism): its peers. Each takes its part of the samples of
the slot's row, so that together they read what one rank with all of them would.

Legend: b samples of a micro-batch, S sequence length, P peers of a slot, n samples of a row.
"""

from collections.abc import Iterator

import torch

from megatron_moo.data.corpus import Corpus
from megatron_moo.data.manifest import Manifest
from megatron_moo.data.sampler import LanguagePureSampler


def collate(samples: list[tuple], seq_length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Pad samples to one micro-batch.

    Args:
        samples: b pairs (tokens [L], mask [L]) with 2 <= L <= S + 1, as a Corpus gives them.
        seq_length: S.
        pad_id: token at the places that are no part of a sample; they carry no loss.

    Returns:
        tokens, labels, position_ids [b, S] int64 and loss_mask [b, S] float32.

    Raises:
        ValueError: a sample that does not fit.
    """
    b = len(samples)
    tokens = torch.full((b, seq_length), pad_id, dtype=torch.int64)
    labels = torch.full((b, seq_length), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(b, seq_length, dtype=torch.float32)
    for i, (ids, mask) in enumerate(samples):
        last = len(ids) - 1
        if last > seq_length:
            raise ValueError(
                f"a sample of {len(ids)} tokens does not fit in seq_length {seq_length} + 1; drop it first"
            )
        tokens[i, :last] = torch.from_numpy(ids[:-1])
        labels[i, :last] = torch.from_numpy(ids[1:])
        loss_mask[i, :last] = torch.from_numpy(mask[1:]).float()
    position_ids = torch.arange(seq_length).expand(b, -1).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


class MicroBatches:
    """Endless iterator over the micro-batches of one data-parallel rank: by step, then wave, then micro-batch.

    Each batch is what `collate` gives, and `objective` [1] int64, its number in `manifest.objectives`.
    Nothing needs a checkpoint but the step, which is `start_step` of the next run.

    Args:
        manifest: prepared data.
        split: the split to train on; it must hold every objective.
        sampler: over all objectives of the manifest and all slots.
        slot: this rank's.
        micro_batch_size: b.
        micro_batches_per_wave: of this rank, so that a row has n = b * P times that many samples.
        seq_length: S; samples of more than S + 1 tokens are dropped (see `Corpus.dropped`).
        pad_id: see collate.
        start_step: the first step to give.
        peer, peers: this rank's number in its slot, and P.

    Raises:
        ValueError: sampler and manifest disagree, a slot or peer out of range, sizes below one, or a language none of
            whose samples fits.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        sampler: LanguagePureSampler,
        slot: int,
        micro_batch_size: int,
        micro_batches_per_wave: int,
        seq_length: int,
        pad_id: int,
        start_step: int = 0,
        peer: int = 0,
        peers: int = 1,
    ):
        if sampler.num_objectives != len(manifest.objectives):
            raise ValueError(
                f"the sampler is for {sampler.num_objectives} objectives, the manifest has {len(manifest.objectives)}"
            )
        if not 0 <= slot < sampler.slots:
            raise ValueError(f"slot must be in [0, {sampler.slots}), got {slot}")
        if not 0 <= peer < peers:
            raise ValueError(f"peer must be in [0, {peers}), got {peer}")
        sizes = {
            "micro_batch_size": micro_batch_size,
            "micro_batches_per_wave": micro_batches_per_wave,
            "seq_length": seq_length,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.sampler, self.slot, self.pad_id, self.seq_length = sampler, slot, pad_id, seq_length
        self.micro_batch_size, self.micro_batches_per_wave = micro_batch_size, micro_batches_per_wave
        self._peer, self._row_samples = peer, micro_batch_size * micro_batches_per_wave * peers
        self.corpora: list[Corpus] = [manifest.corpus(split, k, seq_length + 1) for k in manifest.objectives]
        self.sizes = [len(corpus) for corpus in self.corpora]
        self._batches = self._generate(start_step)

    def epochs(self, step: int) -> list[float]:
        """Epochs of each objective's corpus that the steps before `step` have used, over all ranks: [K]."""
        rows = self.sampler.counts(step)[0]
        return [int(r) * self._row_samples / size for r, size in zip(rows, self.sizes, strict=True)]

    def _generate(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        b = self.micro_batch_size
        part = b * self.micro_batches_per_wave
        first = self._peer * part
        while True:
            for wave in range(self.sampler.waves):
                objective = int(self.sampler.assign(step)[wave, self.slot])
                corpus = self.corpora[objective]
                row = self.sampler.row_examples(step, wave, self.slot, self._row_samples, self.sizes)
                for start in range(first, first + part, b):
                    samples = [corpus[i] for i in row[start : start + b]]
                    batch = collate(samples, self.seq_length, self.pad_id)
                    yield batch | {"objective": torch.tensor([objective])}
            step += 1

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return next(self._batches)
