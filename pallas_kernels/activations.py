"""Elementwise gates of MLP blocks: swiglu, geglu, quick_gelu.

None takes XLA's here on every platform. The forward kernels are as fast as XLA's or faster, but kernels stand in the way of
fusing a gate with its neighbours, and its forward pass with its backward pass: on an H200 a training step of Qwen2-VL-2B
takes 459 ms with them and 444 without.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _rows, _sharding, _tuning, _validate
from pallas_kernels._tuning import Blocks


def swiglu(gate: jax.Array, up: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """silu(gate) * up = gate * sigmoid(gate) * up.

    Args:
        gate: [...], float.
        up: as gate, same shape and dtype.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [...] in gate's dtype; the arithmetic is float32. Backward keeps nothing but gate and up.

    Raises:
        ValueError: shapes or dtypes differ, or are not floating.

    Source: Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import swiglu
        >>> print(swiglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0])).round(3))
        [0.    1.462]
    """
    return _checked_and_run("swiglu", "silu", implementation, gate=gate, up=up)


def geglu(gate: jax.Array, up: jax.Array, *, approximate: bool = True, implementation: str | None = None) -> jax.Array:
    """gelu(gate) * up.

    Args:
        gate: [...], float.
        up: as gate, same shape and dtype.
        approximate: True for the tanh formula 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), False for x Phi(x).
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [...] in gate's dtype; the arithmetic is float32. Backward keeps nothing but gate and up.

    Raises:
        ValueError: shapes or dtypes differ, or are not floating.

    Source: Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import geglu
        >>> print(geglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0]), approximate=False).round(2))
        [0.   1.68]
    """
    return _checked_and_run("geglu", "gelu_tanh" if approximate else "gelu_exact", implementation, gate=gate, up=up)


def quick_gelu(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of Qwen2-VL's vision MLP.

    Args:
        x: [...], float.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [...] in x's dtype; the arithmetic is float32. Backward keeps nothing but x.

    Raises:
        ValueError: x is not floating.

    Source: Hendrycks and Gimpel 2016, Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import quick_gelu
        >>> print(quick_gelu(jnp.array([0.0, 1.0])).round(3))
        [0.    0.846]
    """
    return _checked_and_run("quick_gelu", "quick_gelu", implementation, x=x)


class _Static(NamedTuple):
    activation: str
    implementation: str | None


def _checked_and_run(op: str, activation: str, implementation: str | None, **arrays: jax.Array) -> jax.Array:
    """activation(first array) * the second, if there is one."""
    _validate.known_implementation(op, implementation)
    _validate.floating(op, **arrays)
    _validate.same_dtype(op, **arrays)
    first, *_ = arrays.values()
    for name, array in arrays.items():
        _validate.shape(op, name, array.shape, first.shape)
    static = _Static(activation, implementation if implementation and first.size else "xla")
    operands = [array[None] if first.ndim else array[None, None] for array in arrays.values()]
    return _gate(static, *_sharding.agree(_forward_op(static, len(operands)), *operands)).reshape(first.shape)


# ---- activations: x -> value and slope -------------------------------------------------------------------------------


def _silu(x):
    sigmoid = jax.nn.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _quick_gelu(x):
    sigmoid = jax.nn.sigmoid(1.702 * x)
    return x * sigmoid, sigmoid * (1 + 1.702 * x * (1 - sigmoid))


def _gelu_tanh(x):
    scale, cubic = (2 / jnp.pi) ** 0.5, 0.044715
    tanh = jnp.tanh(scale * (x + cubic * x * x * x))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * cubic * x * x)
    return 0.5 * x * (1 + tanh), slope


def _gelu_exact(x, erfc=jax.lax.erfc):
    below = 0.5 * erfc(-x * 0.5**0.5)  # the share of a normal distribution below x
    return x * below, below + x * jnp.exp(-0.5 * x * x) / (2 * jnp.pi) ** 0.5


def _erfc_in_kernel(x):
    """The complementary error function, which Triton's lowering lacks, to two units of float32.

    erfc(|x|) = t exp(p(2 t - 1) - x^2) with t = 2 / (2 + |x|), p a least-squares fit at Chebyshev nodes of t in (0, 1).
    """
    away = jnp.abs(x)
    t = 2 / (2 + away)
    exponent = jnp.zeros_like(x)
    for coefficient in reversed(_ERFC):
        exponent = exponent * (2 * t - 1) + coefficient
    tail = t * jnp.exp(exponent - away * away)
    return jnp.where(x >= 0, tail, 2 - tail)


