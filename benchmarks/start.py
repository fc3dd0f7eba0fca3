"""`python -m benchmarks start`: the time from process start to the first token, with a cold and a warm compilation cache.

The process does the work of `liger-jax generate FOLDER "..." --images IMAGE`, except for decoding tokens to text, and times
each part. The weights have just been written, so they are in the page cache: "cold" refers only to the compilation cache.

python -m benchmarks.start write qwen2_vl_2b FOLDER   # random weights with a tokenizer, as an Orbax checkpoint
python -m benchmarks.start answer FOLDER              # prints one line of JSON
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.environment import RESULTS, check_for_gpu, versions_of
from benchmarks.model import Size, model_name, preset_name
from benchmarks.record import OURS, record_result

IMAGE = (896, 896)  # 64 x 64 patches of 14 pixels, or 56 x 56 of 16
QUESTION = "What is in this image?"
NEW_TOKENS = 64  # the first comes from prefill, the others from the decoding loop, which is a separate program
PACKAGES = ("jax", "flax", "orbax-checkpoint")
# JAX's events for compiling a program. Reading a program from the cache counts as compiling. The remaining time to the first
# token is tracing and running.
PROGRAMS = {
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling": "/jax/core/compile/backend_compile_duration",
}
MODULE = "benchmarks.start"
START_TIME = "LIGER_JAX_BENCHMARK_START"  # the environment variable with the start time of the process


@dataclasses.dataclass(frozen=True)
class Start:
    """Measures the time from process start to the first token about an image, with a cold and a warm compilation cache.

    Reads the weights from an Orbax checkpoint and from Hugging Face files, reports the time of each part, and writes
    model.json.
    """

    size: Size = "2b"
    """The model: 2b and 7b are Qwen2-VL. Its weights are random."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        check_for_gpu()
        with tempfile.TemporaryDirectory() as temporary:
            return measure(preset_name(self.size), self.results / "model.json", Path(temporary))


def measure(name: str, file: Path, temporary: Path) -> Path:
    """Measures all four cases. `name`: the preset of `QwenVLConfig`. Returns the file of results."""
    # The processes run one after the other, so that each has all GPU memory.
    folders = {"Orbax": temporary / "orbax", "Hugging Face's files": temporary / "hf"}
    orbax, hf = folders.values()
    subprocess.run([sys.executable, "-m", MODULE, "write", name, orbax], check=True)
    subprocess.run([sys.executable, "-m", "convert", orbax, hf], check=True)
    for weights, folder in folders.items():
        for programs in ("cold", "warm"):
            result = answer_in_new_process(folder, temporary / f"cache_{folder.name}")
            case = {"package": OURS, "model": model_name(name), "devices": 1, "what": "start"}
            record_result(file, {**case, "weights": weights, "programs": programs, **result})
    return file


def answer_in_new_process(folder: Path, cache: Path) -> dict:
    """Returns the result of `answer` in a new process, whose compilation cache is in the folder `cache`."""
    caches = {"XDG_CACHE_HOME": str(cache), "CUDA_CACHE_PATH": str(cache / "cuda")}
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name} | caches
    command = [sys.executable, "-m", MODULE, "answer", folder]
    environment[START_TIME] = str(time.time())
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def write(name: str, folder: Path) -> None:
    """Writes a model of real size with random weights, and the demo's tokenizer, whose vocabulary is smaller."""
    from liger_jax import Processor, QwenVL, QwenVLConfig
    from liger_jax.checkpoint import save_model
    from liger_jax.demo.tokenizer import train_tokenizer

    config = getattr(QwenVLConfig, name)()
    processor = Processor(train_tokenizer([]), family=config.family)
    ids = {f"{kind}_token_id": number for kind, number in processor.token_ids.items()}
    for end in ("start", "end"):
        ids[f"vision_{end}_token_id"] = processor.tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
    save_model(QwenVL.init(dataclasses.replace(config, **ids)), folder)
    processor.save_pretrained(folder)


def answer(folder: Path) -> dict:
    """Answers a question about an image. Returns the seconds to the first token, in total and by part, and of the rest."""
    names, times = [], [float(os.environ[START_TIME])]

    def done(part: str) -> None:
        names.append(part)
        times.append(time.time())

    import jax
    import numpy as np

    from convert import open_model
    from liger_jax import Processor, prepare, runtime
    from liger_jax.generation.options import GenerationOptions
    from liger_jax.generation.session import DecodeSession

    done("imports")
    runtime.enable_compilation_cache()
    device = jax.devices()[0].device_kind
    done("device")
    processor = Processor.from_pretrained(folder)
    done("tokenizer")
    model = jax.block_until_ready(open_model(str(folder)))
    done("weights")
    image = np.random.default_rng(0).integers(0, 256, (*IMAGE, 3), dtype=np.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    arrays = processor([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = prepare(model.config, **arrays)
    done("image")
    spent = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: spent.update({event: seconds}))
    chunks = DecodeSession.start(model, batch, GenerationOptions(max_new_tokens=NEW_TOKENS, eos_token_id=())).chunks()
    next(chunks)
    done("first token")
    programs = {name: spent[event] for name, event in PROGRAMS.items()}
    for _ in chunks:
        pass
    return {
        "seconds": times[-1] - times[0],
        "parts": {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)},
        "first_token_parts": programs,
        "rest_s": time.time() - times[-1],
        "device": device,
        "versions": versions_of(PACKAGES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("write")
    command.add_argument("name")
    command.add_argument("folder", type=Path)
    commands.add_parser("answer").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        write(args.name, args.folder)
    else:
        print(json.dumps(answer(args.folder)))


if __name__ == "__main__":
    main()
