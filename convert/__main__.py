"""`python -m convert SRC DST`, the same command as `liger-jax convert SRC DST`."""

import sys
from collections.abc import Sequence

from liger_jax import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments; None: those of the process."""
    cli.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
