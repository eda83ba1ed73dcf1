"""Micro-batches of one slot."""

from itertools import islice

import numpy as np
import pytest
import torch

from megatron_moo.data.batches import MicroBatches, collate
from megatron_moo.data.files import DataError
from megatron_moo.data.preprocess import Request, prepare
from megatron_moo.data.sampler import LanguagePureSampler

PAD = 256


@pytest.fixture
def manifest(corpus_dir, tmp_path):
    """Prepared bytes; a sample has 4 to 10 tokens."""
    return prepare(Request(corpus_dir, tmp_path / "out", tokenizer_type="byte"))[0]


def _batches(
    manifest, slot=0, start=0, seq_length=16, slots=2, waves=2, per_wave=2, peer=0, peers=1, size=3
) -> MicroBatches:
    sampler = LanguagePureSampler(2, slots, waves, seed=5)
    return MicroBatches(manifest, "train", sampler, slot, size, per_wave, seq_length, PAD, start, peer, peers)


def test_targets_are_the_answer_and_its_end():
    """Would catch a shift by one of the labels or of the loss mask."""
    tokens, mask = np.array([10, 11, 20, 21, 2]), np.array([0, 0, 1, 1, 1], dtype=bool)
    batch = collate([(tokens, mask), (tokens[1:], mask[1:])], seq_length=5, pad_id=9)
    assert batch["tokens"].tolist() == [[10, 11, 20, 21, 9], [11, 20, 21, 9, 9]]
    assert batch["labels"].tolist() == [[11, 20, 21, 2, 9], [20, 21, 2, 9, 9]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch["loss_mask"].dtype == torch.float32 and batch["tokens"].dtype == torch.int64
    exact = collate([(tokens, mask)], seq_length=4, pad_id=9)
    assert exact["labels"].tolist() == [[11, 20, 21, 2]]
    with pytest.raises(ValueError, match="5 tokens does not fit in seq_length 3"):
        collate([(tokens, mask)], seq_length=3, pad_id=9)


def test_batches_are_pure_and_in_the_sampler_order(manifest):
    """Would catch a micro-batch of two languages, or one whose objective is not the sampler's."""
    for slot in (0, 1):
        batches = _batches(manifest, slot)
        for step in range(6):
            for wave in range(2):
                objective = batches.sampler.assign(step)[wave, slot]
                rows = batches.sampler.row_examples(step, wave, slot, 6, batches.sizes)
                for part in range(2):
                    batch = next(batches)
                    assert batch["objective"].tolist() == [objective]
                    letters = batch["labels"][batch["loss_mask"].bool()].unique().tolist()
                    assert letters == [ord("de"[objective]), PAD]
                    for i, row in enumerate(rows[3 * part : 3 * part + 3]):
                        tokens, mask = batches.corpora[objective][row]
                        assert batch["tokens"][i, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
                        assert batch["loss_mask"][i].sum() == mask.sum()


def test_peers_of_a_slot_share_its_rows(manifest):
    """Would catch: samples read twice, or left out, where several data-parallel ranks form one slot."""
    alone = _batches(manifest, slot=1, per_wave=1, size=12)
    peers = [_batches(manifest, slot=1, peer=peer, peers=2) for peer in range(2)]
    for _ in range(10):
        whole = next(alone)
        parts = [next(peer) for peer in peers for _ in range(2)]
        for key in ("tokens", "labels", "loss_mask"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
        assert {part["objective"].item() for part in parts} == {whole["objective"].item()}
    assert peers[0].epochs(7) == alone.epochs(7)


def test_resuming_continues_the_stream(manifest):
    """Would catch a resumed run that sees other data than the uninterrupted one."""
    whole = list(islice(_batches(manifest), 40))
    tail = islice(_batches(manifest, start=7), 12)
    for resumed, expected in zip(tail, whole[7 * 4 :], strict=True):
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_over_long_samples_are_dropped_and_counted(manifest):
    """Would catch truncated answers, or samples that vanish without a word."""
    batches = _batches(manifest, seq_length=6)
    report = {corpus.lang: (corpus.dropped, corpus.dropped + len(corpus)) for corpus in batches.corpora}
    lengths = {lang: manifest.corpus("train", lang).lengths for lang in ("de", "en")}
    assert report == {lang: (int((n > 7).sum()), len(n)) for lang, n in lengths.items()} and report["de"][0] > 0
    for batch in islice(batches, 30):
        ends = (batch["labels"] == PAD) & batch["loss_mask"].bool()
        assert (ends.sum(1) == 1).all(), "every sample keeps its end"
    assert not any(corpus.dropped for corpus in _batches(manifest, seq_length=9).corpora)
    with pytest.raises(DataError, match="no sample .* at most 3 tokens, the shortest has 4; raise --seq-length"):
        _batches(manifest, seq_length=2)


def test_epochs_count_all_slots(manifest):
    """Would catch epochs that are reported per rank."""
    batches = _batches(manifest)
    assert batches.epochs(10) == pytest.approx([10 * 2 * 6 / 30, 10 * 2 * 6 / 20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 2}, r"slot must be in \[0, 2\), got 2"),
        ({"peer": 1}, r"peer must be in \[0, 1\), got 1"),
        ({"per_wave": 0}, "micro_batches_per_wave must be at least 1"),
        ({"seq_length": 0}, "seq_length must be at least 1"),
    ],
)
def test_bad_arguments(manifest, change, message):
    """Would catch a rank that silently repeats another's data."""
    with pytest.raises(ValueError, match=message):
        _batches(manifest, **change)


def test_sampler_and_manifest_must_agree(manifest):
    """Would catch objectives without data."""
    with pytest.raises(ValueError, match="for 3 objectives, the manifest has 2"):
        MicroBatches(manifest, "train", LanguagePureSampler(3, 1, 1), 0, 1, 1, 8, PAD)
