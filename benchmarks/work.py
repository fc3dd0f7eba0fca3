"""The work of `liger-jax bench train | generate`, the same for this project and its peers, and what is kept of it.

Rows of 2048 tokens, each with one image of 64 x 64 patches (1024 tokens of text), the loss on what follows the image.
"""

import datetime
import json
from pathlib import Path

import numpy as np

LENGTH = 2048
GRID = (1, 64, 64)
IMAGE_TOKENS = GRID[0] * GRID[1] * GRID[2] // 4
WORDS = (1000, 150_000)  # ids that mean nothing special
NEW_TOKENS = 128
WARM, TIMED = 3, 8  # steps
MIXES = 4  # different batches of --mixed, each timed as often
LEARNING_RATE = 1e-5
OURS = "liger-jax"


def rows(config: dict, count: int, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` random rows in Hugging Face's layout; `config` is the content of the checkpoint's config.json."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(*WORDS, (count, length))
    ids[:, 16] = config["vision_start_token_id"]
    ids[:, 17 : 17 + IMAGE_TOKENS] = config["image_token_id"]
    ids[:, 17 + IMAGE_TOKENS] = config["vision_end_token_id"]
    labels = ids.copy()
    labels[:, : 18 + IMAGE_TOKENS] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(count * int(np.prod(GRID)), 1176)).astype(np.float32),
        "image_grid_thw": np.array([GRID] * count),
    }


def line(result: dict) -> str:
    """A result for the terminal."""
    told = result | result.get("parts", {}) | result.get("first_token_parts", {})
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in told.items() if isinstance(value, float))
    what = f"{result['what']} {result['model']} x {result['rows']}" if "rows" in result else result["what"]
    return f"{result['package']}: {what}: {result.get('error') or numbers}"


def keep(file: Path, result: dict) -> None:
    """Adds a result to a JSON list, in the place of an earlier one of the same case, and prints it."""
    result = {"date": datetime.date.today().isoformat(), **result}
    print(line(result), flush=True)
    known = json.loads(file.read_text()) if file.exists() else []
    same = [i for i, other in enumerate(known) if case(other) == case(result)]
    for i in same:
        known[i] = result
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known if same else [*known, result], indent=1) + "\n")


def case(result: dict) -> tuple:
    """What was measured, as far as two results of it replace one another."""
    return tuple(result.get(name) for name in CASE)


CASE = ("package", "model", "what", "rows", "prompt_tokens", "devices", "remat", "unroll", "lora", "master_weights")
CASE += ("cache", "weights", "programs")
