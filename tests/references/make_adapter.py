#!/usr/bin/env python
"""Writes a PEFT adapter for the tiny model of make_model.py, and the values that PEFT computes with it.

    pip install torch==2.13.0 transformers==5.17.0 peft==0.21.2
    python tests/references/make_adapter.py               # 10 s; writes next to this file

Files
  adapter/      written by save_pretrained: LoRA of all linear layers; B is random, as after training
  adapter.npz   for the scenario "image": logits, loss, and the gradients of A and B under their names in the file
"""

import json
from pathlib import Path

import numpy as np
import torch
from make_model import make_scenarios, token_types
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLForConditionalGeneration

HERE = Path(__file__).parent


def main():
    torch.set_num_threads(1)
    torch.manual_seed(5)
    load = Qwen2VLForConditionalGeneration.from_pretrained
    base = load(HERE / "model_untied", dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    inputs = make_scenarios(np.random.default_rng(9))[0]["image"]
    output = model.eval()(**inputs, mm_token_type_ids=token_types(inputs["input_ids"]), use_cache=False)
    output.loss.backward()
    arrays = {"logits": output.logits, "loss": output.loss}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            arrays[f"grad/{name.replace('.default', '')}"] = weight.grad
    np.savez_compressed(HERE / "adapter.npz", **{key: value.detach().numpy() for key, value in arrays.items()})

    model.peft_config["default"].base_model_name_or_path = None  # otherwise a local path
    model.save_pretrained(HERE / "adapter")
    (HERE / "adapter" / "README.md").unlink()
    config = HERE / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2) + "\n")


if __name__ == "__main__":
    main()
