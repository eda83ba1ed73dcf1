"""Shares of the languages, and the manifest that holds them."""
