"""The kernels of all operations: values in Pallas's interpreter, meshes, transformations, and lowering for GPUs."""

import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _cross_entropy_kernel, _cross_entropy_math, _pallas, _rows, _tuning
from pallas_kernels.registry import KERNELS, SECTIONS
from tests._support.lowered import triton_calls
from tests._support.ops import OPS, REAL, close, random_like


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rows, width", [((0,), 8), ((1,), 8), ((7,), 80), ((2, 3), 100), ((5,), 1536)], ids=str)
def test_kernel_equals_xla(name, rows, width):
    """Values and gradients are equal for any number of rows and any width; the last blocks reach past the end."""
    op = OPS[name]
    if op.row_count == 2:
        rows, width = (2, *rows)[:2], width if width in SECTIONS or name != "mrope" else 128
    args = op.make(rows, width)
    kernel, xla = jax.jit(
        lambda *args: (op.value_and_gradients("interpret")(*args), op.value_and_gradients("xla")(*args))
    )(*args)
    close(kernel, xla)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["add_rms_norm", "layer_norm", "swiglu", "quick_gelu", "mrope", "qk_norm_rope", "cross_entropy"]
)
def test_kernel_rounds_as_xla_in_low_precision(name, dtype):
    """Kernel and XLA round the same float32 values: they differ by at most one ulp."""
    op = OPS[name]
    args = op.make((2, 3), 32, dtype)
    kernel, xla = jax.jit(
        lambda *args: (op.value_and_gradients("interpret")(*args), op.value_and_gradients("xla")(*args))
    )(*args)
    close(kernel, xla, tolerance=float(jnp.finfo(dtype).eps))


def test_program_takes_several_row_blocks():
    """With few programs, each takes several blocks of several rows per group; the last ones reach past the end."""
    norm = importlib.import_module("pallas_kernels.layer_norm")
    static = norm.StaticArgs(1e-6, "interpret")
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.normal(size=(2, 21, 20)), jnp.float32) for _ in range(2))
    weight, bias = (jnp.asarray(rng.normal(size=(2, 20)), jnp.float32) for _ in range(2))
    blocks = _tuning.Blocks(rows=4, num_warps=4, programs=4)
    kernel = {"interpret": True, "blocks": blocks}
    out, mean, inverse_std = norm._forward_xla(static, x, weight, bias)
    close(jax.jit(functools.partial(norm.forward_kernel, static, **kernel))(x, weight, bias), (out, mean, inverse_std))
    backward = jax.jit(functools.partial(norm.backward_kernel, static, **kernel))
    close(
        backward(x, d_out, weight, mean, inverse_std), norm._backward_xla(static, x, d_out, weight, mean, inverse_std)
    )


@pytest.mark.parametrize("rows, programs, blocks", [(0, 4, 1), (1, 4, 2), (21, 4, 4), (5, 0, 2)])
def test_partition_covers_every_row(rows, programs, blocks):
    """The blocks of all programs cover all rows, with at most one extra block per program and one partial block."""
    blocks = _tuning.Blocks(rows=blocks, num_warps=4, programs=programs)
    partition = _rows.RowPartition.of(1, max(rows, 1), 8, blocks)
    covered = partition.programs * partition.steps * partition.block_rows
    assert rows <= covered < max(rows, 1) + (partition.programs + 1) * partition.block_rows


@pytest.mark.parametrize("label", [0, 15, 16, 47, 99])
def test_prediction_is_first_of_equal_logits(label):
    """The prediction is the first of equal logits, wherever the tiles of a row begin; each row has seven tiles."""
    blocks = _tuning.Blocks(rows=2, num_warps=4, programs=2, columns=8)
    logits = jnp.zeros((4, 100)).at[:, label].set(3.0).at[1, max(label - 1, 0)].set(3.0).at[2, 99].set(3.0)
    logits = logits.at[3, 50].set(4.0)
    labels, options = jnp.full(4, label), _cross_entropy_math.Options()
    kernel = functools.partial(_cross_entropy_kernel.stats_and_gradient_kernel, options, interpret=True, blocks=blocks)
    stats, gradient = jax.jit(lambda x: kernel(x, labels, None, jnp.ones(4)))(logits)
    want = _cross_entropy_math.row_stats_xla(options, logits, labels, None)
    close(stats, want)
    close(gradient, _cross_entropy_math.gradient_xla(options, logits, labels, None, want.lse, jnp.ones(4)))


