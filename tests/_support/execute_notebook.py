"""Runs a notebook in a fresh kernel of this interpreter, for the tests and to store the outputs that are committed.

python tests/_support/execute_notebook.py notebooks/01_quickstart.ipynb NAME=VALUE ...   # NAME=VALUE: kernel environment
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def execute(notebook: Path, folder: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """Runs all cells with `folder` as working directory. Returns the notebook with outputs; a failing cell raises."""
    # This kernel precedes any other on the path: one installed in the user's home may start another interpreter.
    kernel = folder / "jupyter" / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.joinpath("kernel.json").write_text(json.dumps({"argv": argv, "display_name": "", "language": "python"}))
    variables = {
        "JUPYTER_PATH": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter" / "runtime"),
        "IPYTHONDIR": str(folder / "jupyter" / "ipython"),
        "MPLCONFIGDIR": str(Path(tempfile.gettempdir()) / "liger-jax-matplotlib"),  # the user's may list too few fonts
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's advice to install widgets depends on the machine
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with mock.patch.dict(os.environ, variables | dict(environment)):
        node = nbformat.read(notebook, as_version=4)
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(node, kernel_name="this-python", resources=resources, timeout=600, record_timing=False)
        return client.execute()


if __name__ == "__main__":
    source, settings = Path(sys.argv[1]), dict(setting.split("=", 1) for setting in sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(source, Path(folder), settings), source)
