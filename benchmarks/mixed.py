"""The batches of `liger-jax bench train --mixed`: conversations with pictures of many sizes, packed as a run packs them.

Compared with the uniform rows of `work.rows`: the same shapes on the device (2048 tokens and 4096 patches a row), and as
many patches a token of text. What differs is what a run on real pictures adds: several conversations and pictures a row,
so segments in both attentions, and what packing cannot fill. A token counts if it is no padding. Small pictures need less
attention than one of 64 x 64 patches, so the share of the GPU's operations (`liger_jax.train.flops`) is told beside.
"""

import dataclasses

import numpy as np

from benchmarks import work
from liger_jax.config import Qwen2VLConfig
from liger_jax.data.dataset import make_dataset
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.inputs.images import smart_resize

CONVERSATIONS = 1000
SIDES = (224, 1344)  # pixels; each side is drawn by its logarithm
TEXT = (0.8, 1.2)  # tokens of text to one of the picture
ANSWER = 0.6  # of the text; 30 % of all tokens are trained


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A picture, and text around it."""

    seed: int
    grid: tuple[int, int, int]
    text: int  # tokens, the two around the picture included

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))


def conversations(config: Qwen2VLConfig) -> list[Conversation]:
    """Pictures over the size of those in `work.rows` are made smaller, as `--max-pixels` does it."""
    vision, rng = config.vision, np.random.default_rng(0)
    factor = vision.patch_size * vision.spatial_merge_size
    most = int(np.prod(work.GRID)) * vision.patch_size**2
    made = []
    for number in range(CONVERSATIONS):
        sides = np.exp(rng.uniform(*np.log(SIDES), 2)).astype(int)
        height, width = (side // vision.patch_size for side in smart_resize(*sides.tolist(), factor, factor**2, most))
        merged = height * width // vision.merge_unit
        text = min(max(round(merged * rng.uniform(*TEXT)), 4), work.LENGTH - merged)
        made.append(Conversation(number, (1, height, width), text))
    return made


@dataclasses.dataclass(frozen=True)
class RandomProcessor:
    """In the place of a `Processor`: random tokens and pixels instead of texts and files."""

    config: Qwen2VLConfig

    def measure(self, one: Conversation) -> tuple[int, int, int]:
        return one.text + one.patches // self.config.vision.merge_unit, one.patches, 1

    def __call__(self, batch: list[Conversation], labels: bool) -> dict[str, np.ndarray]:
        (one,), config = batch, self.config
        rng = np.random.default_rng(one.seed)
        tokens, _, _ = self.measure(one)
        ids = rng.integers(*work.WORDS, (1, tokens))
        answer = round(one.text * ANSWER)
        picture = slice(1, 1 + one.patches // config.vision.merge_unit)
        ids[:, 0], ids[:, picture.stop] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, picture] = config.image_token_id
        return {
            "input_ids": ids,
            "labels": np.where(np.arange(tokens) < tokens - answer, IGNORE, ids),
            "pixel_values": rng.normal(size=(one.patches, config.vision.patch_values)).astype(np.float32),
            "image_grid_thw": np.array([one.grid]),
        }


def batches(config: Qwen2VLConfig, rows: int, count: int) -> list[Batch]:
    """`count` different batches of one shape."""
    room = {"batch_size": rows, "pack_length": work.LENGTH, "patches": int(np.prod(work.GRID))}
    dataset = make_dataset(RandomProcessor(config), config, conversations(config), **room)
    return [dataset(step) for step in range(count)]
