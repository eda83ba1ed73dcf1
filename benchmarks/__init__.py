"""Side-by-side measurements: each script prints a table and writes JSON. `make bench` runs them; `_*.py` are theirs."""
