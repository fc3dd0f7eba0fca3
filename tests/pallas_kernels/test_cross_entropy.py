"""Compares cross_entropy with float64 numpy: every option, edge cases, the vocabularies of Qwen2-VL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import shapes
from tests._support.losses import OPTIONS, filled, reference


@pytest.fixture(params=["xla", "interpret"], autouse=True)
def implementation(request, monkeypatch):
    """Runs every test with each implementation."""
    monkeypatch.setattr(pk, "cross_entropy", functools.partial(pk.cross_entropy, implementation=request.param))
    return request.param


def data(rows, vocab, dtype=jnp.float32, scale=2.0, seed=0):
    """Returns logits, labels of which some are ignored, and a cotangent for each row."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.uniform(size=rows) < 0.3, -100, rng.integers(0, vocab, rows))
    return jnp.asarray(scale * rng.normal(size=(rows, vocab)), dtype), jnp.asarray(labels), rng.normal(size=rows)


def check(logits, labels, cotangent, options, tolerance):
    cotangent = cotangent if options.get("reduction") == "none" else 0.7

    def run(logits):
        return jnp.sum(pk.cross_entropy(logits, labels, **options) * cotangent)

    loss, gradient = jax.jit(jax.value_and_grad(run))(logits)
    want, want_gradient = reference(logits, labels, cotangent, **options)
    assert float(loss) == pytest.approx(np.sum(want * cotangent), rel=1e-5, abs=1e-6)
    gradient = np.asarray(gradient, np.float64)
    assert np.max(np.abs(gradient - want_gradient)) <= tolerance * np.max(np.abs(want_gradient))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_numpy(name):
    """Compares loss and gradient for each option, and for all of them, in float32."""
    check(*data(9, 41), filled(OPTIONS[name], 9, 41), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_round_only_the_gradient(dtype):
    """The loss of 16-bit logits is exact; the gradient differs only by its own rounding."""
    check(*data(9, 423, dtype), filled(OPTIONS["all"], 9, 423), 0.6 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("vocab", sorted({text.vocab for text in shapes.TEXT.values()}))
def test_real_vocabularies_match_numpy(vocab):
    """Covers V = 151936 and 152064 with confident and flat rows in bfloat16."""
    check(*data(3, vocab, jnp.bfloat16, scale=6.0), {}, 0.6 * float(jnp.finfo(jnp.bfloat16).eps))


def test_certain_label_has_zero_loss_and_gradient():
    """If the label has all of the probability, loss and gradient are zero and finite."""
    logits = jnp.zeros((1, 8)).at[0, 3].set(1e4)
    loss, gradient = jax.jit(jax.value_and_grad(pk.cross_entropy))(logits, jnp.array([3]))
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("normalizer", [None, 0.0, 5.0])
def test_loss_is_zero_if_no_label_counts(normalizer):
    """If all rows are ignored, or there are none, loss, gradients and accuracy are 0, even for infinite logits."""

    def run(logits):
        labels = jnp.full(logits.shape[:1], -100)
        return pk.cross_entropy(logits, labels, normalizer=normalizer, return_metrics=True)

    for logits in (jnp.full((3, 5), jnp.inf), jnp.zeros((0, 5))):
        (loss, metrics), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(logits)
        assert loss == 0 and not gradient.any()
        assert metrics["num_tokens"] == 0 and metrics["accuracy"] == 0


def test_label_out_of_range_gives_nan():
    """A label outside the vocabulary that is not ignore_index gives a NaN loss and a NaN gradient of its row."""
    run = jax.jit(jax.value_and_grad(pk.cross_entropy))
    for label in (5, -1):
        loss, gradient = run(jnp.ones((2, 5)), jnp.array([1, label]))
        assert np.isnan(loss) and np.isnan(gradient[1]).all() and np.isfinite(gradient[0]).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_narrow_label_dtypes_keep_their_values(dtype):
    """Labels keep their values if their dtype cannot represent ignore_index or the size of the vocabulary."""
    logits, labels = jnp.asarray(np.random.default_rng(0).normal(size=(3, 300)), jnp.float32), [0, 100, 127]
    got = pk.cross_entropy(logits, jnp.array(labels, dtype), reduction="none")
    np.testing.assert_array_equal(got, pk.cross_entropy(logits, jnp.array(labels), reduction="none"))
    in_range = pk.cross_entropy(logits[:, :200], jnp.array([156], "uint8").repeat(3), reduction="none")
    assert (in_range > 0).all()  # -100 in uint8 is 156


def test_metrics_count_labels_and_correct_predictions():
    """Returns the number of counted labels, the accuracy, and the parts of the loss."""
    logits = jnp.array([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    labels = jnp.array([1, 2, 0, -100])
    loss, metrics = jax.jit(lambda x: pk.cross_entropy(x, labels, z_loss=0.1, return_metrics=True))(logits)
    assert metrics["num_tokens"] == 3
    assert metrics["accuracy"] == pytest.approx(2 / 3)  # of two equal logits, the first is the prediction
    assert metrics["loss"] == loss
    assert loss - metrics["z_loss"] == pytest.approx(float(pk.cross_entropy(logits, labels)), rel=1e-6)


def test_token_weights_are_differentiable():
    """token_weights are differentiable, including through the divisor."""
    logits, labels, _ = data(6, 11)
    weights = jnp.linspace(0.5, 2, 6)
    gradient = jax.jit(jax.grad(lambda w: pk.cross_entropy(logits, labels, token_weights=w)))(weights)
    for i in range(6):
        step = np.eye(6)[i] * 1e-4
        up, down = (reference(logits, labels, token_weights=np.asarray(weights) + s)[0] for s in (step, -step))
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-4, abs=1e-5)


def test_backward_saves_no_float32_logits():
    """The backward pass saves the logits in their dtype, and no float32 array of their size."""
    logits, labels, _ = data(4, 64, jnp.bfloat16)
    pullback = jax.eval_shape(lambda x: jax.vjp(lambda x: pk.cross_entropy(x, labels), x)[1], logits)
    assert not [x for x in jax.tree.leaves(pullback) if x.size >= logits.size and x.dtype == jnp.float32]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_rows_match_one_device(kind):
    """Sharded rows with class weights, also under vmap, give the values of one device."""
    logits, labels, _ = data(8, 12)
    options = filled(OPTIONS["all"], 8, 12) | {"token_weights": None}
    weights = options.pop("class_weights")
    run = jax.value_and_grad(lambda x, y, w: pk.cross_entropy(x, y, class_weights=w, **options))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    want = jax.jit(run)(logits, labels, weights)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*jax.device_put((logits, labels), NamedSharding(mesh, P("data"))), weights)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
    assert np.max(np.abs(np.asarray(got[1]) - np.asarray(want[1]))) < 1e-6
    batch = jnp.stack([logits, logits * 2, -logits]), jnp.stack([labels] * 3)
    mapped = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))
    want = mapped(*batch, weights)
    with jax.set_mesh(mesh):
        got = mapped(*jax.device_put(batch, NamedSharding(mesh, P(None, "data"))), weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
