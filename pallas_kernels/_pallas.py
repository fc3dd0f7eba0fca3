"""Launches kernels. The only file that imports Pallas: if JAX drops its Triton backend, only this file changes.

Kernels are written in the subset of Pallas that translates line by line to Triton's own language: whole arrays as refs,
explicit indices and masks, elementwise arithmetic, reductions. Every load and store that may reach past the end of an array
has a mask, because the behavior of such an access differs between JAX versions.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _sharding

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # a JAX that has dropped the backend
    plgpu = None  # type: ignore[assignment]  # checked before every use

# Global, because the warning is issued when the user's jit lowers: a filter around the launch would be too early.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

cdiv, next_power_of_2 = pl.cdiv, pl.next_power_of_2
program_id = pl.program_id
when = pl.when  # @when(condition): the decorated function runs where the condition holds
span = pl.ds  # an index: start, number of elements
LOG2_E = math.log2(math.e)  # e^x is 2^(x LOG2_E), and 2^x is a GPU instruction
TRITON_CALL = "__gpu$xla.gpu.triton"  # target of a kernel's custom call in StableHLO


def launch(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array | None],
    results: Sequence[tuple[tuple[int, ...], Any] | None],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    interpret: bool,
    in_place: dict[int, int] | None = None,
    num_stages: int = 1,
) -> list[Any]:
    """Runs `kernel(*operand_refs, *result_refs)` once for each point of the grid.

    Each ref is a whole array in memory, whose last axis is padded to the next power of two. Arrays inside the kernel must
    have power-of-two sizes, so the kernel masks the elements past the end of the real arrays. The ref of an absent operand
    or result (None) is None.

    Args:
        kernel: the body; see `load` and `store`.
        operands: arrays, or None.
        results: shape and dtype of each result, or None.
        grid: number of programs along at most three axes.
        num_warps: warps (of 32 threads) that run one program together.
        interpret: run in Pallas's interpreter, on any platform.
        in_place: index of an operand -> index of the result that overwrites it. XLA copies the operand first if it is needed
            later.
        num_stages: iterations of a loop whose loads are in flight at the same time, if a matrix product uses the loads.

    Returns:
        The results in order, None for an absent one.
    """
    name = getattr(kernel, "func", kernel).__name__.strip("_")
    present = [array is not None for array in (*operands, *results)]
    if not all(present):
        kernel = _with_absent_refs(kernel, present)
    arrays = [operand for operand in operands if operand is not None]
    outputs = [result for result in results if result is not None]
    aliases = {
        sum(present[:operand]): sum(present[len(operands) :][:result]) for operand, result in (in_place or {}).items()
    }
    # Inside a shard_map, a result must declare the mesh axes that it varies over.
    varying = jax.typeof(arrays[0]).manual_axis_type
    values = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[_whole(array.shape) for array in arrays],
        out_specs=[_whole(shape) for shape, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        input_output_aliases=aliases,
        name=name,
    )(*arrays)
    remaining = iter(values)
    return [None if result is None else next(remaining) for result in results]


def _with_absent_refs(kernel: Callable[..., None], present: Sequence[bool]) -> Callable[..., None]:
    def kernel_of_present(*refs: Any) -> None:
        remaining = iter(refs)
        kernel(*(next(remaining) if is_present else None for is_present in present))

    return kernel_of_present


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((*shape[:-1], next_power_of_2(shape[-1])), lambda *_: (0,) * len(shape))


def overhanging(start: int, size: int) -> Any:
    """Returns a span that may reach past the end of a small array, for masked accesses. JAX rejects such a constant span."""
    return span(program_id(0) * 0 + start, size)


def load(ref: Any, index: tuple, mask: jax.Array | None, dtype: Any = None, *, other: float = 0) -> jax.Array:
    """Returns ref[index] as `dtype` (None: the ref's dtype), with `other` where the mask is False.

    Without a mask, the whole index must lie inside the array.
    """
    value = plgpu.load(ref.at[_index(index)], mask=mask, other=None if mask is None else other)
    return value.astype(dtype or ref.dtype)


def store(ref: Any, index: tuple, value: jax.Array, mask: jax.Array | None) -> None:
    """Sets ref[index] = value, cast to the ref's dtype, where the mask is True (None: everywhere)."""
    plgpu.store(ref.at[_index(index)], value.astype(ref.dtype), mask=mask)


def _index(index: tuple) -> tuple:
    """Returns the index with plain numbers as arrays, because the interpreter reads the shape of each entry."""
    return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False, transposed_a: bool = False) -> jax.Array:
    """Computes a [M, K] @ b [K, N] with float32 sums. Every size is at least 16.

    With `transposed`, b is [N, K] and is transposed first; with `transposed_a`, a is [K, M] and is transposed first. float32
    operands are multiplied exactly, not rounded to tf32.
    """
    exact = a.dtype in (jnp.float32, jnp.float64)
    return jax.lax.dot_general(
        a,
        b,
        (((0 if transposed_a else 1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Computes 2^x: one instruction on the GPU, where results below 2^-126 become 0. The library function takes five."""
    if interpret or x.dtype != jnp.float32:
        return jnp.exp2(x)
    instruction: dict[str, Any] = {"asm": "ex2.approx.ftz.f32 $0, $1;", "constraints": "=f,f", "pack": 1}
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.elementwise_inline_asm(**instruction, args=[x], result_shape_dtypes=[result])[0]


def choose_implementation(kernel: Callable, xla: Callable) -> Callable:
    """Returns local(static, *operands), which runs the implementation that `static.implementation` names.

    kernel(static, *operands, interpret=...) and xla(static, *operands) must compute the same results.
    """

    def local(static: Any, *operands: jax.Array | None) -> Any:
        functions = (functools.partial(function, static) for function in (kernel, xla))
        return call_implementation(static.implementation, *functions, *operands)

    return local


def call_implementation(implementation: str | None, kernel: Callable, xla: Callable, *operands: Any) -> Any:
    """Calls kernel(*operands, interpret=...) or xla(*operands).

    None is resolved when the program is lowered, by the platform that it is lowered for: a process without a GPU can lower
    for one, and vice versa. XLA processes empty operands, such as those of a vmap over no problems: a kernel has no program
    for them.
    """
    is_empty = any(x.size == 0 for x in jax.tree.leaves(operands))
    if implementation == "xla" or is_empty or (implementation is None and plgpu is None):
        return xla(*operands)
    if plgpu is None:
        raise NotImplementedError(
            f"implementation is {implementation!r}; expected None or 'xla', because JAX {jax.__version__} has no Triton "
            "backend for Pallas"
        )
    if implementation is None:
        return jax.lax.platform_dependent(*operands, cuda=functools.partial(kernel, interpret=False), default=xla)
    return kernel(*operands, interpret=implementation == "interpret")


def forward_only(op: str, local: Callable) -> Callable:
    """Returns `local` as a function that raises NotImplementedError when differentiated, with any implementation.

    In a shard_map, it marks its operands as varying over the same mesh axes, as `_sharding.align_operands` does.
    """
    run = jax.custom_jvp(local, nondiff_argnums=(0,))

    @run.defjvp
    def no_gradient(static: Any, operands: tuple, tangents: tuple) -> Any:
        raise NotImplementedError(f"{op}: there is no gradient; expected a forward pass only, as in generation")

    return lambda static, *operands: run(static, *_sharding.vary_alike(*operands))


@functools.cache
def compute_capability() -> float | None:
    """Returns the compute capability of this process's first NVIDIA GPU, such as 9.0; None without one."""
    try:
        return float(jax.local_devices(backend="cuda")[0].compute_capability)
    except RuntimeError:
        return None
