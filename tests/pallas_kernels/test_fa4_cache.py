"""The cache of compiled FlashAttention-4 kernels, with a cutejax of a few lines: what is built, what is found, by which key.

tests/gpu runs the real one.
"""

import enum
import functools
import sys
import types

import jax
import numpy as np
import pytest

from pallas_kernels import _fa4_cache
from pallas_kernels._fa4_cache import Undescribable, describe, digest


def top_level(x):
    return x


class Tile:
    """An object that describes a kernel, as those of fa4-jax do."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Configuration(dict):
    """A dict that is compared by identity, like fa4-jax's."""

    __hash__ = object.__hash__


class Slotted:
    __slots__ = ("rows",)


class Arch(enum.Enum):
    HOPPER = 90


class Cutejax:
    """A package that builds "kernels", and keeps the code of each in a folder as the real one does."""

    def __init__(self, tmp_path, monkeypatch):
        self.settings, self.kept, self.built = [], {}, []
        self.folder, self.monkeypatch = tmp_path / "kernels", monkeypatch
        self.start_process()

    def start_process(self):
        """Forgets everything but the folder."""
        package = types.ModuleType("cutejax")
        for kind in (Tile, Configuration, Slotted):
            kind.__module__ = "fa4_jax"
            setattr(package, kind.__name__, kind)
        package.__file__ = str(self.folder.parent / "cutejax" / "__init__.py")
        package.configure_cache = lambda **options: self.settings.append(options)
        package.registry = types.SimpleNamespace(get_or_build=lambda key, name, allow_cuda_graph, build: build())
        package.cache = types.SimpleNamespace(lookup=self.kept.get, load_so=lambda path, code: f"loaded {path}")
        package.fingerprint = types.SimpleNamespace(static_env_lines=lambda: ("compiler 1",))
        for name, module in {"cutejax": package, "fa4_jax": package}.items():
            self.monkeypatch.setitem(sys.modules, name, module)
        self.monkeypatch.setattr(_fa4_cache, "_folder", self.folder)
        self.monkeypatch.setattr(_fa4_cache, "_described", {})
        _fa4_cache.install()
        self.registry = package.registry

    def kernel(self, key, code="c0de"):
        """Returns the kernel for a key, as a call of `attention` gets it."""

        def build():
            self.built.append(key)
            self.kept[code] = f"{code}.so"
            return f"built {code}", code

        return self.registry.get_or_build(key, "forward", True, build)


