"""Conversations about pictures of handwritten digits."""

import functools
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

CELL = 28  # pixels: what becomes one token of text
SYSTEM = {"role": "system", "content": "Read."}


class Digits(NamedTuple):
    """Handwritten digits: images uint8 [N, 8, 8] from 0 (paper) to 16 (ink), labels uint8 [N]."""

    images: np.ndarray
    labels: np.ndarray


def load_digits(held_out: int = 297) -> tuple[Digits, Digits]:
    """The UCI handwritten digits (assets/digits_LICENSE.txt), to train on and to hold out: the same split every time."""
    with resources.files("liger_jax").joinpath("assets/digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    train, held = order[held_out:], order[:held_out]
    return Digits(images[train], labels[train]), Digits(images[held], labels[held])


def conversations(
    digits: Digits, rng: np.random.Generator, *, counts: Sequence[int] = (1, 2, 3)
) -> Iterator[list[dict]]:
    """Endless conversations, each about one of `counts` of digits, all in one picture or each in a picture of its own."""
    while True:
        count = counts[int(rng.integers(len(counts)))]
        chosen = rng.integers(len(digits.labels), size=count)
        groups = np.split(digits.images[chosen], count if rng.random() < 0.5 else 1)
        pictures = [{"type": "image", "image": draw_picture(group, rng)} for group in groups]
        question = "Which digit is shown?" if count == 1 else "Which digits are shown?"
        yield [
            SYSTEM,
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
            {"role": "assistant", "content": ", ".join(str(label) for label in digits.labels[chosen])},
        ]


def draw_picture(images: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Digits [n, 8, 8] in chalk on a board of one or two rows of cells, in the order in which one reads."""
    rows = int(rng.integers(1, 3))
    columns = -(-len(images) // rows) + int(rng.integers(0, 2))
    chalk = np.zeros((rows * CELL, columns * CELL, 1), np.float32)
    for image, cell in zip(images, np.sort(rng.permutation(rows * columns)[: len(images)]), strict=True):
        top, left = (i * CELL for i in divmod(int(cell), columns))
        chalk[top : top + CELL, left : left + CELL, 0] = enlarged(image.tobytes())
    board_colour, chalk_colour = rng.integers(105, 135, 3), rng.integers(235, 256, 3)
    return Image.fromarray((board_colour + chalk * (chalk_colour - board_colour)).round().astype(np.uint8))


@functools.cache
def enlarged(digit: bytes) -> np.ndarray:
    """A digit's 8 x 8 bytes as a picture of one cell, [CELL, CELL] from 0 to 1; each is drawn many times."""
    small = Image.fromarray(np.frombuffer(digit, np.uint8).reshape(8, 8) * np.uint8(15))
    return np.asarray(small.resize((CELL, CELL), Image.Resampling.BICUBIC), np.float32) / 255
