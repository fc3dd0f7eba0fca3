"""The same training step and generation by transformers, with or without Liger's kernels.

python benchmarks/peer_model.py /tmp/qwen2-vl-2b --liger --train-rows 4 --results results.json
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from transformers import Qwen2VLForConditionalGeneration

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import work

GIB = 2**30


def inputs(config: dict, rows: int) -> dict[str, torch.Tensor]:
    arrays = {name: torch.from_numpy(value).cuda() for name, value in work.rows(config, rows).items()}
    arrays["pixel_values"] = arrays["pixel_values"].bfloat16()
    arrays["mm_token_type_ids"] = (arrays["input_ids"] == config["image_token_id"]).int()
    return arrays


def train(model, arrays) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, fused=True)
    model.train()
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(work.WARM + work.TIMED):
        start = time.perf_counter()
        loss = model(**arrays).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    step_s = float(np.median(seconds[work.WARM :]))
    return {
        "step_ms": step_s * 1e3,
        "tokens_per_s": arrays["input_ids"].numel() / step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "losses": losses[:3],
    }


@torch.no_grad()
def generate(model, arrays, cache: str) -> dict:
    model.eval()
    arrays = {name: value for name, value in arrays.items() if name != "labels"}
    options = {"do_sample": False, "cache_implementation": "static"} if cache == "static" else {"do_sample": False}

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(**arrays, **options, max_new_tokens=count, min_new_tokens=count)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        seconds(work.NEW_TOKENS), seconds(1)
    prefill, whole = seconds(1), seconds(work.NEW_TOKENS)
    return {"prefill_ms": prefill * 1e3, "ms_per_token": (whole - prefill) / (work.NEW_TOKENS - 1) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--train-rows", type=int, nargs="*", default=[])
    parser.add_argument("--generate-rows", type=int, nargs="*", default=[])
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--results", help="JSON list to add to")
    args = parser.parse_args()
    config = json.loads((pathlib.Path(args.checkpoint) / "config.json").read_text())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.liger:
        import importlib.metadata

        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl

        apply_liger_kernel_to_qwen2_vl()
        versions["liger-kernel"] = importlib.metadata.version("liger-kernel")
    common = {
        "package": "transformers + Liger" if args.liger else "transformers",
        "model": pathlib.Path(args.checkpoint).name,
        "device": torch.cuda.get_device_name(),
        "versions": versions,
    }
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.bfloat16, device_map="cuda")
    for rows in args.generate_rows:
        result = generate(model, inputs(config, rows), args.cache)
        work.record(args.results, **common, what="generate", rows=rows, cache=args.cache, **result)
    for rows in args.train_rows:
        result = train(model, inputs(config, rows))
        work.record(args.results, **common, what="train", rows=rows, length=work.LENGTH, **result)


if __name__ == "__main__":
    main()
