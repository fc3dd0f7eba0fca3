"""Checks the documentation (tables, links, examples), the import directions, and the contents of the package."""

import ast
import doctest
import importlib
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import tables
from tests._support.snippets import MARKED

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "liger_jax", "convert")
# The layers of liger_jax, lowest first: a module may import from its own layer and from lower ones.
LAYERS = (
    ("errors", "runtime", "options", "finite", "progress", "names", "processes"),
    ("files",),
    ("config",),
    ("inputs",),
    ("model",),
    ("checkpoint", "data", "generation"),
    ("train",),
    ("demo", "plan"),
)
MODULES = [
    module.name
    for package in (*PACKAGES, "benchmarks")
    for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    if not module.name.endswith("__main__")
]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


# ---- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", tables.pages(ROOT), ids=lambda page: page.name)
def test_tables_match_the_results(page):
    text = page.read_text()
    assert tables.with_tables(text) == text, "run: python -m benchmarks tables"


def test_every_table_is_on_a_page():
    names = [match[1] for page in tables.pages(ROOT) for match in tables.MARK.finditer(page.read_text())]
    assert sorted(names) == sorted(tables.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page.name} links to {target}, which does not exist"
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page.name} links to {target}, which has no such heading"


def test_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and page.stem != "index" and page.name not in index
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_api_page_documents_every_public_name(package):
    """The API pages show the docstrings of all public names, and these, their methods and properties all have one."""
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text()
    module = importlib.import_module(package)
    names = [path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)]
    assert len(set(names)) == len(names) and set(names) <= set(module.__all__)
    shown = [getattr(module, name) for name in names]  # Qwen2VL is another name of QwenVL
    assert [name for name in module.__all__ if getattr(module, name) not in shown] == []
    undocumented = []
    for name in module.__all__:
        value = getattr(module, name)
        members = vars(value).items() if isinstance(value, type) else ()
        public = [
            (f"{name}.{member}", value)
            for member, value in members
            if not member.startswith("_") and (callable(value) or isinstance(value, property | classmethod))
        ]
        undocumented += [path for path, value in [(name, value), *public] if not (value.__doc__ or "").strip()]
    assert undocumented == []


def test_troubleshooting_quotes_messages_of_the_code():
    """Every message on the page, with `...` for values, is a string in the packages, except in the section on JAX's own."""
    strings = []
    for file in (file for package in PACKAGES for file in files_of(package)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                strings.append(
                    "".join(
                        str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    page = re.sub(r"## From JAX and CUDA\n.*?(?=\n## )", "", page, flags=re.DOTALL)
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 50
    patterns = {message: ".*".join(map(re.escape, message.split("..."))) for message in messages}
    wrong = [m for m, pattern in patterns.items() if not any(re.search(pattern, s, re.DOTALL) for s in strings)]
    assert wrong == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_ci_runs_the_marked_blocks():
    """.ci/run executes the README's demo and test blocks, tests/test_snippets.py those below a mark `runs:`, each unique."""
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for mark in ("test", "demo"):
        assert f"marked_block {mark} README.md" in script and f"<!-- {mark} -->\n```bash\n" in readme
    marks = []
    for page in tables.pages(ROOT):
        marked = re.findall(r"^<!-- (runs: .*) -->$", page.read_text(), flags=re.MULTILINE)
        blocks = [f"runs: {name}" for name, _, _ in MARKED.findall(page.read_text())]
        assert marked == blocks and len(set(marked)) == len(marked), f"{page.name}: a mark without a block"
        marks += marked
    assert len(marks) >= 15


# ---- imports ----------------------------------------------------------------------------------------------------------


def imports_at_run_time(file: Path):
    """Yields the names of all modules that a file imports anywhere, except under `if TYPE_CHECKING`."""

    def visit(node):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.orelse:
                yield from visit(statement)
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(file.read_text()))


def files_of(package: str):
    return sorted((ROOT / package).rglob("*.py"))


def test_packages_import_in_one_direction():
    """convert imports liger_jax, which imports pallas_kernels; only the command line may import everything."""
    for rank, package in enumerate(PACKAGES):
        for file in files_of(package):
            place, names = str(file.relative_to(ROOT)), list(imports_at_run_time(file))
            if place.startswith("liger_jax/cli/"):
                continue
            upward = [name for name in names if name.split(".")[0] in (*PACKAGES[rank + 1 :], "benchmarks", "tests")]
            assert not upward, (place, upward)
            from_cli = [name for name in names if name.startswith("liger_jax.cli")]
            assert not from_cli or place in ("liger_jax/__main__.py", "convert/__main__.py"), (place, from_cli)


def test_pallas_is_imported_in_one_file():
    for package in (*PACKAGES, "benchmarks"):
        for file in files_of(package):
            names = [name for name in imports_at_run_time(file) if name.startswith("jax.experimental.pallas")]
            assert not names or file == ROOT / "pallas_kernels" / "_pallas.py", (file, names)


def test_imports_within_liger_jax_follow_the_data_flow():
    """The order is inputs, then model, then data, generation and checkpoints, then train, then the demo."""
    from liger_jax import _MODULES

    ranks = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
    for file in files_of("liger_jax"):
        own = file.relative_to(ROOT / "liger_jax").with_suffix("").parts[0]
        if own in ("__init__", "__main__", "cli"):
            continue
        assert own in ranks, f"liger_jax/{own} is in no layer; add it to LAYERS"
        for name in imports_at_run_time(file):
            package, _, module = name.partition(".")
            if package != "liger_jax":
                continue
            imported = _MODULES.get(module, module).split(".")[0]
            if imported:
                assert imported in ranks and ranks[imported] <= ranks[own], f"{file.relative_to(ROOT)} imports {name}"


def test_imports_have_no_cycles():
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in (*PACKAGES, "benchmarks")
        for file in files_of(package)
    }
    graph = defaultdict(set)
    for module, file in modules.items():
        for name in imports_at_run_time(file):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module and modules[name].name != "__init__.py":
                graph[module].add(name)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        for imported in graph[module]:
            visit(imported, (*path, module))
        done.add(module)

    for module in modules:
        visit(module, ())


def test_installed_package_holds_only_the_three_packages():
    """Benchmarks, tests, notebooks and examples stay out of the wheel; type information and data files are in it."""
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["liger_jax*", "pallas_kernels*", "convert*"]
    for package in PACKAGES:
        assert "py.typed" in setuptools["package-data"][package] and (ROOT / package / "py.typed").is_file()


# ---- docstrings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    with_examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in with_examples:
        runner.run(test)
    assert not runner.failures
