"""One torch thread per process: tests fork ranks (helpers/multiprocess.py), which a thread pool does not survive."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  after the setting that it reads

torch.set_num_threads(1)

import pytest  # noqa: E402

from tests.helpers import pretraining  # noqa: E402


@pytest.fixture
def tiny_argv():
    """`tiny_argv(*extra_flags, tp=1, pp=1, steps=6, layers=4)`: Megatron's flags for a tiny GPT on CPU."""
    return pretraining.tiny_argv
