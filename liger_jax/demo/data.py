"""Conversations about images of handwritten digits."""

import functools
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

CELL = 28  # side of a digit's cell in pixels, so that Qwen2-VL turns a cell into one token
SYSTEM = {"role": "system", "content": "Read."}


class Digits(NamedTuple):
    """Handwritten digits."""

    images: np.ndarray  # uint8 [N, 8, 8], 0 (paper) to 16 (ink)
    labels: np.ndarray  # uint8 [N]


def load_digits(held_out: int = 297) -> tuple[Digits, Digits]:
    """Returns the UCI handwritten digits (assets/digits_LICENSE.txt), split into training and held-out digits.

    The split is always the same.
    """
    with resources.files("liger_jax").joinpath("assets/digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    train, unseen = order[held_out:], order[:held_out]
    return Digits(images[train], labels[train]), Digits(images[unseen], labels[unseen])


def conversations(
    digits: Digits, rng: np.random.Generator, *, counts: Sequence[int] = (1, 2, 3), cell: int = CELL
) -> Iterator[list[dict]]:
    """Yields conversations without end. Each is about a number of digits from `counts`, in one image or one image each.

    `cell` is the side of a digit's cell in pixels.
    """
    while True:
        count = counts[int(rng.integers(len(counts)))]
        chosen = rng.integers(len(digits.labels), size=count)
        groups = np.split(digits.images[chosen], count if rng.random() < 0.5 else 1)
        images = [{"type": "image", "image": draw_image(group, rng, cell)} for group in groups]
        question = "Which digit is shown?" if count == 1 else "Which digits are shown?"
        yield [
            SYSTEM,
            {"role": "user", "content": [*images, {"type": "text", "text": question}]},
            {"role": "assistant", "content": ", ".join(str(label) for label in digits.labels[chosen])},
        ]


def draw_image(digits: np.ndarray, rng: np.random.Generator, side: int = CELL) -> Image.Image:
    """Draws digits [n, 8, 8] in chalk on a board of one or two rows of cells of `side` pixels, in reading order."""
    rows = int(rng.integers(1, 3))
    columns = -(-len(digits) // rows) + int(rng.integers(0, 2))
    chalk = np.zeros((rows * side, columns * side, 1), np.float32)
    for digit, cell in zip(digits, np.sort(rng.permutation(rows * columns)[: len(digits)]), strict=True):
        top, left = (i * side for i in divmod(int(cell), columns))
        chalk[top : top + side, left : left + side, 0] = enlarge(digit.tobytes(), side)
    board_colour, chalk_colour = rng.integers(105, 135, 3), rng.integers(235, 256, 3)
    return Image.fromarray((board_colour + chalk * (chalk_colour - board_colour)).round().astype(np.uint8))


@functools.cache  # each digit is drawn many times
def enlarge(digit: bytes, side: int) -> np.ndarray:
    """Returns the ink of a digit's 8 x 8 bytes, enlarged to a cell: [side, side] from 0 to 1."""
    small = Image.fromarray(np.frombuffer(digit, np.uint8).reshape(8, 8) * np.uint8(15))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