def test_exact_gelu_has_float32_precision():
    """With the kernel's own error function, gelu and its derivative are within two float32 ulps, far into both tails."""
    x = jnp.linspace(-8, 8, 1001, dtype=jnp.float32)[None]
    gelu = functools.partial(pk.geglu, approximate=False)
    got = jax.jit(jax.value_and_grad(lambda x: jnp.sum(gelu(x, jnp.ones_like(x), implementation="interpret"))))(x)
    want = jax.jit(jax.value_and_grad(lambda x: jnp.sum(gelu(x, jnp.ones_like(x), implementation="xla"))))(x)
    np.testing.assert_allclose(got[1], want[1], atol=5e-7)


# ---- transformations and meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "mrope", "qk_norm_rope", "cross_entropy"]
)
def test_vmap_equals_xla(name):
    """The kernels under vmap equal XLA, whether or not the problems share the last argument."""
    op = OPS[name]
    rows, width = ((2, 3), 32) if op.row_count == 2 else ((5,), 12)
    each = [op.make(rows, width, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(arrays) for arrays in zip(*each, strict=True)]
    for last in (0, None):
        args = [*stacked[:-1], stacked[-1] if last == 0 else stacked[-1][0]]
        axes = (*(0 for _ in args[:-1]), last)
        kernel, xla = (jax.vmap(op.value_and_gradients(name), in_axes=axes) for name in ("interpret", "xla"))
        close(*jax.jit(lambda *args, kernel=kernel, xla=xla: (kernel(*args), xla(*args)))(*args))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "cross_entropy"])
def test_vmap_over_no_problems_is_empty(name):
    """Regression: a ZeroDivisionError, from the grid of the kernel or from the number of rows of a problem."""
    op = OPS[name]
    args = [jnp.zeros((0, *x.shape), x.dtype) for x in op.make((2, 3), 8)]
    for implementation in (None, "interpret"):
        results = jax.vmap(functools.partial(op.run, implementation=implementation))(*args)
        want = jax.eval_shape(op.run, *op.make((2, 3), 8))
        assert jax.tree.map(lambda x: x.shape, results) == jax.tree.map(lambda x: (0, *x.shape), want)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "quick_gelu"])
def test_gradients_through_scan_and_remat_equal_xla(name):
    """The gradients of a scan over rematerialized layers, as in a model, equal those of XLA."""
    op = OPS[name]
    x, *vectors = op.make((6,), 12)

    def loss(implementation, x, *vectors):
        def layer(x, vectors):
            return x + op.run(x, *vectors, implementation=implementation), None

        layers = [jnp.stack([vector, vector + 1]) for vector in vectors]
        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, layers, length=2)[0]))

    kernel, xla = (
        jax.grad(functools.partial(loss, name), argnums=range(1 + len(vectors))) for name in ("interpret", "xla")
    )
    close(*jax.jit(lambda *args: (kernel(*args), xla(*args)))(x, *vectors))


