#!/usr/bin/env python
"""Writes PEFT adapters for the tiny models of make_model.py and make_family.py, and the values that PEFT computes with them.

    pip install torch==2.13.0 transformers==5.17.0 peft==0.21.2      # for the families, transformers==5.24.0
    python -m tests.references.make_adapter                # 10 s; writes next to this file

Files, for Qwen2-VL and, with _<family> in their names, for Qwen2.5-VL and Qwen3-VL
  adapter/      written by save_pretrained: LoRA of all linear layers; B is random, as after training. For Qwen2.5-VL, of
                those that PEFT finds by the names q_proj and gate_proj, the latter in both towers
  adapter.npz   for the scenario "image" ("batch"): logits, loss, and the gradients of A and B under their names in the file
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from tests.references import make_family, make_model

HERE = Path(__file__).parent
TARGETS = {"qwen2_5_vl": ["q_proj", "gate_proj"], "qwen3_vl": "all-linear"}


def record(checkpoint: Path, targets, inputs: dict, name: str, out: Path) -> None:
    torch.manual_seed(5)
    load = AutoModelForImageTextToText.from_pretrained
    base = load(checkpoint, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.1)
    output = model.eval()(**inputs, mm_token_type_ids=make_model.token_types(inputs["input_ids"]), use_cache=False)
    output.loss.backward()
    arrays = {"logits": output.logits, "loss": output.loss}
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            arrays[f"grad/{key.replace('.default', '')}"] = weight.grad
    np.savez_compressed(out / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()})

    model.save_pretrained(out / name)
    (out / name / "README.md").unlink()
    config = out / name / "adapter_config.json"
    options = json.loads(config.read_text()) | {"base_model_name_or_path": None}  # not a local path
    config.write_text(json.dumps(options, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--families", action="store_true", help="only those of the families")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.families:
        inputs = make_model.make_scenarios(np.random.default_rng(9))[0]["image"]
        record(HERE / "model_untied", "all-linear", inputs, "adapter", options.out)
    for family, targets in TARGETS.items():
        inputs = make_family.make_scenarios(family, np.random.default_rng(9))[0]["batch"]
        record(HERE / f"model_{family}", targets, inputs, f"adapter_{family}", options.out)


if __name__ == "__main__":
    main()
