"""How a kernel is launched. The only file that imports Pallas: if JAX drops its Triton backend, this is what changes.

Kernels are written in the subset that translates line by line to Triton's own language: whole arrays as refs, explicit
indices and masks, elementwise arithmetic, reductions. Loads and stores are always masked by hand, since what an access
past the end of an array does differs between JAX versions.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # a JAX that has dropped the backend
    plgpu = None

# Given when the user's jit lowers, so a filter around the launch would come too early.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

cdiv, next_power_of_2 = pl.cdiv, pl.next_power_of_2
program_id = pl.program_id
when = pl.when  # @when(condition): the decorated function runs where the condition holds
span = pl.ds  # an index: start, number of elements
LOG2_E = math.log2(math.e)  # e^x is 2^(x LOG2_E), and 2^x is an instruction of the GPU
TRITON_CALL = "__gpu$xla.gpu.triton"  # what a launched kernel is called in StableHLO


def launch(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    interpret: bool,
    in_place: dict[int, int] | None = None,
    num_stages: int = 1,
) -> list[jax.Array]:
    """Runs `kernel(*operand_refs, *result_refs)` once for each point of the grid.

    Refs are the whole arrays, in memory, their last axis as wide as the next power of two. Arrays inside the kernel must
    have powers of two for sizes; what lies past the end of the real arrays is for the kernel to mask.

    Args:
        kernel: the body; see `load` and `store`.
        operands: arrays.
        results: shape and dtype of each result.
        grid: at most three axes.
        num_warps: warps (of 32 threads) that run one program together.
        interpret: run in Pallas's interpreter, on any platform.
        in_place: {operand: result} that share their memory. XLA copies the operand first if it is needed later.
        num_stages: turns of a loop whose loads are under way at once, if a matrix product uses what they bring.
    """
    # inside a shard_map a result says which mesh axes it varies over
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[_whole(operand.shape) for operand in operands],
        out_specs=[_whole(shape) for shape, _ in results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in results],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        input_output_aliases=in_place or {},
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
    )(*operands)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((*shape[:-1], next_power_of_2(shape[-1])), lambda *_: (0,) * len(shape))


def overhanging(start: int, size: int) -> Any:
    """A span that may reach past the end of a small array, where a mask cuts it off: JAX refuses a constant that does."""
    return span(program_id(0) * 0 + start, size)


def load(ref: Any, index: tuple, mask: jax.Array | None, dtype: Any = None, *, other: float = 0) -> jax.Array:
    """ref[index] as `dtype` (None: its own); `other` where the mask is False. No mask: all of it lies in the array."""
    found = plgpu.load(ref.at[_index(index)], mask=mask, other=None if mask is None else other)
    return found.astype(dtype or ref.dtype)


def store(ref: Any, index: tuple, value: jax.Array, mask: jax.Array | None) -> None:
    """ref[index] = value where the mask is True (None: everywhere), cast to the dtype of the ref."""
    plgpu.store(ref.at[_index(index)], value.astype(ref.dtype), mask=mask)


def _index(index: tuple) -> tuple:
    """With plain numbers as arrays: the interpreter asks an index for its shape."""
    return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a [M, K] @ b [K, N], or b [N, K] if `transposed`; summed in float32. Every size is 16 at least.

    float32 operands are multiplied exactly.
    """
    exact = a.dtype in (jnp.float32, jnp.float64)
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """2^x; on the GPU one instruction, where the library's function spends five to keep results below 2^-126."""
    if interpret or x.dtype != jnp.float32:
        return jnp.exp2(x)
    instruction = {"asm": "ex2.approx.ftz.f32 $0, $1;", "constraints": "=f,f", "pack": 1}
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.elementwise_inline_asm(**instruction, args=[x], result_shape_dtypes=[result])[0]


def pick(implementation: str | None, kernel: Callable, xla: Callable, *operands: jax.Array) -> Any:
    """Calls kernel(*operands, interpret=...) or xla(*operands).

    None decides when the program is lowered, and for the platform it is lowered for: a process without a GPU can lower
    for one, and the other way round.
    """
    if implementation == "xla" or (implementation is None and plgpu is None):
        return xla(*operands)
    if plgpu is None:
        raise NotImplementedError(
            f"implementation {implementation!r}: JAX {jax.__version__} has no Triton backend for Pallas"
        )
    if implementation is None:
        return jax.lax.platform_dependent(*operands, cuda=functools.partial(kernel, interpret=False), default=xla)
    return kernel(*operands, interpret=implementation == "interpret")


def either(kernel: Callable, xla: Callable) -> Callable:
    """local(static, *operands): what `pick` chooses for static.implementation, called with `static` first."""

    def local(static: Any, *operands: jax.Array) -> Any:
        chosen = (functools.partial(function, static) for function in (kernel, xla))
        return pick(static.implementation, *chosen, *operands)

    return local


def forward_only(op: str, local: Callable) -> Callable:
    """local(static, *operands) that says so when it is differentiated, whatever the implementation."""
    run = jax.custom_jvp(local, nondiff_argnums=(0,))

    @run.defjvp
    def no_gradient(static: Any, operands: tuple, tangents: tuple) -> Any:
        raise NotImplementedError(f"{op}: there is no gradient, it is for generation")

    return run


@functools.cache
def compute_capability() -> float | None:
    """That of this process's first NVIDIA GPU, such as 9.0; None without one."""
    try:
        return float(jax.local_devices(backend="cuda")[0].compute_capability)
    except RuntimeError:
        return None
