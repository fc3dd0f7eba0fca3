"""A small checkpoint for the tests of commands."""

import json

import pytest
from PIL import Image

from liger_jax import Qwen2VL
from liger_jax.checkpoint import save_model
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Returns a folder with a random model, its processor, and an image."""
    folder = tmp_path_factory.mktemp("model")
    processor = make_processor(load_digits()[0])
    save_model(Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), folder / "orbax")
    processor.save_pretrained(folder / "orbax")
    stored = json.loads((folder / "orbax/generation_config.json").read_text())
    greedy = stored | {"repetition_penalty": 1.5, "do_sample": True, "top_k": 1, "max_new_tokens": 9}
    (folder / "orbax/generation_config.json").write_text(json.dumps(greedy))
    Image.new("RGB", (56, 28), "white").save(folder / "dog.png")
    return folder
