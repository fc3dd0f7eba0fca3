"""What people read is true: the README's tables are those of the results, the examples in docstrings run."""

import ast
import doctest
import importlib
import pathlib
import pkgutil

import pytest

from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "liger_jax", "convert")
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    if not module.name.endswith("__main__")
]


def test_tables_of_the_readme_are_made_from_the_results():
    readme = (ROOT / "README.md").read_text()
    assert tables.with_tables(readme) == readme, "run: python benchmarks/tables.py"


def imports_of(file):
    """Names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    """convert -> liger_jax -> pallas_kernels, below the command line; Pallas is behind a single file."""
    for rank, package in enumerate(PACKAGES):
        for file in (ROOT / package).rglob("*.py"):
            place, names = str(file.relative_to(ROOT)), list(imports_of(file))
            above = [name for name in names if name.split(".")[0] in PACKAGES[rank + 1 :]]
            assert not above or place == "liger_jax/cli.py", (place, above)
            pallas = [name for name in names if name.startswith("jax.experimental.pallas")]
            assert not pallas or place == "pallas_kernels/_pallas.py", (place, pallas)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    with_examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in with_examples:
        runner.run(test)
    assert not runner.failures
