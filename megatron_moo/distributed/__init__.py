"""Per-objective gradients in Megatron's distributed optimizer: exchange, Gramian, combination.

    from megatron_moo.distributed import MooConfig, install

    moo = install(model, MooConfig(objectives=languages, method="cagrad", granularity="layer"), assign)

See :mod:`megatron_moo.distributed.sync` for the way of a gradient through a step and
:mod:`megatron_moo.distributed.exchange` for the protocol.
"""

from megatron_moo.distributed.buckets import BucketSize
from megatron_moo.distributed.config import GRANULARITIES, NON_FINITE, PREFERENCES, SCOPES, WAVE_MEMORIES, MooConfig
from megatron_moo.distributed.record import StepRecord
from megatron_moo.distributed.slots import num_slots
from megatron_moo.distributed.sync import BucketLevelMoo, install

__all__ = [
    "GRANULARITIES",
    "NON_FINITE",
    "PREFERENCES",
    "SCOPES",
    "WAVE_MEMORIES",
    "BucketLevelMoo",
    "BucketSize",
    "MooConfig",
    "StepRecord",
    "install",
    "num_slots",
]