_ERFC = (
    -0.671793654, 0.672638, 0.0473262304, -0.0468074122, -0.00977250376,
    0.00842038645, 0.00158751818, -0.00161680722, -9.98706863e-05, 0.000117750172,
)  # fmt: skip

_ACTIVATIONS: dict[str, Callable] = {
    "silu": _silu,
    "quick_gelu": _quick_gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_exact": _gelu_exact,
}
_IN_KERNELS = _ACTIVATIONS | {"gelu_exact": functools.partial(_gelu_exact, erfc=_erfc_in_kernel)}


# ---- XLA implementation: gate and up [g, ..., D], or gate alone ------------------------------------------------------


def _forward_xla(static: _Static, gate, *up):
    value, _ = _ACTIVATIONS[static.activation](gate.astype(_validate.wide(gate.dtype)))
    return (_times(value, up).astype(gate.dtype),)


def _backward_xla(static: _Static, grad, gate, *up):
    """-> dgate = grad up slope(gate), and dup = grad activation(gate) if there is an up."""
    value, slope = _ACTIVATIONS[static.activation](gate.astype(_validate.wide(gate.dtype)))
    grad = grad.astype(value.dtype)
    return tuple(g.astype(gate.dtype) for g in (grad * _times(slope, up), *(grad * value for _ in up)))


def _times(value, up):
    """value * up, or value if there is no up."""
    return value * up[0].astype(value.dtype) if up else value


# ---- kernels: one program for a tile of rows and columns -------------------------------------------------------------


def _gate_forward(*refs, static: _Static, rows: int, width: int, blocks: Blocks):
    """Refs gate, (up,) out; grid (blocks of rows, blocks of columns)."""
    *inputs, out_ref = refs
    index, inside = _rows.tile(rows, width, blocks)
    wide = _validate.wide(out_ref.dtype)
    gate, *up = (_pallas.load(ref, index, inside, wide) for ref in inputs)
    value, _ = _IN_KERNELS[static.activation](gate)
    _pallas.store(out_ref, index, _times(value, up), inside)


def _gate_backward(*refs, static: _Static, rows: int, width: int, blocks: Blocks):
    """Refs grad, gate, (up,) dgate (, dup); grid (blocks of rows, blocks of columns)."""
    inputs, outputs = refs[: len(refs) // 2 + 1], refs[len(refs) // 2 + 1 :]
    index, inside = _rows.tile(rows, width, blocks)
    wide = _validate.wide(outputs[0].dtype)
    grad, gate, *up = (_pallas.load(ref, index, inside, wide) for ref in inputs)
    value, slope = _IN_KERNELS[static.activation](gate)
    for ref, result in zip(outputs, (grad * _times(slope, up), grad * value), strict=False):
        _pallas.store(ref, index, result, inside)


def _launch(kernel, op: str, static: _Static, operands, results: int, interpret: bool, blocks: Blocks | None):
    first = operands[0]
    width = first.shape[-1]
    rows = first.size // width
    blocks = blocks or _tuning.blocks(op, rows=rows, width=width)
    found = _pallas.launch(
        functools.partial(kernel, static=static, rows=rows, width=width, blocks=blocks),
        [x.reshape(rows, width) for x in operands],
        [((rows, width), first.dtype)] * results,
        grid=(_pallas.cdiv(rows, blocks.rows), _pallas.cdiv(width, blocks.columns)),
        num_warps=blocks.num_warps,
        interpret=interpret,
    )
    return tuple(x.reshape(first.shape) for x in found)


def forward_kernel(static: _Static, *operands, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    return _launch(_gate_forward, "gate_forward", static, operands, 1, interpret, blocks)


def backward_kernel(static: _Static, *operands, interpret: bool, blocks: Blocks | None = None):
    """As _backward_xla."""
    return _launch(_gate_backward, "gate_backward", static, operands, len(operands) - 1, interpret, blocks)


# ---- gradient and mesh: every axis may be sharded --------------------------------------------------------------------


_forward_local = _pallas.either(forward_kernel, _forward_xla)
_backward_local = _pallas.either(backward_kernel, _backward_xla)


def _forward_op(static: _Static, operands: int) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_forward_local, ("g.d",) * operands, ("g.d",), "g.d", static)


def _backward_op(static: _Static, operands: int) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_backward_local, ("g.d",) * (operands + 1), ("g.d",) * operands, "g.d", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(static: _Static, *operands):
    return _sharding.run(_forward_op(static, len(operands)), *operands)[0]


def _gate_fwd(static, *operands):
    return _gate(static, *operands), operands


def _gate_bwd(static, operands, grad):
    return _sharding.run(_backward_op(static, len(operands)), grad, *operands)


_gate.defvjp(_gate_fwd, _gate_bwd)
