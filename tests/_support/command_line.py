"""Runs commands of `liger-jax` in this process and in new ones."""

import os
import subprocess
import sys
from pathlib import Path

from liger_jax import cli

ROOT = Path(__file__).parents[2]
CALL = "import sys; from liger_jax.cli import main; sys.argv[0] = 'liger-jax'; main()"
FINETUNE_FLAGS = """
    output held-out eval-generate max-new-tokens media skip-broken steps batch-size learning-rate vision-learning-rate
    merger-learning-rate freeze lora lora-alpha lora-targets weight-decay warmup dtype master-weights stochastic-rounding
    pack group-by-length max-pixels accumulate remat unroll save-every keep workers data fsdp tensor sequence seed
    max-skipped-updates coordinator processes process
"""


def run_process(code, *arguments, **environment):
    """Runs Python code in a new process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}  # set by cli.main
    environment = own | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def call(monkeypatch, *arguments):
    """Runs `liger-jax ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["liger-jax", *map(str, arguments)])
    cli.main()
