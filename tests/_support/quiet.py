"""What a command may print on stderr."""

import re

from benchmarks.faults import PROGRESS


def assert_quiet(stderr: str, *warnings: str) -> None:
    """Asserts that stderr has one line per warning (a part of its text), lines about its progress, and nothing else."""
    lines = [line for line in stderr.splitlines(keepends=True) if not PROGRESS.fullmatch(line.removesuffix("\n"))]
    assert len(lines) == len(warnings), stderr
    for line, part in zip(lines, warnings, strict=True):
        assert re.fullmatch("warning: .*\n", line) and part in line, stderr
