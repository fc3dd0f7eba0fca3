"""What the tests of the processor share: transformers' stored outputs, and parts of messages."""

import json

import numpy as np

from tests._support.parity import REFERENCES

STORED = np.load(REFERENCES / "processing.npz")
HUB_LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}
SMALL_LIMITS = {"min_pixels": 3136, "max_pixels": 12 * 28 * 28}
SETTINGS_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
PLACEHOLDER = {"type": "image"}
ASSISTANT = {"role": "assistant", "content": "An answer."}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


def image_part(height=56, width=56, value=0):
    return {"type": "image", "image": np.full((height, width, 3), value, np.uint8)}


def copy_with_changes(folder, tmp_path, files, drop):
    """Copies a saved folder without the files in `drop`, and writes `files`."""
    for file in folder.iterdir():
        if file.name not in drop:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path
