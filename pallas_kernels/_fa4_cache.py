"""Keeps the compiled kernels of FlashAttention-4 in a folder, where later processes find them without generating code.

The package fa4-jax describes its kernels in Python, and cutejax compiles them. cutejax has a disk cache, but its key is a
hash of the generated code, so every process has to generate the code first. With everything else cached, that is half of a
training step's compile time. Within a process, cutejax looks kernels up by a key of functions, objects, dtypes and shapes.
This file turns that key into text, adds the packages' versions and sources, the GPU and the settings, and stores the hash of
the code under it. cutejax alone handles keys that cannot be described completely, such as those with a nested function, and
the kernels of other packages.
"""

import enum
import functools
import hashlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import _pallas

# Instances of their classes are described by their attributes. Their source files are part of every key.
PACKAGES = "fa4_jax", "cutejax"
NAMED = *PACKAGES, "builtins", "cutlass", "numpy"  # whose functions and classes are described by name
SETTINGS = "CUTE_DSL", "FA_"  # prefixes of environment variables on which generated code may depend

_folder: Path | None = None


def cache_kernels(folder: str | Path) -> None:
    """Keeps compiled FlashAttention-4 kernels in a folder, for later processes; JAX's compilation cache does not hold them.

    Qwen2-VL's training step takes 10 to 20 s to compile its kernels and less than a second to load them. Anyone who can
    write to the folder can run code in these processes. Has no effect without the package fa4-jax, or after `attention` has
    been called.

    Example:
        >>> from pallas_kernels import cache_kernels
        >>> cache_kernels("/tmp/kernels")
    """
    global _folder
    _folder = Path(folder)


class _NoServer:
    """An empty cache server. cutejax looks into its folder only where it also has a server."""

    def hgetall(self, key: str) -> dict:
        return {}

    def hset(self, key: str, mapping: dict) -> None:
        """Stores nothing."""


def install() -> None:
    """Makes cutejax keep its kernels in the folder, if there is one, and find them there."""
    if _folder is None:
        return
    try:
        import cutejax

        if not cutejax.cache_config().active:  # else the user chose a cache
            options = {"url": "none", "hmac_key": "none", "ttl": 0, "client_factory": _NoServer}
            cutejax.configure_cache(**options, spool_dir=str(_folder))
        find = cutejax.registry.get_or_build
        if not isinstance(find, functools.partial):  # else it was replaced before
            cutejax.registry.get_or_build = functools.partial(_get_or_build, find, _folder, _environment())
    except Exception:  # an unknown version of cutejax: attention works without a cache
        return


def _get_or_build(find: Callable[..., Any], folder: Path, environment: str, *args: Any, **options: Any) -> Any:
    """Calls find(key, name, allow_cuda_graph, build) with a `build` that first looks for a compiled kernel."""
    if len(args) == 4 and not options:
        key, name, allow_cuda_graph, build = args
        args = key, name, allow_cuda_graph, functools.partial(_load_or_build, folder, environment, key, build)
    return find(*args, **options)


def _load_or_build(folder: Path, environment: str, key: Any, build: Callable[[], Any]) -> Any:
    """Returns (kernel, hash of its code). Loads them if the key is known; otherwise calls build() and notes the hash."""
    from cutejax import cache

    try:
        note = folder / f"{digest(environment, key)}.code"
    except Undescribable:
        return _build_anyway(folder, build)
    try:
        code = note.read_text()
        path = cache.lookup(code)
        if path is not None:
            return cache.load_so(path, code), code
    except Exception:  # no note yet, or a damaged file
        pass
    built = _build_anyway(folder, build)
    try:
        _, code = built
        if cache.lookup(code) is not None:
            unfinished = note.with_suffix(f".{os.getpid()}")
            unfinished.write_text(code)
            unfinished.replace(note)
    except Exception:  # the kernel is not in the cache, or the folder cannot be written to
        pass
    return built


def _build_anyway(folder: Path, build: Callable[[], Any]) -> Any:
    """Returns build(), without the folder if it fails: it may be read-only or full, or its kernels may not load."""
    import cutejax

    try:
        return build()
    except cutejax.CompileTimeout:
        raise
    except Exception as error:
        cutejax.configure_cache(enabled=False)
        built = build()  # raises the same error if the folder is not its cause
        warnings.warn(
            f"FlashAttention-4's kernels cannot be kept in {folder} ({error}); each process compiles them", stacklevel=1
        )
        return built


# ---- keys ------------------------------------------------------------------------------------------------------------


class Undescribable(Exception):
    """Raised for a value that cannot be described completely."""


def digest(environment: str, key: Any) -> str:
    """Returns a hash of a key of cutejax and of everything else that a kernel depends on.

    Raises:
        Undescribable: the key cannot be described completely.
    """
    return hashlib.sha256(f"{environment}\n{describe(key)}".encode()).hexdigest()


def _environment() -> str:
    """Returns what kernels and their keys depend on: compilers, sources, this file, settings and the GPU."""
    from cutejax import fingerprint

    folders = [Path(str(importlib.import_module(name).__file__)).parent for name in PACKAGES]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    sources = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (Path(__file__), *files)]
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(SETTINGS))
    device = jax.devices()[0]
    gpu = device.device_kind, getattr(device, "core_count", None), _pallas.compute_capability()
    return "\n".join([*fingerprint.static_env_lines(), *sources, *settings, str(gpu)])


_PLAIN = (type(None), bool, int, float, str, bytes)
# By id: an object, which must stay alive to keep its id, and its description.
_described: dict[int, tuple[Any, str]] = {}


def describe(value: Any) -> str:
    """Returns a text that two values share only if they are interchangeable, in this process or another.

    Generating code adds attributes to the objects that describe a kernel, so an object keeps its first description.

    Raises:
        Undescribable: the value cannot be described completely.

    Example:
        >>> describe({"tile": (64, 128), "causal": True})
        "dict[tuple['tile', tuple[64, 128]], tuple['causal', True]]"
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, type | types.FunctionType):
        return _name(value)
    if isinstance(value, enum.Enum):
        return f"{_name(kind)}.{value.name}"
    if isinstance(value, jax.tree_util.PyTreeDef) and not any(text in str(value) for text in ("CustomNode", "<")):
        return str(value)
    if kind in (tuple, list, dict):
        return f"{_name(kind)}[{_describe_items(value)}]"
    for base in kind.__mro__[:-1] or [object]:
        # a class of another package, perhaps not written in Python, or one with slots could hold more
        if base is not dict and (base.__module__.partition(".")[0] not in PACKAGES or "__slots__" in vars(base)):
            raise Undescribable(_name(kind))
    if id(value) not in _described:
        items = _describe_items(value) if isinstance(value, dict) else ""
        _described[id(value)] = value, f"{_name(kind)}[{items}] with {describe(vars(value))}"
    return _described[id(value)][1]


def _describe_items(value: Any) -> str:
    return ", ".join(map(describe, value.items() if isinstance(value, dict) else value))


def _name(value: Any) -> str:
    """Returns the name by which a function or class can be imported."""
    name = value.__qualname__
    importable: Any = sys.modules.get(value.__module__)
    for part in name.split("."):
        importable = getattr(importable, part, None)
    # not so a function defined inside another one, on whose variables it may depend
    if importable is not value or value.__module__.partition(".")[0] not in NAMED:
        raise Undescribable(f"{value.__module__}.{name}")
    return f"{value.__module__}.{name}".removeprefix("builtins.")