def collectives(compiled):
    return sorted(
        re.findall(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?=\()", compiled.as_text())
    )


def row_spec(axes):
    """Returns the spec that shards batch and tokens over the two mesh axes, for an argument with these axes."""
    mesh_axes = {"...": ("data", "sequence"), "B": ("data",), "T": ("sequence",)}
    return P(*(entry for axis in axes for entry in mesh_axes.get(axis, (None,))))


@functools.cache
def on_one_device(name):
    """Returns arguments, and the results of XLA."""
    args = OPS[name].make((4, 6), 32)
    return args, jax.jit(OPS[name].value_and_gradients("xla"))(*args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("implementation", ["interpret", None])
def test_sharded_rows_stay_sharded(name, kind, implementation):
    """With batch and tokens sharded, nothing is gathered, and the only collectives are the sums over rows."""
    op = OPS[name]
    args, want = on_one_device(name)
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, row_spec(axes)) for axes in op.axes]
        placed = [jax.device_put(x, sharding) for x, sharding in zip(args, shardings, strict=True)]
        cotangents = random_like(jax.eval_shape(op.run, *args))
        specs = jax.tree.map(lambda x: NamedSharding(mesh, P("data", "sequence") if x.ndim else P()), cotangents)
        cotangents = jax.device_put(cotangents, specs)

        def value_and_gradients(cotangents, *arguments):
            differentiable, constants = arguments[: op.differentiable], arguments[op.differentiable :]
            run = functools.partial(op.run, implementation=implementation)
            out, pullback = jax.vjp(lambda *args: run(*args, *constants), *differentiable)
            return jax.tree.leaves((out, pullback(cotangents)))

        compiled = jax.jit(value_and_gradients).lower(cotangents, *placed).compile()
        got = compiled(cotangents, *placed)
        assert set(collectives(compiled)) <= {"all-reduce"}
        close(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_heads_and_columns_stay_sharded(kind):
    """With tensor parallelism, an activation sharded by columns and a rotation sharded by heads gather nothing."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(kind,), devices=jax.devices("cpu")[:2])
    specs = {
        "swiglu": [P(None, None, "tensor")] * 2,
        "rope": [P(None, None, "tensor")] * 2 + [P()] * 2,
        "qk_norm_rope": [P(None, None, "tensor")] * 2 + [P()] * 4,
    }
    for name, spec in specs.items():
        op = OPS[name]
        args = op.make((2, 3), 32)  # the devices need not divide the rows
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, spec, strict=True)]
            run = jax.jit(functools.partial(op.run, implementation="interpret")).lower(*placed).compile()
            assert not collectives(run)
            close(run(*placed), jax.jit(op.run)(*args))


@pytest.mark.parametrize("problems, rows", [(None, "data"), ("problems", None), ("problems", "data")])
@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "rope", "mrope", "qk_norm_rope", "cross_entropy"]
)
def test_vmap_on_explicit_axes(name, problems, rows):
    """Over sharded problems or sharded rows, which share the last argument or not.

    Regression: it raised for RoPE, which puts the problems into the axis of the batch, if that was sharded. If the problems
    were, it raised wherever they shared an argument.
    """
    op = OPS[name]
    each = [op.make((2, 3), 32, seed=seed) for seed in range(2)]
    stacked = [jnp.stack(arrays) for arrays in zip(*each, strict=True)]
    mesh = jax.make_mesh(
        (2, 2), ("problems", "data"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:4]
    )

    def total(*args):
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(op.run(*args, implementation="xla")))

    value_and_gradients = jax.value_and_grad(total, argnums=tuple(range(op.differentiable)))
    specs = [P(*(rows if entry == "data" else None for entry in row_spec(axes))) for axes in op.axes]
    for last in (0, None):
        args = [*stacked[:-1], stacked[-1] if last == 0 else stacked[-1][0]]
        run = jax.vmap(value_and_gradients, in_axes=(*(0 for _ in args[:-1]), last))
        placed_as = [*(P(problems, *spec) for spec in specs[:-1]), P(problems, *specs[-1]) if last == 0 else specs[-1]]
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, placed_as, strict=True)]
            got = jax.jit(run)(*placed)
        _, grads = got
        expected = [P(problems, *spec) for spec in specs[: len(grads)]]  # a gradient for each problem
        assert [jax.typeof(grad).sharding.spec for grad in grads] == expected
        close(got, run(*args))


@pytest.mark.parametrize("name", ["rms_norm", "linear_cross_entropy"])
def test_rows_that_the_mesh_does_not_divide(name):
    """Regression: 7 of 8 tokens, as in a loss of the next token, on 4 devices. The partitioner pads such rows with garbage,
    which the gradient of the weight included.
    """
    rng = np.random.default_rng(0)
    x, vector, matrix = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 8, 16), (16,), (24, 16)))
    labels = jnp.asarray(rng.integers(0, 24, (2, 7)))
    functions = {
        "rms_norm": (lambda x, weight: jnp.sum(jnp.sin(pk.rms_norm(x[:, :-1], weight))), vector),
        "linear_cross_entropy": (lambda x, weight: pk.linear_cross_entropy(x[:, :-1], weight, labels), matrix),
    }
    function, weight = functions[name]
    run = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    want = run(x, weight)
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])
    placed = (
        jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in ((x, P(None, "sequence")), (weight, P()))
    )
    close(run(*placed), want)


# ---- lowering for GPUs that this machine does not have ---------------------------------------------------------------


def abstract_arguments(op, rows, width, dtype):
    """Returns the shapes and dtypes of the arguments, without allocating them."""
    sizes = op.operation.sizes(rows, width)
    return [
        jax.ShapeDtypeStruct(argument.shape(sizes), jnp.int32 if argument.kind == "labels" else dtype)
        for argument in op.operation.arguments.values()
    ]


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
@pytest.mark.parametrize("name, rows, width", REAL, ids=str)
def test_each_pass_lowers_to_one_kernel_at_real_shapes(name, rows, width, device_kind):
    """The forward and the backward pass become one Triton call each."""
    op = OPS[name]
    args = abstract_arguments(op, rows, width, "bfloat16")
    differentiable, constants = args[: op.differentiable], args[op.differentiable :]
    run = functools.partial(op.run, implementation="triton")

    def value_and_gradients(differentiable, constants):
        out, pullback = jax.vjp(lambda *args: run(*args, *constants), *differentiable)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    assert triton_calls(value_and_gradients, differentiable, constants, device_kind=device_kind) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", OPS)
def test_kernels_lower_at_odd_widths(name, dtype):
    """Blocks are powers of two for every width, as Triton requires."""
    op = OPS[name]
    rows = (1, 7)[-op.row_count :]
    for width in (128,) if name == "mrope" else (2, 80, 100):
        assert triton_calls(functools.partial(op.run, implementation="triton"), *op.make(rows, width, dtype)) == 1


def test_default_on_gpu_is_kernel_for_norms_and_losses_only():
    """Activations and RoPE default to XLA, which fuses them with their neighbours; see the measurements in their files."""
    for name, kernels in {"rms_norm": 1, "qk_norm_rope": 1, "cross_entropy": 1, "swiglu": 0, "mrope": 0}.items():
        op = OPS[name]
        assert triton_calls(op.run, *op.make((2, 4), 128, "bfloat16")) == kernels


@pytest.mark.parametrize("name", OPS)
def test_cpu_program_has_no_kernel(name):
    """Lowered for a CPU, the same call is plain XLA; requesting the kernel by name raises."""
    op = OPS[name]
    args = op.make((2, 4), 32)
    assert _pallas.TRITON_CALL not in jax.jit(op.run).lower(*args).as_text()
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(functools.partial(op.run, implementation="triton")).lower(*args)


# ---- block sizes -----------------------------------------------------------------------------------------------------


def test_measured_blocks_are_preferred(monkeypatch):
    """The nearest measured number of rows at this width is used; other widths use the rule."""

    def entry(rows, block):
        return {"op": "norm", "width": 64, "rows": rows, "us": 1.0, "blocks": {"rows": block, "num_warps": 2}}

    monkeypatch.setattr(_tuning, "_tuned", lambda kind: [entry(512, 1), entry(8192, 3)])
    assert _tuning.blocks("norm", rows=7000, width=64).rows == 3
    assert _tuning.blocks("norm", rows=0, width=64).rows == 1
    assert _tuning.blocks("norm", rows=512, width=128) == _tuning.rule("norm", width=128)


@pytest.mark.parametrize("op", KERNELS)
def test_tuning_candidates_are_powers_of_two_and_start_with_the_rule(op):
    """At every tuned width, the first candidate is the rule's, so that the tuner can compare with it."""
    for width in {width for _, width in KERNELS[op].shapes}:
        rule, *candidates = _tuning.candidates(op, width=width)
        assert rule == _tuning.rule(op, width=width) and rule not in candidates and candidates
        for blocks in (rule, *candidates):
            assert all(n & (n - 1) == 0 for n in (blocks.rows, blocks.num_warps, blocks.columns))


def test_shipped_block_sizes_are_readable():
    """Every entry of the files in tuned/ is a valid Blocks, for an existing kernel."""
    for file in _tuning.TUNED.glob("*.json"):
        for entry in json.loads(file.read_text()):
            assert entry["op"] in KERNELS
            _tuning.Blocks(**entry["blocks"])


def test_jax_without_triton_backend_uses_xla(monkeypatch):
    """If JAX has dropped the backend, the default is XLA and a kernel requested by name raises with the reason."""
    monkeypatch.setattr(_pallas, "plgpu", None)
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    text = jax.jit(pk.rms_norm).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert _pallas.TRITON_CALL not in text
    with pytest.raises(NotImplementedError, match="has no Triton backend"):
        pk.rms_norm(x, weight, implementation="triton")
