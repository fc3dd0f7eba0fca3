"""`python -m convert SRC DST`: a Hugging Face checkpoint to an Orbax folder, or back."""

import argparse
import shutil
import sys
import time
from pathlib import Path

# What stands beside the weights: tokenizer, chat template, image processor, how to generate.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def convert(
    source: str,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> str:
    """Converts the model at `source` (folder or hub id) to the folder `target`; -> a line that says what was done.

    Args:
        source: an Orbax folder (`save_model`, or a training run: its latest step), a Hugging Face folder, or a hub id.
        target: the folder to write. Tokenizer and processor files are copied along. LoRA is merged into the weights for
            Hugging Face; `save_adapter` writes it by itself.
        to: "orbax" or "hf"; None: what `source` is not.
        dtype: of the weights; None: bfloat16 from Hugging Face, as they are from Orbax.
        max_shard_size: of Hugging Face files, see `to_hf`.
        revision, allow_pickle: see `from_hf`.
        overwrite: write into a folder that has files in it.

    Raises:
        FileExistsError: `target` has files in it.
        FileNotFoundError, ValueError: as `from_hf`, `to_hf` and `load_model` do.
    """
    started = time.perf_counter()
    if to not in (None, "orbax", "hf"):
        raise ValueError(f"to is {to!r}; expected 'orbax', 'hf' or None")
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; --overwrite writes into it")
    if Path(source).exists() and target.resolve() == Path(source).resolve():
        raise ValueError(f"SRC and DST are the same folder, {target}")

    import jax

    from convert.hub import find_checkpoint
    from convert.reader import from_hf
    from convert.writer import to_hf
    from liger_jax.checkpoint import is_model, load_model, save_model
    from liger_jax.model.lora import lora_config, merge_lora

    if is_model(source):
        kind, folder = "orbax", Path(source)
        model = load_model(folder, dtype=dtype)
    else:
        kind, folder = "hf", find_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
        model = from_hf(folder, dtype=dtype or "bfloat16", allow_pickle=allow_pickle)
    to = to or {"orbax": "hf", "hf": "orbax"}[kind]
    if to == "hf":
        model = model if lora_config(model) is None else merge_lora(model)
        to_hf(model, target, max_shard_size=max_shard_size)
    else:
        save_model(model, target, overwrite=overwrite)
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    leaves = jax.tree.leaves(model)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return (
        f"{source} ({kind}) -> {target} ({to}): {count:,} parameters, {size / 1e9:.2f} GB as {leaves[0].dtype}, "
        f"in {time.perf_counter() - started:.1f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="Hugging Face folder or hub id, or an Orbax folder")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument("--to", choices=["orbax", "hf"], help="what to write (default: what SRC is not)")
    parser.add_argument(
        "--dtype", help="bfloat16, float32 or float16 (default: bfloat16 from Hugging Face, else as stored)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest Hugging Face file (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, which can run code")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that has files in it")
    options = vars(parser.parse_args(arguments))
    try:
        print(convert(options.pop("source"), options.pop("target"), **options))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