@pytest.fixture
def cutejax(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    return Cutejax(tmp_path, monkeypatch)


def test_later_processes_build_nothing(cutejax):
    assert cutejax.kernel(("key", 64)) == ("built c0de", "c0de")
    cutejax.start_process()
    assert cutejax.kernel(("key", 64)) == ("loaded c0de.so", "c0de")
    assert cutejax.kernel(("key", 80), "other") == ("built other", "other")
    assert cutejax.built == [("key", 64), ("key", 80)]


@pytest.mark.parametrize("damage", ["kernel", "note", "loading"])
def test_damaged_entries_are_built_again(damage, cutejax, monkeypatch):
    cutejax.kernel("key")
    (note,) = cutejax.folder.glob("*.code")
    if damage == "kernel":
        cutejax.kept.clear()
    elif damage == "note":
        note.write_text("another hash")
    cutejax.start_process()
    if damage == "loading":
        monkeypatch.setattr(sys.modules["cutejax"].cache, "load_so", lambda path, code: 1 / 0)
    assert cutejax.kernel("key") == ("built c0de", "c0de")
    assert note.read_text() == "c0de"


def test_folder_that_cannot_be_written_to_changes_nothing(cutejax):
    cutejax.folder.rmdir()
    assert cutejax.kernel("key") == ("built c0de", "c0de")


def test_keys_without_a_description_are_left_to_the_package(cutejax):
    for _ in range(2):
        cutejax.start_process()
        assert cutejax.kernel(("key", lambda x: x)) == ("built c0de", "c0de")
    assert not list(cutejax.folder.iterdir())


def test_other_versions_of_the_package_work(cutejax, monkeypatch):
    """A function with other arguments is called as before. Without it, and a second time, nothing is replaced."""
    registry = types.SimpleNamespace(get_or_build=lambda *args, **options: (args, options))
    monkeypatch.setattr(sys.modules["cutejax"], "registry", registry)
    _fa4_cache.install()
    assert registry.get_or_build(1, 2, build=3) == ((1, 2), {"build": 3})
    installed = registry.get_or_build
    _fa4_cache.install()
    assert registry.get_or_build is installed
    registry.get_or_build = kept = lambda *args: args
    monkeypatch.delattr(sys.modules["cutejax"].fingerprint, "static_env_lines")
    _fa4_cache.install()
    assert registry.get_or_build is kept


def test_settings_of_the_package(cutejax, monkeypatch):
    """cutejax has a folder, which it only uses next to a server: it gets an empty one. Without a folder, nothing is set."""
    (options,) = cutejax.settings
    assert options["spool_dir"] == str(cutejax.folder)
    server = options["client_factory"]()
    server.hset("key", mapping={"so": b"code"})
    assert server.hgetall("key") == {}
    monkeypatch.setattr(_fa4_cache, "_folder", None)
    _fa4_cache.install()
    assert len(cutejax.settings) == 1


def test_keys_depend_on_packages_settings_and_gpu(cutejax, monkeypatch):
    def fresh():
        return digest(_fa4_cache._environment(), "key")

    digests = [fresh()]
    (cutejax.folder.parent / "cutejax").mkdir()
    (cutejax.folder.parent / "cutejax" / "kernels.py").write_text("tile = 64")
    digests.append(fresh())
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    digests.append(fresh())
    monkeypatch.setattr(_fa4_cache._pallas, "compute_capability", lambda: 10.0)
    digests.append(fresh())
    monkeypatch.setattr(sys.modules["cutejax"].fingerprint, "static_env_lines", lambda: ("compiler 2",))
    digests.append(fresh())
    assert len({*digests}) == 5
    assert fresh() == digests[-1]


def test_descriptions_tell_values_apart(cutejax):
    """Regression: a subclass of dict was described by its attributes alone, so that kernels with other tiles were loaded."""
    values = [
        *(None, True, 1, 1.0, "1", b"1", "None", (1,), [1], {1: 2}, {1: 2, 3: 4}, (1, 2), ((1,), 2), (1, (2,))),
        *(np.dtype("float32"), np.dtype("int32"), float, Arch.HOPPER, top_level, functools.wraps, Arch),
        *(jax.tree.structure(tree) for tree in ((1, 2), [1, 2], {"a": 1}, (1, (2,)))),
        *(Tile(), Tile(rows=64), Tile(rows=80), Tile(rows="64"), Tile(rows=Tile(rows=64)), Tile(columns=64)),
        *(
            Configuration(),
            Configuration(tile=Tile(rows=64)),
            Configuration(tile=Tile(rows=80)),
            {"tile": Tile(rows=64)},
        ),
    ]
    assert len({describe(value) for value in values}) == len(values)
    again = Configuration(tile=Tile(rows=80))
    assert describe(again) == describe(values[-2])


def test_objects_keep_their_first_description(cutejax):
    """Generating code adds attributes to them, which a process that loads its kernels does not do."""
    tile = Tile(rows=64)
    before = describe((tile, 1))
    tile.layout = object()
    assert describe((tile, 1)) == before


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        functools.partial(top_level, 1),
        Slotted(),
        np.ones(2),
        object(),
        jax.tree.structure(jax.tree_util.Partial(lambda x: x)),
        Tile(mask=lambda x: x),
        {1: (object(),)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_could_hold_more_have_no_description(value, cutejax):
    with pytest.raises(Undescribable):
        describe(value)
