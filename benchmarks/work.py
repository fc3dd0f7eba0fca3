"""The inputs of `python -m benchmarks train | generate`, the same for this project and its peers.

Each sequence has 2048 tokens, of which 1024 come from an image of 64 x 64 patches. The loss counts the tokens after the
image.
"""

import numpy as np

from liger_jax import QwenVLConfig

LENGTH = 2048
GRID = (1, 64, 64)
IMAGE_TOKENS = GRID[0] * GRID[1] * GRID[2] // 4
TEXT_TOKENS = 20  # that a sequence has besides those of the image, at least
PLAIN_IDS = (1000, 150_000)  # a range of token ids without special tokens
NEW_TOKENS = 128
WARMUP_STEPS, TIMED_STEPS = 3, 8
MIXED_BATCHES = 4  # number of different batches of --mixed, which take turns
LEARNING_RATE = 1e-5


def sequences(config: QwenVLConfig, count: int, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns `count` random sequences in Hugging Face's layout."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(*PLAIN_IDS, (count, length))
    ids[:, 16] = config.vision_start_token_id
    ids[:, 17 : 17 + IMAGE_TOKENS] = config.image_token_id
    ids[:, 17 + IMAGE_TOKENS] = config.vision_end_token_id
    labels = ids.copy()
    labels[:, : 18 + IMAGE_TOKENS] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(count * int(np.prod(GRID)), config.vision.patch_values)).astype(np.float32),
        "image_grid_thw": np.array([GRID] * count),
    }
