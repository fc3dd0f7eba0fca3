"""Runs scripts in separate processes, for tests that set flags of JAX or measure a whole process."""

import os
import subprocess
import sys
import textwrap


def run_script(script: str, *arguments, environment: dict[str, str] | None = None) -> str:
    """Returns what the script prints, after asserting that it succeeds. It receives the arguments as strings."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (environment or {}),
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
