"""What is on this machine: CUDA, NVIDIA's Apex.

Every probe is a function that looks when it is called; none imports what it looks for, so a broken installation is
reported and not run into.
"""

import importlib.machinery
import importlib.util
from typing import Literal

import torch


def cuda_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def nvidia_apex_status() -> Literal["absent", "nvidia", "pypi"]:
    """Which package answers to `import apex`: none, NVIDIA's, or another one.

    The project named apex on PyPI is a web toolkit unrelated to NVIDIA's Apex, which is not on PyPI.  Megatron asks
    only whether `import apex` works.  NVIDIA's is told by the subpackages Megatron uses.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    places = spec.submodule_search_locations or []
    parts = ("optimizers", "multi_tensor_apply")
    found = all(importlib.machinery.PathFinder.find_spec(f"apex.{part}", list(places)) for part in parts)
    return "nvidia" if found else "pypi"


def require_no_pypi_apex() -> None:
    """Refuse to go on with the wrong package named apex.

    Raises:
        RuntimeError: the `apex` that would be imported is not NVIDIA's.
    """
    if nvidia_apex_status() == "pypi":
        spec = importlib.util.find_spec("apex")
        raise RuntimeError(
            f"package apex: must be NVIDIA's or absent, found another project of that name at {spec.origin}. Megatron "
            "would take it for NVIDIA's and fail far from the cause. Run `pip uninstall apex`; NVIDIA's Apex is "
            "optional and is built from https://github.com/NVIDIA/apex, not installed from PyPI."
        )
