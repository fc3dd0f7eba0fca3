"""The command line of the benchmarks: `python -m benchmarks COMMAND`; `--help` lists the commands."""

import sys

import tyro

from benchmarks.convergence import Convergence
from benchmarks.faults import Faults
from benchmarks.generate import Generate
from benchmarks.memory import Memory
from benchmarks.ops import Ops
from benchmarks.scaling import Scaling
from benchmarks.soak import Soak
from benchmarks.start import Start
from benchmarks.tables import Tables
from benchmarks.train import Train
from liger_jax.errors import UserError

COMMANDS = Ops | Train | Generate | Start | Convergence | Faults | Soak | Memory | Scaling | Tables


def main() -> None:
    """Runs one benchmark and prints where its results are. Prints a user's mistake as one line."""
    try:
        benchmark = tyro.cli(
            COMMANDS,
            prog="python -m benchmarks",
            description="Measures liger-jax and other packages on this machine's GPU, and writes tables of the results.",
        )
        print(benchmark.run())
    except UserError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
