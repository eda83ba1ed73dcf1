"""Megatron-MOO: multilingual fine-tuning as multi-objective optimisation inside Megatron's optimizer."""

__version__ = "0.1.0"
