"""Opens a model in any format, and converts checkpoints between the formats."""

import time
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from convert.reader import find_checkpoint, from_hf
from convert.writer import to_hf
from liger_jax.checkpoint import is_model, load_model, save_model
from liger_jax.errors import UserError
from liger_jax.files import GENERATION_CONFIG, atomic_write, check_new_folder, read_json_object, write_json
from liger_jax.model import QwenVL
from liger_jax.model.lora import lora_config, merge_lora

# Files of a checkpoint that are copied unchanged. They replace the whole group in the target, where a file of an earlier
# checkpoint would take precedence.
COMPANIONS = (
    (GENERATION_CONFIG,),
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.json",
        "chat_template.jinja",
    ),
    ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)


def open_model(
    path_or_repo_id: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, allow_non_finite: bool = False
) -> QwenVL:
    """Returns the model in an Orbax folder, a Hugging Face folder or a hub repository.

    Args:
        path_or_repo_id: an Orbax folder (a saved model or a training run), a Hugging Face folder, or a hub id.
        dtype: dtype of the weights; None: as stored for Orbax, bfloat16 for Hugging Face.
        mesh: devices to place the weights on; None: the default device.
        allow_non_finite: also load weights that hold NaN or infinity, or numbers that become infinite in `dtype`.

    Raises:
        NotFoundError: there is no folder with a model, and no repository on the hub.
        UserError: the stored tensors do not fit the configuration, or hold NaN or infinity.

    Example:
        >>> import tempfile
        >>> from liger_jax import QwenVL, QwenVLConfig, save_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(QwenVL.init(QwenVLConfig.tiny()), folder)
        ...     open_model(folder).config == QwenVLConfig.tiny()
        True
    """
    if is_model(path_or_repo_id):
        return load_model(path_or_repo_id, mesh=mesh, dtype=dtype, allow_non_finite=allow_non_finite)
    return from_hf(path_or_repo_id, mesh=mesh, dtype=dtype or "bfloat16", allow_non_finite=allow_non_finite)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["orbax", "hf"] | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    allow_non_finite: bool = False,
    overwrite: bool = False,
) -> str:
    """Converts a checkpoint from Hugging Face's format to Orbax, or back.

    Tokenizer and processor files are copied, in place of those in the target. For Hugging Face, LoRA is merged into the
    weights; `save_adapter` writes it separately.

    Args:
        source: an Orbax folder (a saved model, or a training run: its latest step), a Hugging Face folder, or a hub id.
        target: the folder to write.
        to: "orbax" or "hf"; None: the opposite of the format of `source`.
        dtype: dtype of the weights; None: bfloat16 from Hugging Face, as stored from Orbax.
        max_shard_size: maximum size of a Hugging Face file, see `to_hf`.
        revision, allow_pickle, allow_non_finite: see `from_hf`.
        overwrite: write into a folder that is not empty.

    Returns:
        A one-line summary.

    Raises:
        AlreadyExistsError: `target` is not empty, or holds a training run.
        NotFoundError, UserError: as for `from_hf`, `to_hf` and `load_model`.
    """
    started = time.perf_counter()
    if to not in (None, "orbax", "hf"):
        raise UserError(f"to is {to!r}; expected 'orbax', 'hf' or None")
    target = Path(target)
    check_new_folder(target, overwrite=overwrite)
    if Path(source).exists() and target.resolve() == Path(source).resolve():
        raise UserError(f"SRC and DST are both {target}; expected different folders")
    if is_model(source):
        source_format: Literal["orbax", "hf"] = "orbax"
        folder = find_checkpoint(source, revision=revision)
        model = load_model(folder, dtype=dtype, allow_non_finite=allow_non_finite)
    else:
        source_format = "hf"
        folder = find_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
        model = from_hf(folder, dtype=dtype or "bfloat16", allow_pickle=allow_pickle, allow_non_finite=allow_non_finite)
    if to is None:
        to = "hf" if source_format == "orbax" else "orbax"
    if to == "hf":
        model = model if lora_config(model) is None else merge_lora(model)
        to_hf(model, target, max_shard_size=max_shard_size)
    else:
        save_model(model, target, overwrite=overwrite, allow_non_finite=allow_non_finite)
    _copy_companions(folder, target)
    # the end tokens of a source whose config.json alone names them
    if model.config.eos_token_ids and read_json_object(target / GENERATION_CONFIG).get("eos_token_id") is None:
        settings = read_json_object(target / GENERATION_CONFIG)
        write_json(target / GENERATION_CONFIG, settings | {"eos_token_id": list(model.config.eos_token_ids)})
    leaves = jax.tree.leaves(model)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    return (
        f"{source} ({source_format}) -> {target} ({to}): {count:,} parameters, {amount} as "
        f"{leaves[0].dtype}, in {time.perf_counter() - started:.1f} s"
    )


def _copy_companions(source: Path, target: Path) -> None:
    """Copies the generation settings, the tokenizer and the processor that a checkpoint has."""
    for group in COMPANIONS:
        names = [name for name in group if (source / name).is_file()]
        for name in names:
            # replaces a link, instead of writing to the file that it points to
            atomic_write(target / name, (source / name).read_bytes())
        for name in set(group).difference(names) if names else ():
            (target / name).unlink(missing_ok=True)
