"""`liger-jax convert`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    to: Literal["orbax", "hf"] | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    allow_non_finite: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint to an Orbax folder, or back.

    Args:
        source: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        target: Folder to write.
        to: Format to write; by default, orbax for a Hugging Face source and hf for an Orbax source.
        dtype: bfloat16, float16 or float32; by default bfloat16 for a Hugging Face source, the stored one for Orbax.
        max_shard_size: Maximum size of a Hugging Face weight file.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Also read pytorch_model*.bin files, which can execute code.
        allow_non_finite: Also convert weights that hold NaN or infinity, or that overflow the dtype.
        overwrite: Write even if the folder has files.
    """
    from convert.load import convert_checkpoint

    summary = convert_checkpoint(
        source,
        target,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        revision=revision,
        allow_pickle=allow_pickle,
        allow_non_finite=allow_non_finite,
        overwrite=overwrite,
    )
    print(summary)
