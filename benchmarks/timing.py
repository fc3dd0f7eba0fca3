"""Kernel time, memory and errors of the implementations of a case, on the GPU at hand.

Times are the sums of the kernels' own times, taken from the profiler, in bfloat16 on fresh random inputs. The values are
compared with the formula in float32 in the same run.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from benchmarks.environment import first_line
from benchmarks.formulas import FORMULAS, REFERENCES
from benchmarks.programs import (
    make_inputs,
    make_program,
    make_sequential_program,
    name_results,
    reference_values,
    relative_errors,
)
from liger_jax import runtime
from pallas_kernels.tune import PAST_ALL_CACHES

REPEATS = 9
PASSES = ("forward", "both")
MIN_INPUT_SETS = 16  # at least, for a decoding operation; together, the sets are larger than any cache


def kernel_us(compiled: jax.stages.Compiled, *args) -> tuple[Any, list[float]]:
    """Returns the result, and the summed kernel time of each of REPEATS runs in microseconds."""
    from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of JAX

    try:
        result, ms = profiler.measure(compiled, iterations=REPEATS)(*args)
    except RuntimeError:
        # The runs differ in their kernels, or their results do not fit in memory together: measure one at a time.
        runs = [profiler.measure(compiled)(*args) for _ in range(REPEATS)]
        result, ms = runs[0][0], [run[1] for run in runs]
    if not ms or None in ms:
        raise RuntimeError("the profiler saw no kernel")
    return result, [1e3 * time for time in ms]


def spread(us: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum and maximum."""
    statistic = {"median": statistics.median(us), "min": min(us), "max": max(us)}
    return {name: round(value, 2) for name, value in statistic.items()}


def measure(case: Case, functions: dict[str, Callable], passes: Sequence[str] = PASSES) -> dict[str, dict]:
    """Measures every implementation of a case.

    Returns:
        For each implementation {"forward_us", "both_us", "errors", "temp_bytes"}, or {"error"}. Values are compared only if
        `passes` has "forward".
    """
    try:
        return _measure_decoding(case, functions) if case.decoding else _measure(case, functions, passes)
    except Exception as error:  # the inputs or the reference failed; the other cases are still measured
        return {name: {"error": first_line(error)} for name in functions}


def _measure(case: Case, functions: dict[str, Callable], passes: Sequence[str]) -> dict[str, dict]:
    """Implements `measure`. Compiles all programs in parallel, because compiling takes longer than running.

    Our programs are compiled with the options of a training step.
    """
    inputs = make_inputs(case)
    expected = jax.block_until_ready(reference_values(case, *inputs)) if "forward" in passes else None

    def compile_program(name: str, mode: str):
        options = runtime.COMPILER_OPTIONS if name in ("ours", "kernel", "xla") else {}
        return jax.jit(make_program(functions[name], mode)).lower(*inputs).compile(compiler_options=options)

    results: dict[str, dict] = {}
    with ThreadPoolExecutor() as pool:
        programs = {name: {mode: pool.submit(compile_program, name, mode) for mode in passes} for name in functions}
    for name, futures in programs.items():
        try:
            result: dict[str, Any] = {}
            for mode, future in futures.items():
                values, us = kernel_us(future.result(), *inputs)
                result[f"{mode}_us"] = spread(us)
            if expected is not None:
                result["errors"] = relative_errors(values, expected)
            if case.op == "linear_cross_entropy":
                result["temp_bytes"] = futures["both"].result().memory_analysis().temp_size_in_bytes
        except Exception as error:  # the other implementations are still measured
            result = {"error": first_line(error)}
        values = None  # frees its memory for the next implementation
        results[name] = result
    return results


def _measure_decoding(case: Case, functions: dict[str, Callable]) -> dict[str, dict]:
    """Implements `measure` for a decoding operation: a forward pass on different inputs at each call."""
    _, constants, _ = make_inputs(case)
    size = sum(2 * int(np.prod(normal.shape)) for normal in case.arrays.values())
    inputs = [make_inputs(case, draw)[0] for draw in range(max(MIN_INPUT_SETS, -(-PAST_ALL_CACHES // size)))]
    inputs32 = jax.tree.map(lambda array: array.astype(jnp.float32), inputs[0])
    with jax.default_matmul_precision("highest"):
        expected = name_results(jax.jit(REFERENCES[case.op])(**inputs32, **constants))
    results: dict[str, dict] = {}
    for name, function in functions.items():
        try:
            compiled = jax.jit(make_sequential_program(function)).lower(inputs, constants).compile()
            values, us = kernel_us(compiled, inputs, constants)
            us_per_call = spread([time / len(inputs) for time in us])
            errors = relative_errors(name_results(values[0]), expected)
            results[name] = {"forward_us": us_per_call, "errors": errors}
        except Exception as error:  # the other implementations are still measured
            results[name] = {"error": first_line(error)}
    return results


def measure_copy(case: Case) -> dict[str, Any]:
    """Returns {"forward_us"} of a program that only reads and writes as many bytes as the forward pass."""
    constants = case.constants()
    arrays = {name: jax.ShapeDtypeStruct(normal.shape, jnp.bfloat16) for name, normal in case.arrays.items()}
    results = jax.eval_shape(functools.partial(FORMULAS[case.op], **case.options), **arrays, **constants)
    tables = sum(table.nbytes for table in constants.values())
    tables //= 3 if case.op == "mrope" else 1  # mrope reads one of three angles
    moved = tables + sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((arrays, results)))
    try:
        array = jnp.ones(moved // 4, jnp.bfloat16)
        return {"forward_us": spread(kernel_us(jax.jit(jnp.negative).lower(array).compile(), array)[1])}
    except Exception as error:
        return {"error": first_line(error)}
