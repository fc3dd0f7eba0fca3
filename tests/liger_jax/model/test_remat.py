"""scan_layers equals a plain loop: kinds of layers in a pattern, outputs of some layers, updates after the first ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax.model.remat import scan_layers
from liger_jax.options import LayerExecution

DEPTH, ROWS, WIDTH = 6, 2, 4
EXECUTIONS = [LayerExecution(remat, unroll) for remat in ("none", "full") for unroll in ("none", "all")]


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "x": (ROWS, WIDTH),
        "weights": (DEPTH, WIDTH, WIDTH),
        "extras": (2, ROWS, WIDTH),
        "seeds": (2, ROWS, WIDTH),
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def run(execution, kinds, x, weights, extras, seeds, traces=None):
    """Returns a number that depends on the last output, all outputs, and those of layers 1 and 4."""

    def layer(x, weights, kind):
        if traces is not None:
            traces.append(kind)
        x = jnp.tanh(x @ weights) if kind == "tanh" else x + x @ weights
        return x, x

    x, outputs, tapped = scan_layers(
        *(layer, x, weights, execution),
        tower="text",
        kinds=kinds,
        taps=(1, 4),
        after_first=(lambda x, extra: x + 2 * extra, list(extras)),
    )
    return (x * seeds[0]).sum() + (outputs**2).sum() + sum((tap * seeds[1]).sum() for tap in tapped)


def expected(kinds, x, weights, extras, seeds):
    """The same in numpy, in the precision of the arguments."""
    total = 0.0
    for i, kind in enumerate(kinds):
        x = np.tanh(x @ weights[i]) if kind == "tanh" else x + x @ weights[i]
        total += (x**2).sum()
        x = x + 2 * extras[i] if i < len(extras) else x
        total += (x * seeds[1]).sum() if i in (1, 4) else 0
    return total + (x * seeds[0]).sum()


PATTERNS = {
    "one kind": ["linear"] * 6,
    "period 2": ["linear", "tanh"] * 3,
    "period 3": ["linear", "linear", "tanh"] * 2,
    "no period": ["tanh", *["linear"] * 5],
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients(pattern, execution):
    """The value and the directional derivative along random changes of every argument, against numpy in float64."""
    kinds, values, exact = PATTERNS[pattern], arrays(), arrays(np.float64)
    value, grads = jax.jit(jax.value_and_grad(lambda values: run(execution, kinds, **values)))(values)
    np.testing.assert_allclose(value, expected(kinds, **exact), rtol=1e-5)
    rng = np.random.default_rng(1)
    for name, array in exact.items():
        change = 1e-6 * rng.normal(size=array.shape)
        ends = [expected(kinds, **exact | {name: array + sign * change}) for sign in (1, -1)]
        np.testing.assert_allclose((grads[name] * change).sum(), (ends[0] - ends[1]) / 2, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("pattern", "scanned", "unrolled"), [("one kind", 1, 1), ("period 2", 2, 2), ("period 3", 3, 2)]
)
def test_layers_share_programs(pattern, scanned, unrolled):
    """A scan traces one period of the pattern, unrolled layers each kind once."""
    for unroll, count in (("none", scanned), ("all", unrolled)):
        traces = []
        execution = LayerExecution("none", unroll)
        jax.make_jaxpr(
            lambda values, execution=execution, traces=traces: run(
                execution, PATTERNS[pattern], **values, traces=traces
            )
        )(arrays())
        assert len(traces) == count, unroll
