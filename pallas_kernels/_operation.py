"""Builds a differentiable operation that runs on a mesh and chooses its implementation for the platform.

For each of its two passes, an op file has a kernel and an equivalent XLA function, which `choose_implementation` combines
into one local function. It declares the names and the axes of their arrays:

    _OPERATION = DifferentiableOp(
        forward=Pass(
            choose_implementation(forward_kernel, forward_xla),
            operands={"x": "G ... D", "weight": "G D"},
            results={"out": "G ... D", "inverse_rms": "G ..."},
            parallel=("G", "..."),
        ),
        backward=Pass(
            choose_implementation(backward_kernel, backward_xla),
            operands={"x": "G ... D", "d_out": "G ... D", "weight": "G D", "inverse_rms": "G ..."},
            results={"d_x": "G ... D", "d_weight": "G D"},
            parallel=("G", "..."),
        ),
        returns=("out",),
    )
    (out,) = _OPERATION(static, x, weight)

The names connect the passes. A backward operand is either a forward operand or result, which is then saved as a residual, or
d_NAME, the cotangent of the result NAME. A backward result d_NAME is the gradient of the forward operand NAME.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _sharding


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of an operation: a local function, and the axes of each operand and result (see `_sharding.ParallelOp`).

    `local(static, *operands)` returns a tuple of results; `static` is hashable. An operand NAME may be None. It is then
    absent from the pass, and so is its gradient, the result d_NAME, for which `local` returns None.
    """

    local: Callable[..., tuple]
    operands: Mapping[str, str]
    results: Mapping[str, str]
    parallel: tuple[str, ...]
    rows_over: tuple[str, ...] = ()  # see `_sharding.split_rows_over`

    def parallel_op(self, static: Any, *operands: jax.Array | None) -> _sharding.ParallelOp:
        """Returns the ParallelOp of the operands that are present."""
        present = tuple(operand is not None for operand in operands)
        return _sharding.ParallelOp(
            _without_absent(self.local, present),
            tuple(axes for axes, is_present in zip(self.operands.values(), present, strict=True) if is_present),
            tuple(self.results[name] for name in self._result_names(operands)),
            self.parallel,
            static,
            self.rows_over,
        )

    def align(self, static: Any, *operands: jax.Array | None) -> tuple[Any, ...]:
        """Returns the operands in the layout that the pass needs; see `_sharding.align_operands`."""
        op = self.parallel_op(static, *operands)
        aligned = iter(_sharding.align_operands(op, *_present(operands)))
        return tuple(operand if operand is None else next(aligned) for operand in operands)

    def run(self, static: Any, *operands: jax.Array | None) -> dict[str, jax.Array]:
        """Returns the results by name, on any mesh; see `_sharding.run`."""
        results = _sharding.run(self.parallel_op(static, *operands), *_present(operands))
        return dict(zip(self._result_names(operands), results, strict=True))

    def _result_names(self, operands: tuple) -> list[str]:
        absent = {f"d_{name}" for name, operand in zip(self.operands, operands, strict=True) if operand is None}
        return [name for name in self.results if name not in absent]


@dataclasses.dataclass(frozen=True, eq=False)
class DifferentiableOp:
    """An operation with its own gradient, called as `op(static, *operands)`; returns a tuple of results.

    `static` is hashable; `static.implementation` chooses the implementation. Gradients are cast to the dtypes of their
    operands. An operand without a gradient in `backward` is a constant.

    Attributes:
        forward: the forward pass.
        backward: the backward pass; its operands that are not cotangents are the residuals.
        returns: the names of the forward results to return; the other results are only residuals.
        gradients: operand -> backward result that is its gradient, where that is not d_NAME: operands may share a gradient.
        saved_as: the name of the forward results in rematerialization policies.
    """

    forward: Pass
    backward: Pass
    returns: tuple[str, ...]
    gradients: Mapping[str, str] = dataclasses.field(default_factory=dict)
    saved_as: str | None = None

    def __call__(self, static: Any, *operands: jax.Array | None) -> tuple[jax.Array, ...]:
        return self.apply(static, *self.align(static, *operands))

    def align(self, static: Any, *operands: jax.Array | None) -> tuple[Any, ...]:
        """Returns the operands in the layout of the forward pass; no gradient flows into constants."""
        constants = (self._gradient_name(name) not in self.backward.results for name in self.forward.operands)
        stopped = (jax.lax.stop_gradient(x) if constant else x for x, constant in zip(operands, constants, strict=True))
        return self.forward.align(static, *stopped)

    def apply(self, static: Any, *operands: jax.Array | None) -> tuple[jax.Array, ...]:
        """Runs the operation on operands that `align` returned."""
        dtypes = tuple(None if operand is None else jnp.dtype(operand.dtype) for operand in operands)
        mesh_axes = _sharding.rows_over.get()
        op = self._with_rows_over(mesh_axes) if mesh_axes else self
        return _differentiable(op, static, dtypes, *operands)

    def _with_rows_over(self, mesh_axes: tuple[str, ...]) -> "DifferentiableOp":
        forward, backward = (
            dataclasses.replace(operation_pass, rows_over=mesh_axes) for operation_pass in (self.forward, self.backward)
        )
        return dataclasses.replace(self, forward=forward, backward=backward)

    def _gradient_name(self, operand: str) -> str:
        return self.gradients.get(operand, f"d_{operand}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(op: DifferentiableOp, static: Any, dtypes: tuple, *operands: jax.Array | None) -> tuple:
    results = op.forward.run(static, *operands)
    return tuple(results[name] for name in op.returns)


def _forward_rule(op: DifferentiableOp, static: Any, dtypes: tuple, *operands: jax.Array | None) -> tuple:
    results = op.forward.run(static, *operands)
    if op.saved_as is not None:
        results = {name: checkpoint_name(x, op.saved_as) for name, x in results.items()}
    arrays = dict(zip(op.forward.operands, operands, strict=True)) | results
    residuals = {name: arrays[name] for name in op.backward.operands if name in arrays}
    return tuple(results[name] for name in op.returns), residuals


def _backward_rule(op: DifferentiableOp, static: Any, dtypes: tuple, residuals: dict, cotangents: tuple) -> tuple:
    arrays = residuals | {f"d_{name}": cotangent for name, cotangent in zip(op.returns, cotangents, strict=True)}
    results = op.backward.run(static, *(arrays[name] for name in op.backward.operands))
    gradients = [results.get(op._gradient_name(name)) for name in op.forward.operands]
    return tuple(None if grad is None else grad.astype(dtype) for grad, dtype in zip(gradients, dtypes, strict=True))


_differentiable.defvjp(_forward_rule, _backward_rule)


def _present(arrays: tuple) -> list[jax.Array]:
    return [array for array in arrays if array is not None]


@functools.cache  # equal arguments give the same function, so that ParallelOps compare equal
def _without_absent(local: Callable[..., tuple], present: tuple[bool, ...]) -> Callable[..., tuple]:
    """Returns `local` as a function of the present operands, without the None among its results."""
    if all(present):
        return local

    def local_of_present(static: Any, *operands: jax.Array) -> tuple:
        remaining = iter(operands)
        return tuple(_present(local(static, *(next(remaining) if is_present else None for is_present in present))))

    return local_of_present
