"""What tests of preprocessing share: runs in a process of their own, and directories compared byte by byte."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(out: Path) -> set[str]:
    """Names in the directory of `out`, hidden ones too."""
    return {path.name for path in out.parent.iterdir()}


@dataclass
class Child:
    """A forked process that runs a function in a session of its own."""

    pid: int
    _alive: int
    _output: Path

    def wait(self) -> tuple[int, str]:
        """Exit code (minus the signal, if one ended it) and all it printed, when it and its children are gone."""
        _, status = os.waitpid(self.pid, 0)
        assert os.read(self._alive, 1) == b""  # held by the process and its children: the end is that of the last
        os.close(self._alive)
        return os.waitstatus_to_exitcode(status), self._output.read_text()


def fork(function: Callable[[], int | None], output: Path) -> Child:
    """Run a function in a forked process; what it returns is the exit code.

    Forked because a fresh process takes seconds to import what this one has.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(pid, ours, output)
    code = 99
    try:
        os.close(ours)
        os.setsid()
        with open(output, "w", buffering=1, encoding="utf-8") as stream:
            sys.stdout = sys.stderr = stream
            try:
                code = function() or 0
            except BaseException:
                traceback.print_exc(file=stream)
    finally:
        os._exit(code)
