"""Runs scripts in separate processes, for tests that set flags of JAX or measure a whole process."""

import subprocess
import sys
import textwrap


def run_script(script: str, *arguments) -> str:
    """Returns what the script prints, after asserting that it succeeds. It receives the arguments as strings."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
