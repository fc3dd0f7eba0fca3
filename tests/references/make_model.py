#!/usr/bin/env python
"""Writes reference values for the tests: tiny random Qwen2-VL models, and the outputs of Hugging Face transformers.

    pip install torch==2.13.0 transformers==5.17.0        # the CPU builds suffice
    python tests/references/make_model.py                 # 30 s; writes next to this file

A turn consists of random words around images and videos of random pixels. Eleven batches of turns ("scenarios") cover
text, images of several sizes, video, padding on both sides, and text-only rows in a batch with images. Two packed scenarios
and one with images back to back are derived from them.

Files
  model_untied/, model_tied/   checkpoints written by save_pretrained: original hub names, 5.x config
  scenarios.npz   <scenario>/<model input>, and the positions by both rules for the text after an image or video:
                  <scenario>/position_ids_hf5, rope_deltas_hf5 (transformers 5.17), position_ids_max, rope_deltas_max
                  (transformers 4.x, the paper). prompt/<scenario>/<model input>: the rows cut before the answer,
                  left-padded. Pixels are stored exactly, as float16. batch_right and packed_batch_left share those of
                  batch_left, back_to_back those of two_images.
  untied.npz      <scenario>/<output>: every layer, logits, loss, gradients under hub names, tokens of greedy generation
  tied.npz        the same without layers, and with gradients for two scenarios only
  sampling.npz    outputs of the sampling processors for fixed logits

Compare logits only where attention_mask is 1. Seeds are chosen so that no greedy choice is closer than 0.03.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.generation import logits_process

HERE = Path(__file__).parent
# ids in the order of the hub's special tokens, above a small vocabulary of words
VOCAB, FIRST_WORD, LAST_WORD = 160, 3, 149
PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = 150, 151, 152, 155, 156, 158, 159
MERGE = 2
PATCH_VALUES = 3 * 2 * 14 * 14
NEW_TOKENS = 8
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": PAD,
    "eos_token_id": IM_END,
    # head size 8 has 4 frequencies
    "rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0},
}
# The head size is 12: not a power of two, like the published 80.
VISION = {
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
    "hidden_size": 32,
}
MODELS = {"untied": 89, "tied": 4}  # name -> seed
GRIDS = {"a": [1, 4, 6], "b": [1, 6, 4], "c": [1, 2, 2], "d": [1, 4, 4], "v": [3, 4, 4], "w": [2, 2, 6]}
KINDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
TIED_GRADIENTS = ("text_batch_left", "image_video")


# ---- the models


def make_model(name: str, seed: int, text=TEXT, vision=VISION) -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=name == "tied",
    )
    config._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(config).eval()
    randomize(model, seed)
    return model


def randomize(model, seed: int) -> None:
    """Fills all parameters with random numbers: new models have zero biases and unit norms, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                scales = ("norm" in key or "ln_q" in key) and key.endswith("weight")
                p.copy_(scales + 0.2 * noise)
            elif "embed_tokens" in key:
                p.copy_(0.7 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5 * (3.0 if "lm_head" in key else 1.0))


def save(model, folder: Path):
    model.generation_config.eos_token_id = [IM_END, PAD]
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None  # generate() must not stop unless an EOS token is passed


def hub_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


# ---- the scenarios


