"""Tokenizers, chat templates, and rows to token ids with a mask of targets."""
