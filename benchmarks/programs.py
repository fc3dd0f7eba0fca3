"""The programs of a case: random inputs, forward and backward passes, and the float32 reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, Normal
from benchmarks.formulas import FORMULAS, REFERENCES

LARGE_ERROR = 2e-2  # relative, in the 2-norm; bfloat16 results differ from float32 by 2e-3 to 4e-3


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, normal: Normal) -> jax.Array:
    return (normal.mean + normal.scale * jax.random.normal(key, normal.shape)).astype(jnp.bfloat16)


def make_inputs(case: Case, draw: int = 0) -> tuple[dict, dict, Any]:
    """Returns arrays, constants, and the cotangents of the results. Each `draw` gives different arrays.

    The cotangents are None for a loss, whose cotangent is 1, and for an operation without a gradient.
    """
    *keys, cotangent_key = jax.random.split(jax.random.key((case.seed + draw) % 2**32), len(case.arrays) + 1)
    arrays = {name: _draw(key, normal) for key, (name, normal) in zip(keys, case.arrays.items(), strict=True)}
    constants = {name: jnp.asarray(value) for name, value in case.constants().items()}
    formula = functools.partial(FORMULAS[case.op], **case.options)
    results = jax.tree.leaves(jax.eval_shape(lambda: formula(**arrays, **constants)))
    if case.decoding or not results[0].shape:
        return arrays, constants, None
    cotangents = [_draw(jax.random.fold_in(cotangent_key, i), Normal(out.shape)) for i, out in enumerate(results)]
    return arrays, constants, tuple(cotangents)


def make_program(function: Callable, mode: str) -> Callable:
    """Returns a function of (arrays, constants, cotangents) to compile.

    It returns the results if `mode` is "forward", and the results and all gradients by name if `mode` is "both".
    """

    def forward(arrays, constants, cotangents):
        return function(**arrays, **constants)

    def both(arrays, constants, cotangents):
        def results(arrays):
            return tuple(jax.tree.leaves(function(**arrays, **constants)))

        out, pullback = jax.vjp(results, arrays)
        (gradients,) = pullback(jax.tree.map(jnp.ones_like, out) if cotangents is None else cotangents)
        return name_results(out) | {f"d{name}": value for name, value in gradients.items()}

    return {"forward": forward, "both": both}[mode]


def make_sequential_program(function: Callable) -> Callable:
    """Returns a function of (list of arrays, constants) that computes a list of results one after the other.

    As in decoding, no call finds its inputs in a cache.
    """
    function = jax.jit(function)  # traced once for all calls

    def run(inputs, constants):
        results = []
        for arrays in inputs:
            # Without the barrier, the compiler runs some of the calls in parallel.
            arrays, _ = jax.lax.optimization_barrier((arrays, results[-1:]))
            results.append(function(**arrays, **constants))
        return results

    return run


def name_results(results: Any) -> dict[str, jax.Array]:
    results = jax.tree.leaves(results)
    return {"out" if len(results) == 1 else f"out{i}": result for i, result in enumerate(results)}


def reference_values(case: Case, arrays: dict, constants: dict, cotangents: Any) -> dict[str, jax.Array]:
    """Returns results and gradients of the formula in float32, for the same rounded inputs."""
    function = functools.partial(REFERENCES[case.op], **case.options)
    arrays, cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, cotangents))
    with jax.default_matmul_precision("highest"):
        return jax.jit(make_program(function, "both"))(arrays, constants, cotangents)


@jax.jit
def _relative_distances(values: dict, expected: dict) -> dict:
    def distance(value, reference):
        return jnp.linalg.norm((value.astype(jnp.float32) - reference).ravel()) / jnp.linalg.norm(reference.ravel())

    return jax.tree.map(distance, values, expected)


def relative_errors(values: dict, expected: dict) -> dict[str, float]:
    """Returns |value - expected| / |expected| of every result and gradient."""
    return {name: float(f"{error:.2e}") for name, error in _relative_distances(values, expected).items()}
