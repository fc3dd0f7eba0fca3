"""Reads and writes the arrays of an Orbax folder, each under its path."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from liger_jax.checkpoint.steps import complete_steps
from liger_jax.errors import DamagedError, UserError
from liger_jax.finite import non_finite
from liger_jax.model.params import param_paths, path_name

# Bytes of arrays that are on the host at a time during a save. A larger array forms its own chunk.
CHUNK_BYTES = 256 * 2**20
# Errors that do not mean damage: the files may be intact.
NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "Permission denied", "Too many open files")


def make_handler(*, in_chunks: bool = True, largest: int = 0):
    """Returns Orbax's handler for a nested dict of arrays. Compression is off, since weights hardly compress.

    Args:
        in_chunks: write a few arrays at a time. Must be false for asynchronous saves: training continues meanwhile, and
            overwrites arrays that have not been fetched yet.
        largest: size of the largest array to read, in bytes. Orbax refuses arrays above its limit, which follows from it.
    """
    import orbax.checkpoint as ocp

    class PatientHandler(ocp.type_handlers.ArrayHandler):
        """Finishes all reads before the error of one is raised, since TensorStore prints errors of abandoned reads."""

        async def metadata(self, infos):
            return await _read_all([super(PatientHandler, self).metadata([info]) for info in infos])

        async def deserialize(self, infos, args=None):
            one_by_one = zip(infos, args or [None] * len(infos), strict=True)
            return await _read_all([super(PatientHandler, self).deserialize([info], [arg]) for info, arg in one_by_one])

    class ChunkedHandler(PatientHandler):
        """Copies arrays to the host in chunks of CHUNK_BYTES, each one after the previous one is on the disk.

        Fetches copies that it makes on the device. JAX caches the host value of a fetched array as long as the array
        lives; that of a copy is freed with the copy.
        """

        async def serialize(self, values, infos, args=None):
            chunk, size = [], 0
            for item in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                if chunk and size + item[0].nbytes > CHUNK_BYTES:
                    await self.write(chunk)
                    chunk, size = [], 0
                chunk.append(item)
                size += item[0].nbytes
            await self.write(chunk)
            return []

        async def write(self, chunk):
            values, infos, args = zip(*chunk, strict=True)
            for future in await super().serialize([jnp.copy(value) for value in values], infos, args):
                future.result()

    arrays = ChunkedHandler() if in_chunks else ocp.type_handlers.ArrayHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        enable_pinned_host_transfer=False if in_chunks else None,  # memory pinned for transfers is never released
        restore_concurrent_gb=1 + math.ceil(largest / 1e9),
        use_compression=False,
    )


async def _read_all(reads: Sequence[Awaitable[Sequence[Any]]]) -> list[Any]:
    """Returns the results of reads of one array each, or raises the first error after all of them have ended."""
    results: list[Any] = await asyncio.gather(*reads, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [array for (array,) in results]


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}, the structure that other programs expect in an Orbax checkpoint."""
    nested: dict[str, Any] = {}
    for path, array in arrays.items():
        *outer, name = path.split("/")
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = array
    return nested


def read_shapes(items: Path) -> dict[str, Any]:
    """Returns {path: shape and dtype} of the arrays in an Orbax folder."""
    with raise_damage(items):
        leaves, _ = jax.tree_util.tree_flatten_with_path(make_handler().metadata(items).tree)
        return {path_name(path): leaf for path, leaf in leaves}


def read_arrays(items: Path, targets: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Any]) -> list[jax.Array]:
    """Returns the arrays named in `targets`, in that order, each on the devices of its sharding (None: the default)."""
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    placed = nest({name: leaf.update(sharding=leaf.sharding or default) for name, leaf in targets.items()})
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    largest = max(leaf.size * max(leaf.dtype.itemsize, stored[name].dtype.itemsize) for name, leaf in targets.items())
    with raise_damage(items):
        args = ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)
        restored = make_handler(largest=largest).restore(items, args=args)
    arrays = param_paths(restored)
    return [arrays[name] for name in targets]


@contextlib.contextmanager
def raise_damage(items: Path) -> Iterator[None]:
    """Turns an error about the content of a checkpoint into a DamagedError."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # the files may be intact
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for a file that is missing or truncated
        if any(text in str(error) for text in NOT_DAMAGE):
            raise
        step, hint = items.parent, ""
        if step.name.isdigit():
            earlier = [number for number in complete_steps(step.parent) if number < int(step.name)]
            hint = f" (without {step}, the run resumes from step {earlier[-1]})" if earlier else ""
        reason = str(error).partition("\n")[0].partition(" See full TensorStore")[0][:200] or type(error).__name__
        raise DamagedError(f"{items} is damaged ({reason}); expected an intact Orbax checkpoint{hint}") from error


def check_arrays(items: Path, expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises a UserError that lists all missing, unexpected and differing arrays, unless there are none."""
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "different": [
            f"{name} is {stored[name]}, expected {value}"
            for name, value in expected.items()
            if stored.get(name, value) != value
        ],
    }
    report = "".join(f"\n  {problem}: {'; '.join(names)}" for problem, names in problems.items() if names)
    if report:
        raise UserError(f"{items} does not hold the expected arrays:{report}")


def check_finite_arrays(target: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Raises UserError if an array to be saved holds NaN or infinity."""
    if names := non_finite(arrays):
        raise UserError(f"{target}: {names[0]} holds NaN or infinity; expected finite numbers. Nothing was saved")
