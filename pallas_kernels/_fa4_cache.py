"""Keeps the compiled kernels of FlashAttention-4 in a folder, where later processes find them without generating code.

The package fa4-jax describes its kernels in Python, and cutejax compiles them. cutejax has a cache, too, but its key is a
hash of the generated code, so each process generates the code of every kernel first. If everything else is cached, this is
half of the time that a training step takes to compile. Within a process, cutejax reuses a kernel for calls with equal keys,
which hold its functions, objects, dtypes and shapes. This file writes such a key down, with the versions and files of the
packages, the GPU and the settings, and remembers the hash of the code that it led to. A key with anything that has no
complete description, such as a function inside another one, is left to cutejax.
"""

import enum
import functools
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import _pallas

# Objects of their classes are described by their attributes, and their files are part of every key.
PACKAGES = "fa4_jax", "cutejax"

_folder: Path | None = None


def cache_kernels(folder: str | Path) -> None:
    """Keeps compiled FlashAttention-4 kernels in a folder, for later processes; JAX's compilation cache does not hold them.

    Compiling those of Qwen2-VL's training step takes 10 to 20 s, loading them less than a second. Whoever can write to the
    folder can run code in these processes. Has no effect without the package fa4-jax, or after `attention` has been called.

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
    import cutejax

    options = {"url": "none", "hmac_key": "none", "client_factory": _NoServer}
    cutejax.configure_cache(**options, spool_dir=str(_folder))
    try:
        find, environment = cutejax.registry.get_or_build, _environment()
    except (ImportError, AttributeError, OSError):  # another version of cutejax, whose own cache has to do
        return
    if not isinstance(find, functools.partial):  # else it was replaced before
        cutejax.registry.get_or_build = functools.partial(_get_or_build, find, _folder, environment)


def _get_or_build(find: Callable[..., Any], folder: Path, environment: str, *args: Any, **options: Any) -> Any:
    """Calls find(key, name, allow_cuda_graph, build) with a `build` that first looks for a compiled kernel."""
    if len(args) == 4 and not options:
        key, name, allow_cuda_graph, build = args
        args = key, name, allow_cuda_graph, functools.partial(_load_or_build, folder, environment, key, build)
    return find(*args, **options)


def _load_or_build(
    folder: Path, environment: str, key: Any, build: Callable[[], tuple[Any, str | None]]
) -> tuple[Any, str | None]:
    """Returns a compiled kernel and the hash of its code: those found for the key, else build()'s, which it remembers."""
    from cutejax import cache

    try:
        note = folder / f"{digest(environment, key)}.code"
    except Undescribable:
        return build()
    try:
        code = note.read_text()
        path = cache.lookup(code)
        if path is not None:
            return cache.load_so(path, code), code
    except Exception:  # no note yet, or a damaged file, of which cutejax makes a new one
        pass
    kernel, new_code = build()
    if new_code is not None:
        try:
            unfinished = note.with_suffix(f".{os.getpid()}")
            unfinished.write_text(new_code)
            unfinished.replace(note)
        except OSError:  # a folder that cannot be written to
            pass
    return kernel, new_code


# ---- keys ------------------------------------------------------------------------------------------------------------


class Undescribable(Exception):
    """Raised for a value whose description would not determine it."""


def digest(environment: str, key: Any) -> str:
    """Returns a hash of a key of cutejax and of everything else that a kernel depends on.

    Raises:
        Undescribable: the key has no complete description.
    """
    return hashlib.sha256(f"{environment}\n{describe(key)}".encode()).hexdigest()


def _environment() -> str:
    """Returns what compiled kernels depend on, apart from their keys: compilers, the packages' files, GPU and settings."""
    from cutejax import fingerprint

    folders = [Path(str(importlib.import_module(name).__file__)).parent for name in PACKAGES]
    files = [
        f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
    ]
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("CUTE_DSL"))
    return "\n".join([*fingerprint.static_env_lines(), *files, *settings, str(_pallas.compute_capability())])


_PLAIN = (type(None), bool, int, float, str, bytes)
# By id: an object, which must stay alive to keep its id, and its description.
_described: dict[int, tuple[Any, str]] = {}


def describe(value: Any) -> str:
    """Returns a text that two values share only if they are interchangeable, in this process or another.

    Generating code adds attributes to the objects that describe a kernel, so an object keeps its first description.

    Raises:
        Undescribable: there is none.

    Example:
        >>> describe({"tile": (64, 128), "causal": True})
        "dict(tuple('tile', tuple(64, 128)), tuple('causal', True))"
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, type | types.FunctionType):
        return _name(value)
    if isinstance(value, enum.Enum):
        return f"{_name(kind)}.{value.name}"
    if isinstance(value, jax.tree_util.PyTreeDef) and "<" not in str(value):  # no object without a description
        return str(value)
    if kind in (tuple, list, dict):
        return _describe_contents(value)
    for base in (kind, *(base for base in kind.__mro__ if base not in (object, dict))):
        # a class of another package, perhaps not written in Python, or one with slots could hold more
        if base.__module__.partition(".")[0] not in PACKAGES or "__slots__" in vars(base):
            raise Undescribable(_name(kind))
    if id(value) not in _described:
        _described[id(value)] = value, _describe_contents(value)
    return _described[id(value)][1]


def _describe_contents(value: Any) -> str:
    contents = value.items() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    attributes = getattr(value, "__dict__", {}).items()
    texts = (", ".join(map(describe, part)) for part in (contents, attributes))
    return f"{_name(type(value))}({' | '.join(filter(None, texts))})"


def _name(value: Any) -> str:
    """Returns the name by which a class or function can be imported."""
    name = value.__qualname__
    importable: Any = sys.modules.get(value.__module__)
    for part in name.split("."):
        importable = getattr(importable, part, None)
    if importable is not value:  # such as a function defined inside another one, on whose variables it may depend
        raise Undescribable(f"{value.__module__}.{name}")
    return f"{value.__module__}.{name}".removeprefix("builtins.")
