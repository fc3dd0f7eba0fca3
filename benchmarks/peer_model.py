"""Measures training and generation with transformers, with or without Liger's kernels, as the peer of benchmarks/model.py.

python -m benchmarks.peer_model write 2b FOLDER           # a checkpoint with random weights, in the hub's layout
python -m benchmarks.peer_model train FOLDER 4 --liger    # prints one line of JSON per batch size
python -m benchmarks.peer_model generate FOLDER 1 16 --cache static
"""

import argparse
import importlib
import json
import sys
import time
import typing
from importlib import metadata
from pathlib import Path

from benchmarks import work
from benchmarks.environment import GIB
from benchmarks.model import Size, load_preset
from liger_jax import QwenVLConfig

try:
    import torch
    import transformers
except ModuleNotFoundError:  # the tests also import this module without torch
    torch = None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_class(folder: str | Path):
    """Returns transformers' class for a checkpoint."""
    (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture)


def write(size: str, directory: str) -> None:
    """Writes a model of real size with random weights, in sharded safetensors."""
    hub = load_preset(size).to_hf()
    model_class = getattr(transformers, hub["architectures"][0])
    torch.manual_seed(0)
    with torch.device(device()):
        model = model_class._from_config(model_class.config_class.from_dict(hub), dtype=torch.bfloat16)
    ends = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    model.generation_config = transformers.GenerationConfig(**ends)
    model.save_pretrained(directory, max_shard_size="4GB")


def load(checkpoint: Path, *, checkpointing: bool = False):
    placement = {"device_map": "cuda"} if device() == "cuda" else {}  # accelerate is needed only for this
    model = model_class(checkpoint).from_pretrained(checkpoint, dtype=torch.bfloat16, **placement)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def use_liger(family: str) -> None:
    """Replaces operations of transformers' models of a family by Liger's kernels, for models that are loaded afterwards."""
    getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{family}")()


def make_inputs(config: QwenVLConfig, batch_size: int, length: int | None = None) -> dict:
    sequences = work.sequences(config, batch_size, length or work.LENGTH)
    arrays = {name: torch.from_numpy(value).to(device()) for name, value in sequences.items()}
    arrays["pixel_values"] = arrays["pixel_values"].bfloat16()
    arrays["mm_token_type_ids"] = (arrays["input_ids"] == config.image_token_id).int()
    return arrays


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def time_steps(model, arrays) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.LEARNING_RATE, weight_decay=1e-4, fused=True)
    model.train()
    seconds, losses = [], []
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(work.WARMUP_STEPS + work.TIMED_STEPS):
        start = time.perf_counter()
        loss = model(**arrays).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    step_s = sorted(seconds[work.WARMUP_STEPS :])[work.TIMED_STEPS // 2]
    return {
        "step_ms": step_s * 1e3,
        "tokens_per_s": arrays["input_ids"].numel() / step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "losses": losses[:3],
    }


def time_generation(model, arrays, cache: str) -> dict:
    model.eval()
    arrays = {name: value for name, value in arrays.items() if name != "labels"}
    options = {"do_sample": False, "cache_implementation": "static"} if cache == "static" else {"do_sample": False}

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**arrays, **options, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        seconds(work.NEW_TOKENS), seconds(1)
    prefill, whole = seconds(1), seconds(work.NEW_TOKENS)
    return {"prefill_ms": prefill * 1e3, "ms_per_token": (whole - prefill) / (work.NEW_TOKENS - 1) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("write")
    command.add_argument("size", choices=typing.get_args(Size))
    command.add_argument("checkpoint")
    for name in ("train", "generate"):
        command = commands.add_parser(name)
        command.add_argument("checkpoint")
        command.add_argument("batch_sizes", type=int, nargs="+")
        command.add_argument("--liger", action="store_true")
        command.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
        command.add_argument("--length", type=int, help="tokens of a sequence")
        command.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    args = parser.parse_args()
    if torch is None:
        sys.exit("benchmarks.peer_model: torch is not installed; expected the extra `bench`")
    if args.command == "write":
        return write(args.size, args.checkpoint)

    checkpoint = Path(args.checkpoint)
    config = QwenVLConfig.from_hf(checkpoint)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.liger:
        use_liger(config.family)
        versions["liger-kernel"] = metadata.version("liger-kernel")
    common = {
        "package": "transformers + Liger" if args.liger else "transformers",
        "model": checkpoint.name,
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "versions": versions,
        "what": args.command,
        **({} if args.length is None else {"tokens": args.length}),
    }
    options = {"remat": "full" if args.checkpointing else "none"} if args.command == "train" else {"cache": args.cache}
    model = load(checkpoint, checkpointing=args.checkpointing)
    for batch_size in args.batch_sizes:
        arrays = make_inputs(config, batch_size, args.length)
        try:
            training = args.command == "train"
            result = time_steps(model, arrays) if training else time_generation(model, arrays, args.cache)
        except torch.OutOfMemoryError as error:
            result = {"error": str(error).split(". ")[0]}
        print(json.dumps({**common, "rows": batch_size, **options, **result}), flush=True)


if __name__ == "__main__":
    main()
