"""The batches of `python -m benchmarks train --mixed`: conversations with images of many sizes, packed as in a training run.

They have the shapes of the uniform sequences in benchmarks/work.py (2048 tokens and 4096 patches per sequence) and the same
ratio of patches to text tokens. As in a run on real images, a sequence has several conversations and images, so that both
attentions have segments, and padding where packing leaves gaps. Rates do not count padding. Small images need less attention
than one of 64 x 64 patches, so model FLOPs utilisation (`liger_jax.train.flops`) is the fairer comparison.
"""

import dataclasses

import numpy as np

from benchmarks import work
from liger_jax.config import QwenVLConfig, VisionConfig
from liger_jax.data.dataset import make_dataset
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.inputs.images import smart_resize
from liger_jax.inputs.layout import count_slots
from liger_jax.options import Batching

CONVERSATIONS = 1000
SIDES = (224, 1344)  # range of an image's sides in pixels; drawn log-uniformly
TEXT = (0.8, 1.2)  # range of text tokens per image token
ANSWER = 0.6  # share of the text that is the answer, so that 30 % of all tokens are trained


@dataclasses.dataclass(frozen=True)
class Conversation:
    """An image with text around it."""

    seed: int
    grid: tuple[int, int, int]
    text: int  # tokens, including the two that delimit the image

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))


def make_conversations(config: QwenVLConfig) -> list[Conversation]:
    """Returns the conversations. Images larger than those in benchmarks/work.py are scaled down, as `--max-pixels` does."""
    rng = np.random.default_rng(0)
    conversations = []
    for number in range(CONVERSATIONS):
        grid = fit_grid(config.vision, *np.exp(rng.uniform(*np.log(SIDES), 2)).astype(int).tolist())
        merged = int(np.prod(grid)) // config.vision.merge_unit
        text = min(max(round(merged * rng.uniform(*TEXT)), 4), work.LENGTH - merged)
        conversations.append(Conversation(number, grid, text))
    return conversations


def fit_grid(vision: VisionConfig, height: int, width: int) -> tuple[int, int, int]:
    """Returns the grid of an image, scaled down until it fits in the slots of a sequence."""
    factor, slots = vision.patch_size * vision.spatial_merge_size, int(np.prod(work.GRID))
    max_pixels = slots * vision.patch_size**2
    while True:
        rows, columns = (
            side // vision.patch_size for side in smart_resize(height, width, factor, factor**2, max_pixels)
        )
        if count_slots(vision, [(1, rows, columns)]) <= slots:
            return 1, rows, columns
        max_pixels -= factor**2  # windows at the edges leave slots empty


@dataclasses.dataclass(frozen=True)
class RandomProcessor:
    """A substitute for `Processor` that returns random tokens and pixels."""

    config: QwenVLConfig

    def measure(self, conversation: Conversation) -> tuple[int, list[tuple[int, int, int]]]:
        return conversation.text + conversation.patches // self.config.vision.merge_unit, [conversation.grid]

    def __call__(self, batch: list[Conversation], labels: bool) -> dict[str, np.ndarray]:
        (conversation,), config = batch, self.config
        rng = np.random.default_rng(conversation.seed)
        tokens, _ = self.measure(conversation)
        ids = rng.integers(*work.PLAIN_IDS, (1, tokens))
        answer = round(conversation.text * ANSWER)
        image = slice(1, 1 + conversation.patches // config.vision.merge_unit)
        ids[:, 0], ids[:, image.stop] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, image] = config.image_token_id
        return {
            "input_ids": ids,
            "labels": np.where(np.arange(tokens) < tokens - answer, IGNORE, ids),
            "pixel_values": rng.normal(size=(conversation.patches, config.vision.patch_values)).astype(np.float32),
            "image_grid_thw": np.array([conversation.grid]),
        }


def mixed_batches(config: QwenVLConfig, batch_size: int, count: int) -> list[Batch]:
    """Returns `count` different batches of the same shape."""
    batching = Batching(batch_size=batch_size, pack_length=work.LENGTH, patches=int(np.prod(work.GRID)))
    dataset = make_dataset(RandomProcessor(config), config, make_conversations(config), batching)
    return [dataset(step) for step in range(count)]
