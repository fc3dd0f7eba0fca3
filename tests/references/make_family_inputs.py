#!/usr/bin/env python
"""Writes reference values for the inputs of Qwen2.5-VL and Qwen3-VL: Hugging Face transformers' results.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 pillow==13.0.0   # the CPU builds
    pip install -e . && python tests/references/make_family_inputs.py                   # 10 s; writes family_inputs.npz

With transformers==4.57.6, writes family_inputs_v4.npz: the positions and prompts in which the two versions differ.

Arrays
  positions/<family>/<i>/...  input_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts, position_ids.
                              In family_inputs_v4.npz only position_ids; not for fractions of seconds, which 4.57 cuts off.
  windows/<t>,<h>,<w>/...     window_index and cu_window_seqlens for windows of 112 pixels
  table/<side>/<t>,<h>,<w>/.. indices and weights
  clip_sizes                  [600, 7]: frames, height, width, min_pixels, max_pixels, new height, new width (-1: ValueError)
  frames/<class>/<total>,<fps>,<target fps>  indices of the sampled frames
  video/<name>                uint8 [T, H, W, 3]
  chat/<family>/<name>/...    outputs of the processor for `CONVERSATIONS`, with the tokenizer of `make_tokenizer`. Pixels of
                              Qwen3-VL are stored as levels 0..255.
"""

import itertools
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np

FOLDER = Path(__file__).parent
GRIDS = [(1, 4, 6), (1, 8, 8), (1, 10, 18), (2, 4, 10), (3, 2, 2), (1, 26, 38)]
IMAGE_LIMITS = {"shortest_edge": 4096, "longest_edge": 16777216}
CLIP_LIMITS = {"shortest_edge": 4096, "longest_edge": 400_000}
FRAME_LIMITS = {"shortest_edge": 3136, "longest_edge": 12 * 28 * 28}
VIDEOS = {"even": (4, 64, 96), "odd": (5, 70, 100), "long": (53, 32, 32)}
RATES = {"even": 2.0, "odd": 1.5, "long": 30.0}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def _text(text):
    return {"type": "text", "text": text}


