"""Opens a model of any format."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from convert.reader import from_hf
from liger_jax import Qwen2VL
from liger_jax.checkpoint import is_model, load_model


def open_model(path_or_repo_id: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> Qwen2VL:
    """Returns the model in an Orbax folder, a Hugging Face folder or a hub repository.

    Args:
        path_or_repo_id: an Orbax folder (a saved model or a training run), a Hugging Face folder, or a hub id.
        dtype: of the weights; None: as stored for Orbax, bfloat16 for Hugging Face.
        mesh: devices to place the weights on; None: the default device.

    Raises:
        FileNotFoundError: neither a folder with a model nor a repository that the hub has.
        ValueError: the stored tensors do not fit the configuration.

    Example:
        >>> import tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, save_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(Qwen2VL.init(Qwen2VLConfig.tiny()), folder)
        ...     open_model(folder).config == Qwen2VLConfig.tiny()
        True
    """
    if is_model(path_or_repo_id):
        return load_model(path_or_repo_id, mesh=mesh, dtype=dtype)
    return from_hf(path_or_repo_id, mesh=mesh, dtype=dtype or "bfloat16")
