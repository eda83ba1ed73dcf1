"""Megatron's training loop with our arguments, data and hooks; the only package that reads ``get_args()``."""
