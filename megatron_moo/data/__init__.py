"""Multilingual supervised data: from JSONL rows to language-pure micro-batches.

rows, tokenizers   what goes in: validated rows, and text to ids
preprocess         JSONL -> Megatron's indexed files with a mask pair, and a manifest
manifest, corpus   the prepared data, checked and memory-mapped
sampler, rotation  which language and which samples each gradient row of a step takes; subsets of languages by turns
batches            the micro-batches of one data-parallel rank

manifest = Manifest.load("data/prepared")
sampler = LanguagePureSampler(len(manifest.objectives), slots=2, waves=4, seed=1)
for batch in MicroBatches(manifest, "train", sampler, slot=0, micro_batch_size=8, micro_batches_per_wave=1,
                          seq_length=64, pad_id=manifest.tokenizer.eod):
    ...
"""

from megatron_moo.data.batches import MicroBatches, collate
from megatron_moo.data.corpus import Corpus
from megatron_moo.data.files import DataError
from megatron_moo.data.manifest import Entry, Manifest, TokenizerInfo
from megatron_moo.data.rows import EvalRow, Row, Segment, read_eval_rows, read_rows
from megatron_moo.data.sampler import LanguagePureSampler
from megatron_moo.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "Entry",
    "EvalRow",
    "LanguagePureSampler",
    "Manifest",
    "MicroBatches",
    "Row",
    "Segment",
    "Tokenizer",
    "TokenizerInfo",
    "collate",
    "load_tokenizer",
    "read_eval_rows",
    "read_rows",
]
