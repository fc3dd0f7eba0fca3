"""Checks that the notebooks run from the first cell to the last on a random model, and are stored with their outputs."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from convert import to_hf
from liger_jax import Qwen2VL
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from tests._support.execute_notebook import ROOT, execute

QUICKSTART = ROOT / "notebooks" / "01_quickstart.ipynb"


def code_cells(node):
    return [cell for cell in node.cells if cell.cell_type == "code"]


def figures(node) -> list[np.ndarray]:
    images = [
        output.data["image/png"]
        for cell in code_cells(node)
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in images]


def printed(node) -> str:
    return "".join(output.get("text", "") for cell in code_cells(node) for output in cell.outputs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Returns a Hugging Face folder with a random model of the demo's size."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = make_processor(load_digits()[0])
    to_hf(Qwen2VL.init(make_config(processor), dtype="float32"), folder)
    processor.save_pretrained(folder)
    return folder


def test_quickstart_runs(checkpoint, tmp_path):
    """Every cell runs without errors or warnings. The cells draw as many figures as are stored, none of them blank."""
    environment = {"LIGER_JAX_CHECKPOINT": str(checkpoint), "LIGER_JAX_STEPS": "2", "JAX_PLATFORMS": "cpu"}
    node = execute(QUICKSTART, tmp_path, environment)
    stderr = [o.text for cell in code_cells(node) for o in cell.outputs if o.get("name") == "stderr"]
    assert not [text for text in stderr if "[transformers]" not in text]  # transformers comments on small vocabularies
    drawn = figures(node)
    assert len(drawn) == len(figures(nbformat.read(QUICKSTART, as_version=4))) >= 5
    assert all(figure.std() > 5 for figure in drawn)
    assert (tmp_path / "outputs" / "quickstart" / "hf" / "model.safetensors").is_file()


def test_quickstart_is_stored_with_its_outputs():
    """Every code cell was run in order without an error, and its output contains no path of the machine it ran on."""
    node = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(node)
    cells = code_cells(node)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?:^|[\s'\"(=])(?:/[\w.-]+){2,}", printed(node))