def make_scenarios(rng: np.random.Generator) -> tuple[dict, dict]:
    """Returns {name: model inputs}, and {name: the same inputs cut before the answers}."""
    inputs, prompts = {}, {}

    def words(count):
        return rng.integers(FIRST_WORD, LAST_WORD, size=count).tolist()

    def turn(*parts, answer=6):
        """Returns a question and its answer. A part is a number of random words, or (IMAGE | VIDEO, grid)."""
        ids = [IM_START, *words(2)]
        for part in parts:
            if isinstance(part, int):
                ids += words(part)
            else:
                kind, grid = part
                ids += [VISION_START] + [kind] * (int(np.prod(grid)) // MERGE**2) + [VISION_END]
        ids += [IM_END, *words(1), IM_START, *words(1)]
        return ids, [*words(answer), IM_END]

    def add(name, turns, side="left", images=(), videos=(), pixels_of=None):
        vision = {}
        for (pixels, grid), grids in zip(KINDS.values(), (images, videos), strict=True):
            if grids:
                vision[grid] = torch.tensor(grids)
                rows = rng.normal(size=(int(vision[grid].prod(-1).sum()), PATCH_VALUES)).astype(np.float16)
                vision[pixels] = inputs[pixels_of][pixels] if pixels_of else torch.from_numpy(rows).float()
        inputs[name] = pad(turns, side) | vision
        if side == "left":
            prompts[name] = pad([(question, []) for question, _ in turns], side) | vision
            del prompts[name]["labels"]

    g = GRIDS
    add("text", [turn(7)])
    turns = [turn(3), turn(9)]
    add("text_batch_left", turns)
    add("text_batch_right", turns, "right")
    add("image", [turn(2, (IMAGE, g["a"]), 4)], images=[g["a"]])
    add("two_images", [turn((IMAGE, g["a"]), 2, (IMAGE, g["c"]), 3)], images=[g["a"], g["c"]])
    turns = [turn((IMAGE, g["b"]), 2), turn(1, (IMAGE, g["c"]), 1, (IMAGE, g["d"]), 5)]
    add("batch_left", turns, images=[g["b"], g["c"], g["d"]])
    add("batch_right", turns, "right", images=[g["b"], g["c"], g["d"]], pixels_of="batch_left")
    add("batch_mixed_text", [turn(12), turn(1, (IMAGE, g["d"]), 2)], images=[g["d"]])  # a row without image
    add("video", [turn(2, (VIDEO, g["v"]), 3)], videos=[g["v"]])
    mixed = [turn((IMAGE, g["c"]), 2, (VIDEO, g["w"]), 1, (IMAGE, g["d"]), 2)]
    add("image_video", mixed, images=[g["c"], g["d"]], videos=[g["w"]])
    mixed = [turn((VIDEO, g["w"]), 2), turn((IMAGE, g["d"]), 4)]
    add("batch_image_video", mixed, images=[g["d"]], videos=[g["w"]])
    return inputs, prompts


def pad(turns, side):
    rows = [(question + answer, [-100] * len(question) + answer) for question, answer in turns]
    length = max(len(ids) for ids, _ in rows)

    def fill(values, filler):
        missing = [filler] * (length - len(values))
        return missing + values if side == "left" else values + missing

    return {
        "input_ids": torch.tensor([fill(ids, PAD) for ids, _ in rows]),
        "labels": torch.tensor([fill(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows]),
    }


def token_types(ids):
    return torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0)).to(torch.int32)


