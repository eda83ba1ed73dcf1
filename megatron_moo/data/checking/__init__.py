"""What there is of each language, and what is wrong with it."""
