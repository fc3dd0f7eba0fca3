"""The cache of compiled FlashAttention-4 kernels, with a cutejax of a few lines: what it builds and finds, under which key.

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


def forward(x):
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


def of_the_user(x):
    return x


class Timeout(Exception):
    pass


class Cutejax:
    """A package that builds "kernels" and, if its cache is enabled, keeps and loads them in `build`, as the real one."""

    def __init__(self, tmp_path, monkeypatch):
        self.settings, self.kept, self.built = [], {}, []
        self.folder, self.monkeypatch, self.enabled, self.fault = tmp_path / "kernels", monkeypatch, True, None
        self.start_process()

    def start_process(self):
        """Forgets everything but the folder."""
        package = types.ModuleType("cutejax")
        for value in (Tile, Configuration, Slotted, Arch, forward):
            value.__module__ = "fa4_jax"
            setattr(package, value.__name__, value)
        package.__file__ = str(self.folder.parent / "cutejax" / "__init__.py")
        package.CompileTimeout = Timeout
        package.configure_cache = self.configure
        package.cache_config = lambda: types.SimpleNamespace(active=bool(self.settings))
        package.registry = types.SimpleNamespace(get_or_build=lambda key, name, allow_cuda_graph, build: build())
        package.cache = types.SimpleNamespace(lookup=self.kept.get, load_so=self.load)
        package.fingerprint = types.SimpleNamespace(static_env_lines=lambda: ("compiler 1",))
        for name in ("cutejax", "fa4_jax"):
            self.monkeypatch.setitem(sys.modules, name, package)
        self.monkeypatch.setattr(_fa4_cache, "_folder", self.folder)
        self.monkeypatch.setattr(_fa4_cache, "_described", {})
        self.settings.clear()
        _fa4_cache.install()
        self.package = package

    def configure(self, enabled=True, **options):
        self.settings.append(options)
        self.enabled = enabled

    def load(self, path, code):
        if self.fault == "load":
            raise OSError("not executable")
        return f"loaded {path}"

    def kernel(self, key, code="c0de"):
        """Returns the kernel for a key, as a call of `attention` gets it."""

        def build():
            self.built.append(key)
            if self.fault == "timeout":
                raise Timeout
            if self.enabled and code in self.kept:
                return self.load(self.kept[code], code), code
            if self.enabled and self.fault == "store":
                raise OSError("Read-only file system")
            if self.enabled:
                self.kept[code] = f"{code}.so"
            return f"built {code}", code

        return self.package.registry.get_or_build(key, "forward", True, build)


@pytest.fixture
def cutejax(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "cutejax").mkdir()
    return Cutejax(tmp_path, monkeypatch)


def test_later_processes_build_nothing(cutejax):
    assert cutejax.kernel(("key", 64)) == ("built c0de", "c0de")
    cutejax.start_process()
    assert cutejax.kernel(("key", 64)) == ("loaded c0de.so", "c0de")
    assert cutejax.kernel(("key", 80), "other") == ("built other", "other")
    assert cutejax.built == [("key", 64), ("key", 80)]


@pytest.mark.parametrize("damage", ["kernel", "note"])
def test_damaged_entries_are_built_again(damage, cutejax):
    cutejax.kernel("key")
    (note,) = cutejax.folder.glob("*.code")
    if damage == "kernel":
        cutejax.kept.clear()
    else:
        note.write_text("another hash")
    cutejax.start_process()
    cutejax.kernel("key")
    assert cutejax.built == ["key", "key"]
    assert note.read_text() == "c0de"


@pytest.mark.parametrize("key", ["key", ("key", lambda x: x)], ids=["noted", "not noted"])
@pytest.mark.parametrize("fault", ["store", "load"])
def test_kernels_are_built_without_a_folder_that_fails(fault, key, cutejax):
    """Regression: a read-only folder, or one from which nothing may be executed, ended the training run."""
    if fault == "load":
        cutejax.kernel(key)
        cutejax.start_process()
    cutejax.fault = fault
    with pytest.warns(UserWarning, match=r"cannot be kept in .*kernels \((not executable|Read-only file system)\)"):
        assert cutejax.kernel(key) == ("built c0de", "c0de")
    assert cutejax.kernel(("another", key), "other") == ("built other", "other")  # without another warning
    assert not cutejax.enabled


def test_notes_that_cannot_be_written_change_nothing(cutejax):
    cutejax.folder.rmdir()
    assert cutejax.kernel("key") == ("built c0de", "c0de")


def test_compilations_that_take_too_long_are_not_repeated(cutejax):
    cutejax.fault = "timeout"
    with pytest.raises(Timeout):
        cutejax.kernel("key")
    assert cutejax.built == ["key"]


@pytest.mark.parametrize("function", [of_the_user, lambda x: x])
def test_other_kernels_are_left_to_the_package(function, cutejax):
    """The user's own kernels: their source is in no key. And functions that may depend on variables."""
    cutejax.kernel(("key", function))
    assert not list(cutejax.folder.iterdir())
    cutejax.kernel(("key", forward))
    assert len(list(cutejax.folder.iterdir())) == 1


