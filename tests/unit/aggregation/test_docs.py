"""docs/aggregators.md says what is there: every method and wrapper with its options, and an example that runs."""

import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_moo.aggregation import AGGREGATORS, WRAPPERS, build_aggregator

PAGE = (Path(__file__).parents[3] / "docs" / "aggregators.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*AGGREGATORS, *WRAPPERS])
def test_every_method_and_wrapper_is_in_a_table_with_its_options(name):
    """A method that nobody learns of, or a default that has changed since the page was written."""
    kind = AGGREGATORS.get(name) or WRAPPERS[name]
    row = next(line for line in PAGE.splitlines() if re.match(rf"\| `{name}` \|.*\|.*\|", line))
    for option, described in kind.options.items():
        default = described.default if isinstance(described.default, str) else f"{described.default:g}"
        assert f"`{option}` ({default})" in row
    if name in AGGREGATORS:
        assert f"(`{name}`). " in PAGE


def test_nothing_is_left_to_fill_in():
    """A heading whose table was forgotten."""
    assert not re.search(r"^(MEASURED|SUMMARY|TODO|TBD)", PAGE, re.MULTILINE)


def test_the_example_of_an_own_method_runs(tmp_path, monkeypatch):
    """A ten-line example that ten lines of Python do not accept."""
    source = re.search(r"```python\n# lengths.py\n(.*?)```", PAGE, re.DOTALL).group(1)
    (tmp_path / "lengths.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        rows = torch.diag_embed(torch.tensor([[1.0, 10.0, 100.0]]))
        weights = build_aggregator("lengths:ByLength", wrappers={"rescale": {}})(rows @ rows.mT)
        contributions = (weights.float()[:, None, :] @ rows).squeeze(1)
        assert torch.allclose(contributions, contributions[:, :1].expand(1, 3))
    finally:
        sys.modules.pop("lengths", None)
