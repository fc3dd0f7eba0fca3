"""`liger-jax completion`."""

from typing import Annotated, Literal

import tyro

from liger_jax.cli.app import CONFIG, app


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Print a completion script for a shell.

    For bash, write it to ~/.local/share/bash-completion/completions/liger-jax; for zsh, to a file _liger-jax in a folder of
    $fpath; for fish, to ~/.config/fish/completions/liger-jax.fish. Create the folder if it does not exist. In bash,
    `source <(liger-jax completion bash)` completes in the current shell.

    Args:
        shell: The shell to complete commands and flags in.
    """
    app.cli(args=["--tyro-write-completion", shell, "-"], prog="liger-jax", config=CONFIG)
