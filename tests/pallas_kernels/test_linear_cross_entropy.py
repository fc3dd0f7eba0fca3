"""Compares linear_cross_entropy with float64 numpy: options, chunk sizes, meshes, and memory."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from tests._support.losses import OPTIONS, filled, reference

linear = importlib.import_module("pallas_kernels.linear_cross_entropy")  # the module, not the function

IMPLEMENTATIONS = {
    name: functools.partial(pk.linear_cross_entropy, implementation=name) for name in ("xla", "interpret")
}


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request, monkeypatch):
    """Runs every test with each implementation."""
    monkeypatch.setattr(pk, "linear_cross_entropy", IMPLEMENTATIONS[request.param])
    return request.param


def data(rows, hidden, vocab, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.uniform(size=rows) < 0.3, -100, rng.integers(0, vocab, rows))
    x, weight, bias = rng.normal(size=(rows, hidden)), rng.normal(size=(vocab, hidden)) * 0.5, rng.normal(size=vocab)
    return *(jnp.asarray(a, dtype) for a in (x, weight, bias)), jnp.asarray(labels), rng.normal(size=rows)


STATIC = ("chunk_rows", "label_smoothing", "z_loss", "softcap", "reduction", "normalizer")


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def loss_and_gradients(function, weights, labels, cotangent, **options):
    """Computes the weighted sum of losses and its gradients. Labels are traced, so that new ones do not recompile."""

    def run(x, weight, bias):
        return jnp.sum(function(x, weight, labels, bias=bias, **options) * cotangent)

    return jax.value_and_grad(run, argnums=(0, 1, 2))(*weights)


def check(x, weight, bias, labels, cotangent, options, chunk_rows, tolerance=1e-5):
    cotangent = cotangent if options.get("reduction") == "none" else 0.7
    args = pk.linear_cross_entropy, (x, weight, bias), labels, cotangent
    loss, gradients = loss_and_gradients(*args, chunk_rows=chunk_rows, **options)
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    want, dlogits = reference(wide[0] @ wide[1].T + wide[2], labels, cotangent, **options)
    assert float(loss) == pytest.approx(np.sum(want * cotangent), rel=max(tolerance, 1e-5), abs=1e-6)
    for got, expected in zip(gradients, (dlogits @ wide[1], dlogits.T @ wide[0], dlogits.sum(0)), strict=True):
        assert np.max(np.abs(np.asarray(got, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_numpy(name):
    """Compares the loss and all gradients for each option, in chunks that do not divide the rows."""
    check(*data(10, 6, 41), filled(OPTIONS[name], 10, 41), chunk_rows=4)


@pytest.mark.parametrize("rows, chunk_rows", [(1, 4), (8, 4), (8, 1), (7, None)])
def test_chunk_size_does_not_change_values(rows, chunk_rows):
    """One chunk or several, full or padded, give the same values."""
    check(*data(rows, 5, 11, seed=1), {}, chunk_rows)


@pytest.mark.parametrize("counted", [0, 1, 255, 256, 257, 1024, 2049, 2500])
def test_any_number_of_counted_rows_matches_numpy(counted):
    """Whole and quarter chunks process the counted rows, in any positions; ignored rows get zero gradients."""
    x, weight, bias, labels, cotangent = data(2500, 3, 5)
    order = np.random.default_rng(0).permutation(2500)
    labels = jnp.where(jnp.asarray(order) < counted, jnp.abs(labels) % 5, -100)
    check(x, weight, bias, labels, cotangent, {"reduction": "sum"}, chunk_rows=1300, tolerance=2e-5)
    check(x, weight, bias, labels, cotangent, {"reduction": "none", "z_loss": 0.1}, chunk_rows=1300, tolerance=2e-5)


def test_ignored_rows_are_not_processed():
    """If one row in ten counts, the loop processes a tenth of the rows, rounded up to quarter chunks."""
    static = linear.StaticArgs(linear.Options(), 2048, "xla")
    assert linear._chunk_sizes(static, 8192, 1536) == (2048, 512)
    assert linear._chunk_sizes(static, 700, 1536) == (700, 700)
    unlimited = static._replace(chunk_rows=None)
    assert [linear._chunk_sizes(unlimited, *case)[0] for case in ((8192, 1536), (32_768, 1536), (8192, 8192))] == [
        1376,
        5472,
        8192,
    ]
    chunk_sizes = []

    def process_chunk(sums, x, labels):
        jax.debug.callback(lambda: chunk_sizes.append(len(x)))
        return [], jnp.where(labels == 1, jnp.sum(x, axis=1), 0)

    x, labels = jnp.ones((8192, 2)), jnp.where(jnp.arange(8192) % 10 == 0, 1, -100)
    _, results = jax.jit(lambda x: linear._over_chunks(static, process_chunk, jnp.zeros((5, 2)), x, labels))(x)
    jax.effects_barrier()
    assert chunk_sizes == [512, 512]
    assert (results == jnp.where(labels == 1, 2, 0)).all()


def test_many_bfloat16_chunks_lose_no_precision():
    """Sixteen chunks lose no precision: the gradient of the weight accumulates in float32."""
    check(*data(64, 16, 50, jnp.bfloat16), {}, chunk_rows=4, tolerance=2e-2)
    x, weight, _, labels, _ = data(64, 16, 50, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(chunk):
        return jax.grad(lambda w: pk.linear_cross_entropy(x, w, labels, chunk_rows=chunk))(weight).astype(jnp.float32)

    assert jnp.max(jnp.abs(gradient(4) - gradient(64))) <= 2**-7 * jnp.max(jnp.abs(gradient(64)))


def test_mean_keeps_small_float16_gradients():
    """The 1/N of a mean does not push the gradient of the logits below the smallest float16."""
    rows = 2048
    x, weight = jnp.ones((rows, 2), jnp.float16), jnp.zeros((512, 2), jnp.float16)
    gradient = jax.jit(jax.grad(lambda w: pk.linear_cross_entropy(x, w, jnp.zeros(rows, int), chunk_rows=rows)))(weight)
    assert np.allclose(np.asarray(gradient[1:], np.float64), 1 / 512, rtol=2e-3)


def test_real_vocabulary_matches_numpy():
    """Covers V = 151936, which no block size divides."""
    check(*data(3, 4, 151_936), {"reduction": "sum"}, chunk_rows=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_is_zero_if_no_label_counts(reduction):
    """If all rows are ignored, or there are none, the loss and the gradients are 0."""

    def run(x, weight, labels):
        return jnp.sum(pk.linear_cross_entropy(x, weight, labels, reduction=reduction, chunk_rows=2))

    for rows in (0, 5):
        x, weight, _, _, _ = data(rows, 4, 7)
        loss, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(x, weight, jnp.full(rows, -100))
        assert loss == 0 and not gradients[0].any() and not gradients[1].any()


def test_metrics_equal_those_of_cross_entropy():
    """The metrics of a forward pass that is not differentiated equal those of cross_entropy on the logits."""
    x, weight, _, labels, _ = data(10, 6, 9)
    options = {"z_loss": 0.1, "return_metrics": True}
    got = jax.jit(lambda x: pk.linear_cross_entropy(x, weight, labels, chunk_rows=3, **options))(x)
    want = jax.jit(lambda x: pk.cross_entropy(x @ weight.T, labels, **options))(x)
    for name, value in want[1].items():
        assert float(got[1][name]) == pytest.approx(float(value), rel=1e-5), name


def test_label_out_of_range_gives_nan():
    """A label outside the vocabulary makes the loss NaN."""
    x, weight, _, _, _ = data(2, 4, 7)
    assert np.isnan(jax.jit(pk.linear_cross_entropy)(x, weight, jnp.array([1, 7])))


# ---- transformations, meshes, memory ----------------------------------------------------------------------------------


def value_and_gradients(labels=None, **options):
    def run(x, weight, labels=labels):
        loss = pk.linear_cross_entropy(x, weight, labels, chunk_rows=3, **options)
        return jnp.sum(loss * (1 + jnp.arange(loss.size).reshape(loss.shape)))

    return jax.value_and_grad(run, argnums=(0, 1))


def assert_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(np.asarray(g) - np.asarray(w))) <= 1e-5 * max(np.max(np.abs(np.asarray(w))), 1)


def test_vmap_scan_and_remat_change_no_value():
    """Problems under vmap, or in a scan with rematerialization, equal the problems computed separately."""
    x, weight, _, labels, _ = data(10, 6, 9)
    x, labels = x.reshape(2, 5, 6), labels.reshape(2, 5)
    one_by_one = [jax.jit(value_and_gradients())(x[i], weight, labels[i]) for i in range(2)]
    want = jax.tree.map(lambda *values: jnp.stack(values), *one_by_one)
    assert_close(jax.jit(jax.vmap(value_and_gradients(), in_axes=(0, None, 0)))(x, weight, labels), want)

    def looped(weight):
        step = jax.checkpoint(
            lambda total, xy: (total + pk.linear_cross_entropy(xy[0], weight, xy[1], chunk_rows=3), None)
        )
        return jax.lax.scan(step, 0.0, (x, labels))[0]

    assert_close(jax.jit(jax.grad(looped))(weight), want[1][1].sum(0))


def array_collectives(compiled):
    """Returns the collectives that move arrays rather than scalars."""
    collectives = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", compiled.as_text()
    )
    return sorted(op for results, op in collectives if re.search(r"\[\d", results))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_rows_gather_only_the_weight(kind, reduction):
    """Only the weight is gathered, and only if it is sharded; its gradient is summed over the mesh once."""
    x, weight, _, labels, _ = data(24, 6, 8)
    x, labels = x.reshape(4, 6, 6), labels.reshape(4, 6)
    run = value_and_gradients(reduction=reduction)
    want = jax.jit(run)(x, weight, labels)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        for spec in (P(), P("fsdp")):
            rows = NamedSharding(mesh, P(("data", "fsdp")))
            args = jax.device_put((x, weight, labels), (rows, NamedSharding(mesh, spec), rows))
            compiled = jax.jit(run).lower(*args).compile()
            assert_close(compiled(*args), want)
            assert array_collectives(compiled) == (["all-gather", "all-reduce"] if spec else ["all-reduce"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_vmap_on_a_mesh_gathers_no_activation(kind, gradient):
    """With sharded rows under vmap, no activation is gathered and the values equal those of one device."""
    x, weight, _, labels, _ = data(24, 6, 8)
    x, labels = x.reshape(3, 8, 6), labels.reshape(3, 8)
    one = (
        value_and_gradients(reduction="mean") if gradient else functools.partial(pk.linear_cross_entropy, chunk_rows=3)
    )
    run = jax.jit(jax.vmap(one, in_axes=(0, None, 0)))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    want = run(x, weight, labels)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(None, "data"))
        compiled = run.lower(*jax.device_put((x, weight, labels), (rows, NamedSharding(mesh, P()), rows))).compile()
        assert_close(compiled(*jax.device_put((x, weight, labels), (rows, NamedSharding(mesh, P()), rows))), want)
    assert "all-gather" not in array_collectives(compiled)


def test_loss_scale_keeps_small_float16_gradients():
    """Gradients that are below the smallest float16 without the loss scale survive, as the cotangent carries the scale."""
    x, weight, _, labels, _ = data(40, 6, 9, jnp.float16)
    scale, normalizer = 2.0**20, 2.0**24

    def scaled_loss(x, weight, scale):
        return scale * pk.linear_cross_entropy(x, weight, labels, normalizer=normalizer, chunk_rows=16).astype(
            jnp.float32
        )

    gradients = jax.jit(jax.grad(scaled_loss, argnums=(0, 1)))(x, weight, scale)
    exact = jax.jit(jax.grad(scaled_loss, argnums=(0, 1)))(x.astype(jnp.float32), weight.astype(jnp.float32), scale)
    for got, expected in zip(gradients, exact, strict=True):
        assert got.dtype == jnp.float16
        assert np.linalg.norm(got - expected) < 2e-3 * np.linalg.norm(expected)


def test_shard_map_sums_the_gradient_of_a_replicated_weight(implementation):
    """In a user's shard_map with the default check_vma, JAX sums the gradient of the replicated weight."""
    if implementation == "interpret":
        pytest.skip("Pallas's interpreter does not support shard_map with check_vma")
    x, weight, _, labels, _ = data(16, 6, 8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])
    loss = functools.partial(pk.linear_cross_entropy, reduction="sum", chunk_rows=2)

    def local(x, weight, labels):
        return jax.lax.psum(loss(x, weight, labels), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, weight, labels) for f in (mapped, loss))
    assert_close(got, want)


def test_memory_stays_far_below_that_of_the_logits():
    """Temporaries stay far below the size of the logits, N x V, with and without gradients."""
    rows, hidden, vocab = 2048, 8, 32_000
    x, weight, labels = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((rows, hidden), jnp.bfloat16), ((vocab, hidden), jnp.bfloat16), ((rows,), jnp.int32))
    )
    loss = functools.partial(pk.linear_cross_entropy, chunk_rows=64)
    for run in (loss, jax.grad(loss, argnums=(0, 1))):
        memory = jax.jit(run).lower(x, weight, labels).compile().memory_analysis().temp_size_in_bytes
        assert memory < rows * vocab * 2 / 4
