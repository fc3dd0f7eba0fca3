"""Which files of a hub repository a converter reads or hands on."""

from pathlib import Path

from liger_jax.files import local_folder

# Pickles are left on the server unless they are asked for.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
PICKLES = ("pytorch_model*.bin",)


def find_checkpoint(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> Path:
    """The folder of a checkpoint, downloaded from the hub if `path_or_repo_id` is no folder here; see `local_folder`."""
    patterns = PATTERNS + PICKLES if allow_pickle else PATTERNS
    return local_folder(path_or_repo_id, patterns, revision=revision, cache_dir=cache_dir)
