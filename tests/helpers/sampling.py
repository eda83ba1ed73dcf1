"""All samples of a step, as tests compare them."""

from collections.abc import Sequence

import numpy as np

from megatron_moo.data.sampling.sampler import LanguagePureSampler


def step_examples(sampler: LanguagePureSampler, step: int, n: int, sizes: Sequence[int]) -> np.ndarray:
    """Samples of all rows of a step: [W, D, n]."""
    return np.array(
        [
            [sampler.row_examples(step, wave, slot, n, sizes) for slot in range(sampler.slots)]
            for wave in range(sampler.waves)
        ]
    )
