"""Checks that the notebooks run from the first cell to the last on a random model, and are stored with their outputs."""

import base64
import importlib.util
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

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a run leaves in its folder, and texts that show that two computations agreed.
FILES = {
    "01_quickstart": ["outputs/quickstart/hf/model.safetensors"],
    "02_your_own_images": ["outputs/lora/adapter/adapter_model.safetensors", "outputs/lora/merged/config.json"],
    "05_convert_and_compare": ["outputs/compare/hf/model.safetensors"],
}
TEXTS = {
    "01_quickstart": ["equal answers after loading: True"],
    "02_your_own_images": ["after loading the adapter again: 0.0"],
    "05_convert_and_compare": ["bit for bit: True", "equal: True"],
}
# Differences that a notebook prints, and their limit.
DIFFERENCES = {
    "03_kernels": (r"largest difference: value (\S+), gradients (\S+), (\S+)", 1e-5),
    "04_sharding": (r"gradients differ by (\S+)", 1e-5),
    "05_convert_and_compare": (r"logits differ by (\S+)|largest difference is (\S+) of", 2e-4),
}


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


def needs_torch(notebook: Path):
    return pytest.param(notebook, marks=pytest.mark.live) if notebook.stem.startswith("05") else notebook


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Returns a Hugging Face folder with a random model of the demo's size."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = make_processor(load_digits()[0])
    to_hf(Qwen2VL.init(make_config(processor), dtype="float32"), folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "notebook", [needs_torch(notebook) for notebook in NOTEBOOKS], ids=lambda notebook: notebook.stem
)
def test_notebook_runs(notebook, checkpoint, tmp_path):
    """Every cell runs without errors or warnings. The cells draw as many figures as are stored, none of them blank."""
    if notebook.stem.startswith("05") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch, see the extra `parity`")
    environment = {"LIGER_JAX_CHECKPOINT": str(checkpoint), "LIGER_JAX_STEPS": "2", "JAX_PLATFORMS": "cpu"}
    node = execute(notebook, tmp_path, environment)
    stderr = [o.text for cell in code_cells(node) for o in cell.outputs if o.get("name") == "stderr"]
    assert not [text for text in stderr if "[transformers]" not in text]  # transformers comments on small vocabularies
    drawn = figures(node)
    assert len(drawn) == len(figures(nbformat.read(notebook, as_version=4))) >= 3
    assert all(figure.std() > 5 for figure in drawn)
    assert all((tmp_path / file).is_file() for file in FILES.get(notebook.stem, ()))
    output = printed(node)
    assert all(text in output for text in TEXTS.get(notebook.stem, ()))
    if notebook.stem in DIFFERENCES:
        pattern, limit = DIFFERENCES[notebook.stem]
        differences = [float(number) for match in re.finditer(pattern, output) for number in match.groups() if number]
        assert differences and max(differences) < limit


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_is_stored_with_its_outputs(notebook):
    """Every code cell was run in order without an error, and its output contains no path of the machine it ran on."""
    node = nbformat.read(notebook, as_version=4)
    nbformat.validate(node)
    cells = code_cells(node)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?:^|[\s'\"(=])(?:/[\w.-]+){2,}", printed(node))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_begins_with_what_it_shows_and_how_long_it_takes(notebook):
    first = nbformat.read(notebook, as_version=4).cells[0]
    title, *text = first.source.split("\n")
    assert (
        first.cell_type == "markdown" and title.startswith("# ") and any(line.startswith("**Time:**") for line in text)
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_plots_name_their_axes(notebook):
    """A cell that draws has labels for x and y, unless it shows pictures without axes (the helper `show` of a notebook)."""
    for cell in code_cells(nbformat.read(notebook, as_version=4)):
        if "plt.show()" in cell.source and not re.search(r"^show\(", cell.source, flags=re.MULTILINE):
            assert all(re.search(rf"set_{axis}label\(|{axis}label=", cell.source) for axis in "xy"), cell.source
