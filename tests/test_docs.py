"""What people read is true: the README's tables are those of the results, the examples in docstrings run."""

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


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    with_examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in with_examples:
        runner.run(test)
    assert not runner.failures
