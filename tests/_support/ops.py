"""The registry's operations over rows, one `Op` per variant, for the tests of kernels."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.registry import OPERATIONS, Operation


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation with options, called as run(*arguments, implementation=...)."""

    operation: Operation
    run: Callable
    formula: Callable

    @property
    def axes(self) -> list[list[str]]:
        """The axis names of each argument."""
        return [argument.axes.split() for argument in self.operation.arguments.values()]

    @property
    def row_axes(self) -> list[str]:
        """The names of the row axes."""
        return ["..."] if "..." in self.axes[0] else ["B", "T"]

    @property
    def row_count(self) -> int:
        """The smallest number of row axes of an argument."""
        return len(self.row_axes)

    @property
    def differentiable(self) -> int:
        """The number of leading arguments that have a gradient."""
        return len(self.operation.differentiable)

    def make(self, rows, width, dtype="float32", seed=0) -> list[jax.Array]:
        """Returns random arguments for row axes `rows` and rows of `width` numbers."""
        return self.operation.example(self.operation.sizes(rows, width), dtype, seed)

    def value_and_gradients(self, implementation: str | None) -> Callable:
        """Returns a function of the arguments that lists the results and their gradients for random cotangents."""

        def run(*arguments):
            differentiable, constants = arguments[: self.differentiable], arguments[self.differentiable :]
            function = functools.partial(self.run, implementation=implementation)
            out, pullback = jax.vjp(lambda *args: function(*args, *constants), *differentiable)
            return jax.tree.leaves((out, pullback(random_like(out))))

        return run


def random_like(tree):
    """Returns random numbers, the same ones for the same shapes."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def close(got, want, tolerance=1e-5):
    """Asserts that the largest difference is within the tolerance, relative to the largest entry or 1."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)


OPS = {
    f"{name} {variant}".strip(): Op(
        operation,
        functools.partial(operation.function, **options),
        functools.partial(operation.formula, **options),
    )
    for name, operation in OPERATIONS.items()
    if operation.family in ("norm", "activation", "rope") or name == "cross_entropy"
    for variant, options in {"": {}, **operation.variants}.items()
}
REAL = [(name, rows, width) for name, operation in OPERATIONS.items() for rows, width in operation.shapes]