def test_function_with_other_arguments_is_called_as_before(cutejax):
    registry = cutejax.package.registry = types.SimpleNamespace(get_or_build=lambda *args, **options: (args, options))
    _fa4_cache.install()
    assert registry.get_or_build(1, 2, build=3) == ((1, 2), {"build": 3})


def test_installed_once(cutejax):
    installed = cutejax.package.registry.get_or_build
    _fa4_cache.install()
    assert cutejax.package.registry.get_or_build is installed


@pytest.mark.parametrize("missing", ["registry", "fingerprint", "configure_cache"])
def test_unknown_versions_work_without_the_cache(missing, cutejax):
    """Regression: attention did not use FlashAttention-4 any more."""
    delattr(cutejax.package, missing)
    cutejax.package.cache_config = lambda: types.SimpleNamespace(active=False)
    _fa4_cache.install()


def test_settings_of_the_package(cutejax, monkeypatch):
    """cutejax has a folder, which it only uses next to a server: it gets an empty one, unless the user has a server."""
    (options,) = cutejax.settings
    assert options["spool_dir"] == str(cutejax.folder)
    server = options["client_factory"]()
    server.hset("key", mapping={"so": b"code"})
    assert server.hgetall("key") == {}
    _fa4_cache.install()
    assert len(cutejax.settings) == 1
    cutejax.settings.clear()
    monkeypatch.setattr(_fa4_cache, "_folder", None)
    _fa4_cache.install()
    assert not cutejax.settings


def test_keys_depend_on_packages_settings_and_gpu(cutejax, monkeypatch):
    source = cutejax.folder.parent / "cutejax" / "kernels.py"

    def fresh():
        return digest(_fa4_cache._environment(), "key")

    digests = [fresh()]
    for text in ("tile = 64", "tile = 80"):
        source.write_text(text)
        digests.append(fresh())
    for name in ("CUTE_DSL_ARCH", "FA_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
        digests.append(fresh())
    monkeypatch.setattr(_fa4_cache._pallas, "compute_capability", lambda: 10.0)
    digests.append(fresh())
    monkeypatch.setattr(cutejax.package.fingerprint, "static_env_lines", lambda: ("compiler 2",))
    digests.append(fresh())
    assert len({*digests}) == 7
    assert fresh() == digests[-1]


def test_descriptions_tell_values_apart(cutejax):
    """Regression: a subclass of dict was described by its attributes alone, so that kernels with other tiles were loaded."""
    with_attribute = Configuration()
    with_attribute.tile = 64
    values = [
        *(None, True, 1, 1.0, "1", b"1", "None", (1,), [1], {1: 2}, {1: 2, 3: 4}, (1, 2), ((1,), 2), (1, (2,))),
        *(np.dtype("float32"), np.dtype("int32"), float, Arch.HOPPER, forward, Arch),
        *(jax.tree.structure(tree) for tree in ((1, 2), [1, 2], {"a": 1}, (1, (2,)))),
        *(Tile(), Tile(rows=64), Tile(rows=80), Tile(rows="64"), Tile(rows=Tile(rows=64)), Tile(columns=64)),
        *(Configuration(), Configuration(tile=64), with_attribute, {"tile": 64}),
        *(Configuration(tile=Tile(rows=64)), Configuration(tile=Tile(rows=80))),
    ]
    assert len({describe(value) for value in values}) == len(values)
    again = Configuration(tile=Tile(rows=80))
    assert describe(again) == describe(values[-1])


def test_objects_keep_their_first_description(cutejax):
    """Generating code adds attributes to them. A process that loads its kernels never does so."""
    tile = Tile(rows=64)
    before = describe((tile, 1))
    tile.layout = object()
    assert describe((tile, 1)) == before


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        of_the_user,
        Timeout,
        functools.partial(forward, 1),
        Slotted(),
        np.ones(2),
        object(),
        jax.tree.structure(jax.tree_util.Partial(lambda x: x)),
        jax.tree.structure(jax.tree_util.Partial(forward, 1)),
        Tile(mask=lambda x: x),
        {1: (object(),)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_could_hold_more_have_no_description(value, cutejax):
    with pytest.raises(Undescribable):
        describe(value)
