#!/usr/bin/env python
"""Writes reference values for Qwen2.5-VL and Qwen3-VL: tiny random models, and the outputs of Hugging Face transformers.

    pip install torch==2.13.0 transformers==5.24.0        # the CPU builds suffice
    python -m tests.references.make_family                # 30 s; writes next to this file

Files, for each family
  model_<family>/   a checkpoint written by save_pretrained, in the hub's spelling
  <family>.npz      <scenario>/<model input>, with pixels as float16, exactly; prompt/<scenario>/<model input>: the rows cut
                    before the answer, left-padded; <scenario>/<output>: layers, logits, loss, gradients under hub names, and
                    tokens of greedy generation; logits_max: with the positions of transformers 4 (see make_model.py).
                    back_to_back has the pixels and grids of two_images

The inputs follow make_model.py. Qwen2.5-VL: windows that the edge of an image cuts off, a frame narrower than a window, and
videos of 1.0, 0.5 and 1.5 seconds per grid row. Qwen3-VL: videos as one block per frame with text between, a position table
that is interpolated up and down, a head size other than width / heads.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.references import make_model as base
from tests.references.make_model import IM_END, IM_START, IMAGE, KINDS, TEXT, VIDEO, VISION_END, VISION_START

HERE = Path(__file__).parent
PATCH = 4  # pixels a side: small files
VISION = {"depth": 4, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": PATCH}
CONFIGS = {
    "qwen2_5_vl": {
        "text_config": TEXT,
        "vision_config": VISION
        | {"intermediate_size": 36, "window_size": 8 * PATCH, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
    },
    "qwen3_vl": {
        # 4 heads of 16 in a width of 32; layer 2 adds no deepstack features
        "text_config": TEXT
        | {"head_dim": 16, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
        | {"rope_parameters": {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 5000000.0}},
        "vision_config": VISION
        | {"intermediate_size": 40, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
    },
}
SEEDS = {"qwen2_5_vl": 109, "qwen3_vl": 5}
TIED = {"qwen2_5_vl": False, "qwen3_vl": True}
GRADIENTS = ("batch", "batch_text")
GRIDS = {
    "qwen2_5_vl": {
        "large": [1, 10, 18],
        "window": [1, 8, 8],
        "small": [1, 4, 6],
        "video": [2, 4, 10],
        "long": [3, 4, 4],
    },
    "qwen3_vl": {"large": [1, 6, 10], "window": [1, 4, 4], "small": [1, 2, 2], "video": [2, 4, 6], "long": [3, 2, 4]},
}


def make_model(family: str, seed: int, **changes):
    config = transformers.AutoConfig.for_model(
        family,
        **{"tie_word_embeddings": TIED[family]} | CONFIGS[family] | changes,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    base.randomize(model, seed)
    return model


def hub_name(family: str):
    return base.hub_name if family == "qwen2_5_vl" else lambda name: name


def make_scenarios(family: str, rng: np.random.Generator) -> tuple[dict, dict]:
    """Returns {name: model inputs}, and {name: the same inputs cut before the answers}."""
    g, inputs, prompts = GRIDS[family], {}, {}

    def words(count):
        return rng.integers(3, 149, size=count).tolist()

    def block(kind, tokens):
        return [VISION_START] + [kind] * tokens + [VISION_END]

    def media(kind, grid):
        tokens = int(np.prod(grid[1:])) // 4
        if kind == IMAGE or family == "qwen2_5_vl":
            return block(kind, grid[0] * tokens)
        return [token for _ in range(grid[0]) for token in (*words(2), *block(kind, tokens))]  # a timestamp before each

    def add(name, *rows, seconds=None):
        turns, grids = [], {IMAGE: [], VIDEO: []}
        for parts in rows:
            ids = [IM_START, *words(2)]
            for part in parts:
                if isinstance(part, int):
                    ids += words(part)
                else:
                    kind, grid = part[0], g[part[1]]
                    ids += media(kind, grid)
                    grids[kind].append(grid)
            turns.append(([*ids, IM_END, *words(1), IM_START, *words(1)], [*words(6), IM_END]))
        vision = {}
        for (pixels, grid), items in zip(KINDS.values(), grids.values(), strict=True):
            if items:
                vision[grid] = torch.tensor(items)
                shape = int(vision[grid].prod(-1).sum()), 3 * 2 * PATCH**2
                vision[pixels] = torch.from_numpy(rng.normal(size=shape).astype(np.float16)).float()
        if seconds and family == "qwen2_5_vl":
            vision["second_per_grid_ts"] = torch.tensor(seconds)
        inputs[name] = base.pad(turns, "left") | vision
        prompts[name] = base.pad([(question, []) for question, _ in turns], "left") | vision
        del prompts[name]["labels"]

    add("text", [7], [12])
    add("image", [2, (IMAGE, "large"), 4])
    add(
        "batch",
        [(IMAGE, "window"), 2, (IMAGE, "small"), 3],
        [1, (VIDEO, "video"), 2, (IMAGE, "small"), 1],
        seconds=[1.5],
    )
    add("batch_text", [9], [1, (IMAGE, "large"), 2])
    add("videos", [(VIDEO, "long"), 2, (VIDEO, "video"), 1, (VIDEO, "long"), 3], seconds=[0.5, 1.5, 1.0])
    add("two_images", [(IMAGE, "window"), 2, (IMAGE, "small"), 3])
    return inputs, prompts


def max_rule(family: str, values: dict) -> torch.Tensor:
    """Returns the positions in which text after a video starts above all of its positions."""
    if family == "qwen3_vl" and "video_grid_thw" in values:  # each frame has a grid of its own
        grid = values["video_grid_thw"]
        values = values | {"video_grid_thw": torch.repeat_interleave(grid, grid[:, 0], dim=0).clone()}
        values["video_grid_thw"][:, 0] = 1
    return base.max_rule(**values, time_steps=[2 * float(seconds) for seconds in values.get("second_per_grid_ts", [])])[
        0
    ]


class FamilyRecorder(base.Recorder):
    def vision(self, name, inputs):
        """Records the tower's outputs in the order of the inputs: transformers returns those of blocks by window."""
        visual = self.model.model.visual
        for kind, (pixels, grid) in KINDS.items():
            if grid not in inputs:
                continue
            layers = {}

            def capture(key, layers=layers):
                return lambda module, args, out: layers.update({key: out})

            hooks = [b.register_forward_hook(capture(f"{kind}_vision_block{i}")) for i, b in enumerate(visual.blocks)]
            with torch.no_grad():
                out = visual(inputs[pixels], grid_thw=inputs[grid])
            for hook in hooks:
                hook.remove()
            if hasattr(visual.config, "window_size"):
                from transformers.vision_utils import get_vision_window_index

                index, _ = get_vision_window_index(inputs[grid], 2, visual.config.window_size, visual.config.patch_size)
                order = torch.argsort(index)
                layers = {key: x.reshape(len(order), 4, -1)[order].reshape(x.shape) for key, x in layers.items()}
            features = getattr(out, "deepstack_features", None) or []
            deepstack = {f"{kind}_deepstack{i}": x for i, x in enumerate(features)}
            self.put(name, **layers, **deepstack, **{f"{kind}_features": out.pooler_output})


