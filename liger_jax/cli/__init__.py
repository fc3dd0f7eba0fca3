"""The command line: `liger-jax demo | finetune | generate | chat | plan | convert | tune | env | completion`.

Each command has its own file. It parses its arguments, loads what it needs and calls the library. Heavy packages are
imported inside the commands, so that --help is quick.
"""

import sys
from collections.abc import Sequence

from liger_jax import __version__


def main(arguments: Sequence[str] | None = None, prog: str = "liger-jax") -> None:
    """Runs a command, see `liger_jax.cli.program.run`, or prints the version.

    Args:
        arguments: the command and its arguments; by default those of the process.
        prog: name of the program in help texts.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print("liger-jax", __version__)
        return
    from liger_jax.cli.program import run  # imports tyro, which --version does not need

    run(arguments, prog)