# The videos of each conversation, whether they are sampled at 2 frames per second, and a batch of conversations.
CONVERSATIONS = {
    "video": (["even"], False, [[{"role": "user", "content": [_text("Look: "), VIDEO, _text("What?")]}]]),
    "sampled": (["long"], True, [[{"role": "user", "content": [VIDEO, _text(" is this?")]}]]),
    "batch": (
        ["odd", "even"],
        False,
        [
            [{"role": "user", "content": [_text("Compare"), VIDEO, _text(" and "), IMAGE, VIDEO]}],
            [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
        ],
    ),
}


def make_video(name):
    frames, height, width = VIDEOS[name]
    t, y, x, channel = np.ogrid[:frames, :height, :width, :3]
    values = 127 + 80 * np.sin(x / 9 + t / 2 + channel) + 40 * np.cos(y / (5 + channel))
    return np.clip(values, 0, 255).astype(np.uint8)


def make_image():
    return make_video("even")[0, :56]


def make_tokenizer(family):
    """Returns a tokenizer that merges the start of a timestamp with the text before it."""
    from liger_jax import Processor
    from liger_jax.demo.tokenizer import train_tokenizer

    return Processor(train_tokenizer(["Look: <0.2 seconds>", " and <1.2 seconds>"] * 8), family=family).tokenizer


def position_cases(config, seed=0):
    """Yields prompts of two rows with random images and videos: arguments of get_rope_index."""
    rng = np.random.default_rng(seed)
    for i in range(6):
        rows, grids, seconds = [], {1: [], 2: []}, []
        for _ in range(2):
            row = [5]
            for kind in rng.integers(1, 3, rng.integers(1, 4)):
                t, h, w = int(rng.integers(2, 7)), *(2 * rng.integers(1, 4, 2))
                frames = [t] if kind == 2 else [1]
                grids[kind].append((frames[0], h, w))
                if kind == 2:
                    seconds.append(float(rng.choice([1.0, 2.0] if i % 2 else [0.5, 1.5, 0.75, 1 / 3])))
                    if config.vision.video_time == "text":
                        frames = [1] * t
                token = config.image_token_id if kind == 1 else config.video_token_id
                for count in frames:
                    row += [*rng.integers(6, 100, 2), config.vision_start_token_id]
                    row += [*[token] * (count * h * w // 4), config.vision_end_token_id]
            rows.append([*row, 7, 8])
        length = max(map(len, rows))
        ids, mask = np.zeros((2, 2, length), np.int64)
        for b, row in enumerate(rows):
            place = slice(length - len(row), None) if i % 3 else slice(len(row))
            ids[b, place], mask[b, place] = row, 1
        case = {"input_ids": ids, "attention_mask": mask}
        case |= {name: np.array(grids[k]) for name, k in (("image_grid_thw", 1), ("video_grid_thw", 2)) if grids[k]}
        if config.vision.video_time == "seconds" and seconds:
            case["second_per_grid_ts"] = np.array(seconds)
        yield case


def positions(is_v4, seed=0):
    import torch
    from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel

    from liger_jax import QwenVLConfig

    arrays = {}
    classes = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}
    for family, model_class in classes.items():
        config = QwenVLConfig.tiny(family=family)
        vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=int(config.vision.tokens_per_second))
        names = ("image_token_id", "video_token_id", "vision_start_token_id")
        hf_config = SimpleNamespace(vision_config=vision, **{name: getattr(config, name) for name in names})
        model = SimpleNamespace(config=hf_config)
        for i, case in enumerate(position_cases(config, seed)):
            tensors = {name: torch.tensor(value) for name, value in case.items()}
            if is_v4:
                if family == "qwen2_5_vl" and i % 2 == 0:
                    continue
            else:
                model.get_vision_position_ids = MethodType(model_class.get_vision_position_ids, model)
                kinds = [(config.image_token_id, 1), (config.video_token_id, 2)]
                tensors["mm_token_type_ids"] = sum((tensors["input_ids"] == token) * kind for token, kind in kinds)
                arrays |= {f"positions/{family}/{i}/{name}": value for name, value in case.items()}
            position_ids, _ = model_class.get_rope_index(model, **tensors)
            arrays[f"positions/{family}/{i}/position_ids"] = position_ids.numpy().astype(np.int32)
    return arrays


def patches(grids=GRIDS):
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_window_index

    arrays = {}
    for grid in grids:
        name, tensor = ",".join(map(str, grid)), torch.tensor([grid])
        window_index, lengths = get_vision_window_index(tensor, 2, 112, 14)
        arrays |= {f"windows/{name}/window_index": window_index.numpy()}
        arrays |= {f"windows/{name}/cu_window_seqlens": lengths.numpy()}
        for side in (4, 48):
            options = {"align_corners": True, "spatial_merge_size": 2}
            indices, weights = get_vision_interpolation_indices_and_weights(tensor, side, **options)
            arrays[f"table/{side}/{name}/indices"] = indices.numpy().astype(np.int32)
            arrays[f"table/{side}/{name}/weights"] = weights.numpy()
    return arrays


def clips():
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
    from transformers.video_utils import VideoMetadata

    rng, rows = np.random.default_rng(0), []
    limits = [(4096, 25165824), (128 * 1024, 768 * 1024), (4096, 300_000), (10**6, 2 * 10**6)]
    for i in range(600):
        frames, (height, width) = int(rng.integers(1, 40)), np.exp(rng.uniform(1, 7, 2)).astype(int).tolist()
        low, high = limits[i % 4]
        try:
            resized = smart_resize(frames, height, width, 2, 32, low, high)
        except ValueError:
            resized = -1, -1
        rows.append((frames, height, width, low, high, *resized))
    arrays = {"clip_sizes": np.array(rows, np.int32)}
    processors = {"VisionSettings": Qwen2VLVideoProcessor(), "ClipSettings": Qwen3VLVideoProcessor()}
    for total, fps, target in itertools.product((2, 5, 53, 100, 3001), (1.0, 29.97, 30.0), (0.5, 2.0, 4.0)):
        metadata = VideoMetadata(total_num_frames=total, fps=fps)
        for name, processor in processors.items():
            indices = np.asarray(processor.sample_frames(metadata, fps=target))
            arrays[f"frames/{name}/{total},{fps},{target}"] = indices.astype(np.int16)
    return arrays


def chats(is_v4):
    from PIL import Image
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )
    from transformers.video_utils import VideoMetadata

    arrays = {f"video/{name}": make_video(name) for name in VIDEOS}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    members = {
        "qwen3_vl": (
            Qwen3VLProcessor,
            Qwen2VLImageProcessor(size=IMAGE_LIMITS, **half),
            Qwen3VLVideoProcessor(size=CLIP_LIMITS),
        )
    }
    if not is_v4:
        members["qwen2_5_vl"] = (
            Qwen2_5_VLProcessor,
            Qwen2VLImageProcessor(size=FRAME_LIMITS),
            Qwen2VLVideoProcessor(size=FRAME_LIMITS),
        )
    for family, (processor_class, image_processor, video_processor) in members.items():
        processor_class.check_argument_for_proper_class = lambda *_: None  # 4.57 refuses a PreTrainedTokenizerFast
        tokenizer = make_tokenizer(family)
        processor = processor_class(image_processor, tokenizer, video_processor, tokenizer.chat_template)
        for name, (videos, sample, conversations) in CONVERSATIONS.items():
            texts = [
                tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
            ]
            totals = {video: VIDEOS[video][0] for video in videos}
            metadata = [
                VideoMetadata(total_num_frames=total, fps=RATES[video], frames_indices=list(range(total)))
                for video, total in totals.items()
            ]
            options = {"do_sample_frames": sample} | ({"fps": 2.0} if sample else {})
            result = processor(
                text=texts,
                images=[Image.fromarray(make_image())] if "image_pad" in "".join(texts) else None,
                videos=[arrays[f"video/{video}"] for video in videos],
                video_metadata=metadata,
                padding=True,
                return_mm_token_type_ids=True,
                **options,
            )
            names = ["input_ids", "attention_mask", "image_grid_thw", "video_grid_thw"]
            names += [] if is_v4 else ["mm_token_type_ids", "second_per_grid_ts"]
            arrays |= {f"chat/{family}/{name}/{key}": np.asarray(result[key]) for key in names if key in result}
            if family == "qwen3_vl" and not is_v4:
                levels = np.asarray(result["pixel_values_videos"]) * 127.5 + 127.5
                arrays[f"chat/{family}/{name}/levels"] = levels.round().astype(np.uint8)
    return {key: value for key, value in arrays.items() if not (is_v4 and key.startswith("video/"))}


def main():
    import transformers

    is_v4 = transformers.__version__.startswith("4.")
    arrays = positions(is_v4) | chats(is_v4)
    if not is_v4:
        arrays |= patches() | clips()
    target = FOLDER / f"family_inputs{'_v4' if is_v4 else ''}.npz"
    np.savez_compressed(target, **arrays)
    print(f"{len(arrays)} arrays, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
