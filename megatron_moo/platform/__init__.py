"""What the machine has, and what Megatron needs to run on it.

- `cpu`: the shim under which Megatron runs without CUDA over gloo.
- `repairs`: repairs to Megatron that are needed on every device.
- `norms`: PyTorch norms that work under sequence parallelism.
- `probes`: which accelerators and accelerated libraries are there.

Importing this package imports neither Megatron nor torch; the modules import torch, and `install()` Megatron.
"""