def max_rule(input_ids, attention_mask, image_grid_thw=None, video_grid_thw=None, time_steps=(), **_):
    """Text after an image or video starts at the largest of its t, h, w indices + 1 (the paper, transformers 4.x).

    `time_steps` has the distance between the frames of each video, 1 by default. Their positions are rounded down.
    """
    steps = iter(time_steps)
    grids = {
        kind: iter([] if grid is None else grid.tolist())
        for kind, grid in ((IMAGE, image_grid_thw), (VIDEO, video_grid_thw))
    }
    positions = np.zeros((3, *input_ids.shape), np.int64)
    deltas = np.zeros((len(input_ids), 1), np.int64)
    for b, (ids, mask) in enumerate(zip(input_ids.numpy(), attention_mask.numpy(), strict=True)):
        tokens = np.flatnonzero(mask)
        blocks, start, i = [], 0, 0
        while i < len(tokens):
            if ids[tokens[i]] in grids:
                t, h, w = next(grids[ids[tokens[i]]])
                axes = np.meshgrid(np.arange(t), np.arange(h // MERGE), np.arange(w // MERGE), indexing="ij")
                block = np.stack(axes).reshape(3, -1)
                if ids[tokens[i]] == VIDEO:
                    block[0] = np.floor(block[0] * next(steps, 1.0))
                block += start
            else:
                block = np.full((3, 1), start)
            blocks.append(block)
            start = block.max() + 1
            i += block.shape[1]
        positions[:, b, tokens] = np.concatenate(blocks, 1)
        deltas[b] = start - len(tokens)
    return torch.from_numpy(positions), torch.from_numpy(deltas)


def hf5_rule(model, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    return model.model.get_rope_index(ids, token_types(ids), *grids, mask)


def packed(inputs):
    """Packs the rows of a batch into one row with segment_ids 1, 2, ..."""
    mask = inputs["attention_mask"].bool()
    vision = {key: value for key, value in inputs.items() if "pixel" in key or "grid" in key}
    return vision | {
        "input_ids": inputs["input_ids"][mask][None],
        "labels": inputs["labels"][mask][None],
        "segment_ids": torch.repeat_interleave(torch.arange(len(mask)) + 1, mask.sum(1))[None],
    }


def back_to_back(inputs):
    """Removes the text between the images of "two_images". transformers 5.17 has no positions for this, 4.x had."""
    ids = inputs["input_ids"]
    outside = torch.ones_like(ids, dtype=torch.bool)
    images = torch.nonzero(ids[0] == IMAGE).flatten()
    outside[0, images[0] : images[-1]] = False
    keep = outside | (ids == IMAGE)
    cut = {key: inputs[key][keep][None] for key in ("input_ids", "labels", "attention_mask")}
    return inputs | cut


# ---- recording


class Recorder:
    def __init__(self, model, hub_name=hub_name):
        self.model, self.hub_name, self.arrays, self.margins = model, hub_name, {}, []

    def put(self, scenario, **values):
        for key, value in values.items():
            self.arrays[f"{scenario}/{key}"] = value.detach().numpy().copy()

    def forward(self, inputs, **options):
        self.model.model.rope_deltas = None  # reset the state of an earlier call
        types = {} if "position_ids" in options else {"mm_token_type_ids": token_types(inputs["input_ids"])}
        inputs = {key: value for key, value in inputs.items() if key != "segment_ids"}
        return self.model(**inputs, **types, **options, use_cache=False)

    def vision(self, name, inputs):
        visual = self.model.model.visual
        for kind, (pixels, grid) in KINDS.items():
            if grid not in inputs:
                continue
            layers = {}

            def capture(key, layers=layers):
                return lambda module, args, out: layers.update({key: out})

            hooks = [visual.patch_embed.register_forward_hook(capture(f"{kind}_patch_embed"))]
            hooks += [b.register_forward_hook(capture(f"{kind}_vision_block{i}")) for i, b in enumerate(visual.blocks)]
            with torch.no_grad():
                out = visual(inputs[pixels], grid_thw=inputs[grid])
            for hook in hooks:
                hook.remove()
            self.put(name, **layers, **{f"{kind}_features": out.pooler_output})

    def training(self, name, inputs, *, layers=True, gradients=True):
        text, activations = self.model.model.language_model, {}

        def capture(key):
            return lambda module, args, out: activations.update({key: out})

        def capture_input(module, args, kwargs):
            activations["inputs_embeds"] = args[0] if args else kwargs["hidden_states"]

        hooks = [layer.register_forward_hook(capture(f"text_layer{i}")) for i, layer in enumerate(text.layers)]
        hooks.append(text.layers[0].register_forward_pre_hook(capture_input, with_kwargs=True))
        hooks.append(text.norm.register_forward_hook(capture("final_hidden")))
        self.model.zero_grad(set_to_none=True)
        out = self.forward(inputs)
        for hook in hooks:
            hook.remove()
        self.put(name, **(activations if layers else {}), logits=out.logits, loss=out.loss)
        if gradients:
            out.loss.backward()
            for key, p in self.model.named_parameters():
                self.put(name, **{f"grad/{self.hub_name(key)}": torch.zeros_like(p) if p.grad is None else p.grad})
        with torch.no_grad():
            self.put(name, loss_num_items_100=self.forward(inputs, num_items_in_batch=100).loss)

    def generation(self, name, prompt):
        ids = prompt["input_ids"]

        def run(key, *, eos=None, **options):
            self.model.model.rope_deltas = None
            with torch.no_grad():
                result = self.model.generate(
                    **prompt,
                    mm_token_type_ids=token_types(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=PAD,
                    eos_token_id=eos,
                    return_dict_in_generate=True,
                    output_scores=True,
                    **options,
                )
            top = torch.stack(result.scores, 1).topk(2, -1).values
            self.margins.append(float((top[..., 0] - top[..., 1]).min()))
            tokens = result.sequences[:, ids.shape[1] :]
            self.put(name, **{key: tokens})
            return tokens

        greedy = run("greedy")
        eos = int(greedy[0, 3])  # an eos token that row 0 is certain to generate
        self.put(name, eos_id=torch.tensor(eos))
        run("greedy_eos", eos=eos)
        run("greedy_two_eos", eos=[eos, int(greedy[-1, 1])])
        self.put(name, second_eos_id=greedy[-1, 1])
        penalized = run("greedy_repetition1.3", repetition_penalty=1.3)
        # transformers also penalizes the padding of the prompt, which must not change the result
        unpadded = PenaltyWithoutPadding(prompt["attention_mask"].bool(), 1.3)
        again = run("greedy_repetition1.3", logits_processor=[unpadded])
        assert torch.equal(penalized, again), f"{name}: the padding token decided, take another seed"


class PenaltyWithoutPadding:
    def __init__(self, mask, penalty):
        self.mask, self.penalty = mask, penalty

    def __call__(self, ids, scores):
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, row_ids, mask in zip(seen, ids, self.mask, strict=True):
            row[row_ids[: len(mask)][mask]] = True
            row[row_ids[len(mask) :]] = True
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


def packed_logits(recorder, name, inputs):
    """transformers separates packed sequences by position_ids [4, 1, L]: the text position, then the M-RoPE axes."""
    mask = inputs["attention_mask"].bool()
    text_positions = torch.cat([torch.arange(int(n)) for n in mask.sum(1)])
    positions, _ = hf5_rule(recorder.model, inputs)
    with torch.no_grad():
        out = recorder.forward(
            packed(inputs), position_ids=torch.cat([text_positions[None], positions[:, mask]])[:, None]
        )
    recorder.put(f"packed_{name}", logits=out.logits, loss=out.loss)
    difference = np.abs(out.logits[0].numpy() - recorder.arrays[f"{name}/logits"][mask.numpy()]).max()
    assert difference < 1e-4, f"{name}: packing changed the logits by {difference}"


def record_scenarios(model, inputs, prompts) -> dict[str, np.ndarray]:
    arrays = {}
    extra = {f"packed_{name}": packed(inputs[name]) for name in ("batch_left", "text_batch_left")}
    extra["back_to_back"] = back_to_back(inputs["two_images"])
    for name, values in (inputs | extra).items():
        shares_pixels = name in ("batch_right", "packed_batch_left", "back_to_back")
        for key, value in values.items():
            if "pixel" not in key:
                arrays[f"{name}/{key}"] = value.numpy()
            elif not shares_pixels:
                arrays[f"{name}/{key}"] = value.numpy().astype(np.float16)
        if "attention_mask" in values:
            rules = {"max": max_rule(**values)}
            if name != "back_to_back":
                rules["hf5"] = hf5_rule(model, values)
            for rule, (positions, deltas) in rules.items():
                arrays[f"{name}/position_ids_{rule}"] = positions.numpy()
                arrays[f"{name}/rope_deltas_{rule}"] = deltas.numpy()
    for name, prompt in prompts.items():
        arrays |= {f"prompt/{name}/{key}": value.numpy() for key, value in prompt.items() if "pixel" not in key}
    return arrays


def record_outputs(model, name, inputs, prompts) -> dict[str, np.ndarray]:
    recorder = Recorder(model)
    whole = name == "untied"
    for scenario, values in inputs.items():
        if whole:
            recorder.vision(scenario, values)
        gradients = scenario in TIED_GRADIENTS or (whole and not scenario.endswith("_right"))
        recorder.training(scenario, values, layers=whole, gradients=gradients)
        if scenario in prompts:
            recorder.generation(scenario, prompts[scenario])
    with torch.no_grad():
        by_max, _ = max_rule(**inputs["video"])
        recorder.put("video", logits_max=recorder.forward(inputs["video"], position_ids=by_max).logits)
        adjacent = back_to_back(inputs["two_images"])
        by_max, _ = max_rule(**adjacent)
        out = recorder.forward(adjacent, position_ids=by_max)
        recorder.put("back_to_back", logits=out.logits, loss=out.loss)
    for scenario in ("batch_left", "text_batch_left"):
        packed_logits(recorder, scenario, inputs[scenario])
    print(f"{name}: {len(recorder.arrays)} arrays, closest greedy choice {min(recorder.margins):.3f}")
    assert min(recorder.margins) > 0.03, "too close a choice for float32: take another seed"
    return recorder.arrays


def record_sampling(rng) -> dict[str, np.ndarray]:
    """Records filters in the order in which generate() applies them; excluded tokens are -inf."""
    p = logits_process
    logits = torch.from_numpy(rng.normal(size=(4, VOCAB)).astype(np.float32) * 3)
    seen = torch.from_numpy(rng.integers(0, VOCAB, size=(4, 12)))
    chains = {
        "temperature=0.7": [p.TemperatureLogitsWarper(0.7)],
        "top_k=5": [p.TopKLogitsWarper(5)],
        "top_p=0.8": [p.TopPLogitsWarper(0.8)],
        "top_p=0.001": [p.TopPLogitsWarper(0.001)],
        "min_p=0.1": [p.MinPLogitsWarper(0.1)],
        "temperature=1.7,top_k=40,top_p=0.9,min_p=0.02": [
            p.TemperatureLogitsWarper(1.7),
            p.TopKLogitsWarper(40),
            p.TopPLogitsWarper(0.9),
            p.MinPLogitsWarper(0.02),
        ],
        "repetition_penalty=1.3": [p.RepetitionPenaltyLogitsProcessor(1.3)],
    }
    arrays = {"logits": logits.numpy().copy(), "seen": seen.numpy()}
    for name, chain in chains.items():
        out = logits.clone()
        for processor in chain:
            out = processor(seen, out)
        arrays[name] = out.numpy()
    return arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    inputs, prompts = make_scenarios(np.random.default_rng(9))
    for name, seed in MODELS.items():
        model = make_model(name, seed)
        save(model, out / f"model_{name}")
        np.savez_compressed(out / f"{name}.npz", **record_outputs(model, name, inputs, prompts))
    np.savez_compressed(out / "scenarios.npz", **record_scenarios(model, inputs, prompts))
    np.savez_compressed(out / "sampling.npz", **record_sampling(np.random.default_rng(10)))


if __name__ == "__main__":
    main()