def record(family: str) -> tuple[object, dict[str, np.ndarray]]:
    model = make_model(family, SEEDS[family])
    inputs, prompts = make_scenarios(family, np.random.default_rng(9))
    recorder = FamilyRecorder(model, hub_name(family))
    for scenario, values in inputs.items():
        recorder.vision(scenario, values)
        recorder.training(scenario, values, gradients=scenario in GRADIENTS)
        if scenario != "two_images":
            recorder.generation(scenario, prompts[scenario])
        for folder, arrays in ((scenario, values), (f"prompt/{scenario}", prompts[scenario])):
            for key, value in arrays.items():
                if "pixel" not in key:
                    recorder.arrays[f"{folder}/{key}"] = value.numpy()
                elif folder == scenario:
                    recorder.arrays[f"{folder}/{key}"] = value.numpy().astype(np.float16)
    adjacent = base.back_to_back(inputs["two_images"])
    recorder.arrays |= {
        f"back_to_back/{key}": adjacent[key].numpy() for key in ("input_ids", "labels", "attention_mask")
    }
    with torch.no_grad():
        out = recorder.forward(adjacent, position_ids=max_rule(family, adjacent))
        recorder.put("back_to_back", logits=out.logits, loss=out.loss)
        videos = inputs["videos"]
        recorder.put("videos", logits_max=recorder.forward(videos, position_ids=max_rule(family, videos)).logits)
    print(f"{family}: {len(recorder.arrays)} arrays, closest greedy choice {min(recorder.margins):.3f}")
    assert min(recorder.margins) > 0.03, "too close a choice for float32: take another seed"
    return model, recorder.arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for family in CONFIGS:
        model, arrays = record(family)
        base.save(model, out / f"model_{family}")
        np.savez_compressed(out / f"{family}.npz", **arrays)


if __name__ == "__main__":
    main()
