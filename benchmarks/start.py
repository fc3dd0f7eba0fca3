"""`liger-jax bench start`: from the start of a process to the first token of an answer, with and without compiled programs.

The process does what `liger-jax generate FOLDER "..." --images PICTURE` does, up to tokens and with a clock between its
parts. The weights were just written, so the machine has them in memory; what is cold is the cache of programs alone.

python -m benchmarks.start write qwen2_vl_2b FOLDER   # random weights with a tokenizer, as an Orbax checkpoint
python -m benchmarks.start answer FOLDER              # prints a line of JSON
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks import work
from benchmarks.ops import check_for_gpu, versions_of

PICTURE = (896, 896)  # 64 x 64 patches
QUESTION = "What is in this picture?"
TOKENS = 64  # of the answer; behind the first comes a loop, which is another program
PACKAGES = ("jax", "flax", "orbax-checkpoint")
# What becoming a program takes, of the first token; the rest is tracing and running. Reading one is called compiling, too.
PROGRAMS = {
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling": "/jax/core/compile/backend_compile_duration",
}
MODULE = "benchmarks.start"
BEGAN = "LIGER_JAX_BENCH_BEGAN"  # the variable with the time at which the process was started


def run(size: str, directory: Path) -> Path:
    """Measures and writes; see `liger-jax bench start --help`. -> the file of results."""
    check_for_gpu()
    with tempfile.TemporaryDirectory() as temporary:
        return measure(f"qwen2_vl_{size}", directory / "model.json", Path(temporary))


def measure(name: str, file: Path, temporary: Path) -> Path:
    """`name`: how `Qwen2VLConfig` calls the model."""
    # the processes come one after the other, so that each has all of the GPU's memory
    folders = {"Orbax": temporary / "orbax", "Hugging Face's files": temporary / "hf"}
    orbax, hf = folders.values()
    subprocess.run([sys.executable, "-m", MODULE, "write", name, orbax], check=True)
    subprocess.run([sys.executable, "-m", "convert", orbax, hf], check=True)
    for weights, folder in folders.items():
        for programs in ("cold", "warm"):
            found = answer_in_new_process(folder, temporary / f"cache of {folder.name}")
            case = {"package": work.OURS, "model": name.replace("_", "-"), "devices": 1, "what": "start"}
            work.keep(file, {**case, "weights": weights, "programs": programs, **found})
    return file


def answer_in_new_process(folder: Path, cache: Path) -> dict:
    """The line that `answer` prints, with compiled programs in `cache`, as `enable_compilation_cache` puts them there."""
    caches = {"XDG_CACHE_HOME": str(cache), "CUDA_CACHE_PATH": str(cache / "cuda")}
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name} | caches
    command = [sys.executable, "-m", MODULE, "answer", folder]
    environment[BEGAN] = str(time.time())
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(name: str, folder: Path) -> None:
    """A model of real size with random weights, and the demo's tokenizer: its vocabulary is smaller, which costs nothing."""
    import dataclasses

    from liger_jax import Processor, Qwen2VL, Qwen2VLConfig
    from liger_jax.checkpoint import save_model
    from liger_jax.demo.tokenizer import train_tokenizer

    processor = Processor(train_tokenizer([]))
    ids = {f"{kind}_token_id": number for kind, number in processor.token_ids.items()}
    for end in ("start", "end"):
        ids[f"vision_{end}_token_id"] = processor.tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
    config = dataclasses.replace(getattr(Qwen2VLConfig, name)(), **ids)
    save_model(Qwen2VL.init(config), folder)
    processor.save_pretrained(folder)


def answer(folder: Path) -> dict:
    """-> seconds from the start of the process to the first token of an answer, those of each part, and of the rest."""
    names, times = [], [float(os.environ[BEGAN])]

    def done(part: str) -> None:
        names.append(part)
        times.append(time.time())

    import jax
    import numpy as np

    from convert import open_model
    from liger_jax import Processor, prepare, runtime
    from liger_jax.generation.loop import start_decoding
    from liger_jax.generation.options import GenerationOptions

    done("imports")
    runtime.enable_compilation_cache()
    device = jax.devices()[0].device_kind
    done("device")
    processor = Processor.from_pretrained(folder)
    done("tokenizer")
    model = jax.block_until_ready(open_model(str(folder)))
    done("weights")
    picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    arrays = processor([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = prepare(model.config, **arrays)
    done("picture")
    spent = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: spent.update({event: seconds}))
    tokens = iter(start_decoding(model, batch, GenerationOptions(max_new_tokens=TOKENS, eos_token_id=())))
    next(tokens)
    done("first token")
    programs = {name: spent[event] for name, event in PROGRAMS.items()}
    for _ in tokens:
        pass
    return {
        "seconds": times[-1] - times[0],
        "parts": {name: end - begin for name, begin, end in zip(names, times, times[1:], strict=False)},
        "first_token_parts": programs,
        "rest_s": time.time() - times[-1],
        "device": device,
        "versions": versions_of(PACKAGES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("write")
    command.add_argument("name")
    command.add_argument("folder", type=Path)
    commands.add_parser("answer").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "write":
        write(args.name, args.folder)
    else:
        print(json.dumps(answer(args.folder)))


if __name__ == "__main__":
    main()
