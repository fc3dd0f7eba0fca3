"""The work that is measured, the same for this project and its peers.

Rows of 2048 tokens, each with one image of 64 x 64 patches (1024 tokens of text), the loss on what follows the image.
"""

import datetime
import json
import pathlib

import numpy as np

LENGTH = 2048
GRID = (1, 64, 64)
NEW_TOKENS = 128
WARM, TIMED = 3, 8  # steps
SIZES = ("2b", "7b")
RESULTS = pathlib.Path(__file__).parent / "results"


def rows(config: dict, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` random rows in Hugging Face's layout; `config` is the content of the checkpoint's config.json."""
    rng = np.random.default_rng(seed)
    image_tokens = int(np.prod(GRID)) // 4
    ids = rng.integers(1000, 150_000, (count, LENGTH))
    ids[:, 16] = config["vision_start_token_id"]
    ids[:, 17 : 17 + image_tokens] = config["image_token_id"]
    ids[:, 17 + image_tokens] = config["vision_end_token_id"]
    labels = ids.copy()
    labels[:, : 18 + image_tokens] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(count * int(np.prod(GRID)), 1176)).astype(np.float32),
        "image_grid_thw": np.array([GRID] * count),
    }


def record(path: str | None, **values) -> None:
    """Prints one result, and adds it to the JSON list at `path`."""
    values = {"date": datetime.date.today().isoformat(), **values}
    print(json.dumps(values), flush=True)
    if path:
        file = pathlib.Path(path)
        known = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*known, values], indent=1) + "\n")
