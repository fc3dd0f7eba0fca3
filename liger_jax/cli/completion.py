"""`liger-jax completion`."""

from typing import Annotated, Literal

import tyro

from liger_jax.cli.app import CONFIG, app


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Print a completion script for a shell.

    For bash: `liger-jax completion bash > ~/.local/share/bash-completion/completions/liger-jax`.

    Args:
        shell: The shell to complete commands and flags in.
    """
    app.cli(args=["--tyro-write-completion", shell, "-"], prog="liger-jax", config=CONFIG)
