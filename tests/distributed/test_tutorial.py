"""docs/data.md as a newcomer reads it: every command runs, in order, and prints what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FENCED = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BORDERS = re.compile(r"[\s│┃─━]+")


def _plain(text: str) -> str:
    """One space between words, no borders: tables are as wide as the terminal."""
    return BORDERS.sub(" ", text).strip()


def test_every_command_of_the_tutorial_prints_what_it_says(tmp_path):
    """Would catch: a page that a change has left behind; an option, a figure or a step that is no longer true."""
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    blocks = FENCED.findall((REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks].count("sh") >= 8
    output = ""
    for kind, text in blocks:
        if kind == "text":
            printed = {_plain(line) for line in output.splitlines()}
            for line in filter(None, map(_plain, text.splitlines())):
                assert any(line in found for found in printed), f"not printed: {line}\n{output}"
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        output = done.stdout
        assert done.returncode == 0, f"{text}\n{output[-4000:]}"
