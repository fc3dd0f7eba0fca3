"""Finds the commands and snippets of README.md and docs/."""

import re
import shlex

# Blocks below `<!-- runs: NAME -->`: the name, the language, and the text.
MARKED = re.compile(r"^<!-- runs: ([^\n]*) -->\n```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(liger-jax|python -m convert|python -m benchmarks) (.*)$", re.MULTILINE)


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Returns this project's commands in a block of bash: the program and its arguments."""
    lines = block.replace("\\\n", " ")
    return [(program, shlex.split(rest, comments=True)) for program, rest in COMMAND.findall(lines)]
