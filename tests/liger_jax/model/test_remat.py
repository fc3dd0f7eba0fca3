"""Stacks of layers: equal to a plain loop, scanned or unrolled, and what the backward pass keeps."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.model import remat
from liger_jax.model.qwen_vl import causal_attention
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


# ---- the layers of the model -----------------------------------------------------------------------------------------

CONFIG = Qwen2VLConfig.tiny()


@functools.cache
def model():
    return Qwen2VL.init(CONFIG, dtype="float32")


@functools.cache
def text_operands():
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=(2, 64, CONFIG.text.hidden_size)), jnp.float32) for _ in range(2))
    return x, grad, jnp.tile(jnp.arange(64), (2, 3, 1)), jnp.ones((2, 64), jnp.int32)


def text_gradients(execution):
    """Returns the hidden states, and the gradients for x and all weights of the language model."""
    x, grad, position_ids, segment_ids = text_operands()
    attend = functools.partial(causal_attention, pk.find_segments(segment_ids, 1))

    @jax.jit
    def run(text, x):
        def hidden(text, x):
            return text(x, position_ids, attend, execution=execution)[0]

        out, pullback = jax.vjp(hidden, text, x)
        return out, pullback(grad)

    return run(model().language_model, x)


@pytest.mark.parametrize("policy", ["none", "dots", "full"])
def test_unrolled_layers_equal_scanned_ones(policy):
    expected = text_gradients(LayerExecution(policy, "none"))
    results = text_gradients(LayerExecution(policy, "all"))
    for value, want in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6 * float(jnp.abs(want).max()))


def test_blocks_of_tokens_equal_the_whole(monkeypatch):
    """With remat "full", the MLPs run on a quarter of the tokens at a time."""
    expected = text_gradients(LayerExecution("full"))
    monkeypatch.setattr(remat, "MIN_BLOCK", 32)
    sizes = []
    monkeypatch.setattr(remat, "_split_tokens", spy(remat._split_tokens, sizes))
    results = text_gradients(LayerExecution("full", "all"))
    assert set(sizes) == {(4, 1, 32, CONFIG.text.hidden_size)}
    for value, want in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


def spy(function, shapes):
    def call(*args):
        result = function(*args)
        shapes.append(result.shape)
        return result

    return call


def test_gradients_of_blocks_are_summed_in_float32(monkeypatch):
    """Each block adds less than bfloat16 resolves next to the first one."""
    monkeypatch.setattr(remat, "MIN_BLOCK", 1)
    x = jnp.array([[[256.0], [1.0], [1.0], [1.0]]], jnp.bfloat16)
    weight = jnp.ones((), jnp.bfloat16)

    def total(weight):
        return remat.apply_to_tokens(jnp.multiply, weight, x, LayerExecution("full")).astype(jnp.float32).sum()

    assert float(jax.grad(total)(weight)) == 260  # 259, rounded once; sums in bfloat16 stay at 256


def test_dots_saves_no_intermediate_result_twice(capsys):
    """Attention's operands and the sum after it are saved instead of the matmuls that they are made from."""
    x, _, _, segment_ids = text_operands()
    attend = functools.partial(pk.attention, segment_ids=pk.find_segments(segment_ids, 1))
    visual = jax.tree.map(lambda w: w[0], model().visual.blocks)
    x = x[..., : CONFIG.vision.embed_dim]
    tables = model().visual.rotary(jnp.zeros((2, 64, 2), jnp.int32))
    block = jax.checkpoint(lambda x, block: block(x, *tables, attend).sum(), policy=remat._POLICIES["dots"])
    print_saved_residuals(block, x, visual)
    lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line and "constant" not in line]
    reasons = Counter(
        next(word for word in ("operand", "attention", "residual", "dot_general") if word in line.split("from")[0])
        for line in lines
    )
    assert reasons == {"operand": 3, "attention": 2, "residual": 1, "dot_general": 1}


def test_taps_inside_a_checked_shard_map():
    """Regression: the array of tapped outputs did not vary over the mesh, as the outputs do, which was a TypeError."""
    data = arrays()

    def last_tap(x, weights):
        execution = LayerExecution("none", "none")
        return scan_layers(lambda x, w: (x @ w, None), x, weights, execution, tower="vision", taps=(1, 4))[2][1]

    mesh = Mesh(jax.devices()[:ROWS], ("data",))
    mapped = jax.jit(jax.shard_map(last_tap, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
    np.testing.assert_allclose(
        mapped(data["x"], data["weights"]), np.linalg.multi_dot([data["x"], *data["weights"][:5]]), rtol=1e-4
    )
