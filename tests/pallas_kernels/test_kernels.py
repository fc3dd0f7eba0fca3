"""The kernels of all operations: numbers in Pallas's interpreter, every mesh and transformation, and lowering for GPUs."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _cross_entropy_kernel, _cross_entropy_math, _pallas, _rows, _tuning, tune
from tests._support.lowered import triton_calls
from tests._support.ops import OPS, REAL, SECTIONS, close, random_like


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rows, width", [((0,), 8), ((1,), 8), ((7,), 80), ((2, 3), 100), ((5,), 1536)], ids=str)
def test_kernel_equals_xla(name, rows, width):
    """Values and gradients, for any number of rows and any width: the last blocks overhang the array."""
    op = OPS[name]
    if op.rows_axes == 2:
        rows, width = (2, *rows)[:2], width if width in SECTIONS or name == "rope" else 128
    args = op.make(rows, width)
    kernel, xla = jax.jit(lambda *args: (op.both("interpret")(*args), op.both("xla")(*args)))(*args)
    close(kernel, xla)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["add_rms_norm", "layer_norm", "swiglu", "quick_gelu", "mrope", "cross_entropy"])
def test_low_precision(name, dtype):
    """Kernel and XLA round the same float32 numbers: they differ by one unit at most, in few places."""
    op = OPS[name]
    args = op.make((2, 3), 32, dtype)
    kernel, xla = jax.jit(lambda *args: (op.both("interpret")(*args), op.both("xla")(*args)))(*args)
    close(kernel, xla, tolerance=float(jnp.finfo(dtype).eps))


def test_programs_walk_over_several_blocks():
    """Few programs: each walks over several blocks of several rows, the last ones past the end, in every group."""
    from importlib import import_module

    norm = import_module("pallas_kernels.layer_norm")
    static = norm.StaticArgs(1e-6, "interpret")
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=(2, 21, 20)), jnp.float32) for _ in range(2))
    weight, bias = (jnp.asarray(rng.normal(size=(2, 20)), jnp.float32) for _ in range(2))
    blocks = _tuning.Blocks(rows=4, num_warps=4, programs=4)
    kernel = {"interpret": True, "blocks": blocks}
    out, mean, inverse = norm._forward_xla(static, x, weight, bias)
    close(jax.jit(functools.partial(norm.forward_kernel, static, **kernel))(x, weight, bias), (out, mean, inverse))
    backward = jax.jit(functools.partial(norm.backward_kernel, static, **kernel))
    close(backward(x, grad, weight, mean, inverse), norm._backward_xla(static, x, grad, weight, mean, inverse))


@pytest.mark.parametrize("rows, programs, blocks", [(0, 4, 1), (1, 4, 2), (21, 4, 4), (5, 0, 2)])
def test_every_row_has_one_program(rows, programs, blocks):
    """Programs and their steps cover all blocks of rows, and hardly more."""
    blocks = _tuning.Blocks(rows=blocks, num_warps=4, programs=programs)
    partition = _rows.RowPartition.of(1, max(rows, 1), 8, blocks)
    covered = partition.programs * partition.steps * partition.block_rows
    assert rows <= covered < max(rows, 1) + (partition.programs + 1) * partition.block_rows


@pytest.mark.parametrize("label", [0, 15, 16, 47, 99])
def test_first_largest_logit_across_tiles(label):
    """The prediction is the first of equal logits, wherever the tiles of a row begin; the row is cut into seven."""
    blocks = _tuning.Blocks(rows=2, num_warps=4, programs=2, columns=8)
    logits = jnp.zeros((4, 100)).at[:, label].set(3.0).at[1, max(label - 1, 0)].set(3.0).at[2, 99].set(3.0)
    logits = logits.at[3, 50].set(4.0)
    labels, options = jnp.full(4, label), _cross_entropy_math.Options()
    launch = functools.partial(_cross_entropy_kernel._launch, options, interpret=True, blocks=blocks)
    found, gradient = jax.jit(lambda x: launch(x, labels, None, None, jnp.ones(4)))(logits)
    want = _cross_entropy_math.statistics_xla(options, logits, labels, None)
    close(found, want)
    close(gradient, _cross_entropy_math.gradient_xla(options, logits, labels, None, want.lse, jnp.ones(4)))


def test_exact_gelu_keeps_float32():
    """The kernel's own error function: gelu and its slope to two units of float32, far into both tails."""
    x = jnp.linspace(-8, 8, 1001, dtype=jnp.float32)[None]
    gelu = functools.partial(pk.geglu, approximate=False)
    got = jax.jit(jax.value_and_grad(lambda x: jnp.sum(gelu(x, jnp.ones_like(x), implementation="interpret"))))(x)
    want = jax.jit(jax.value_and_grad(lambda x: jnp.sum(gelu(x, jnp.ones_like(x), implementation="xla"))))(x)
    np.testing.assert_allclose(got[1], want[1], atol=5e-7)


# ---- transformations and meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "mrope", "cross_entropy"])
def test_vmap(name):
    """A batch of problems, whether they share the last argument or not."""
    op = OPS[name]
    rows, width = ((2, 3), 32) if op.rows_axes == 2 else ((5,), 12)
    each = [op.make(rows, width, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(arrays) for arrays in zip(*each, strict=True)]
    for last in (0, None):
        args = [*stacked[:-1], stacked[-1] if last == 0 else stacked[-1][0]]
        axes = (*(0 for _ in args[:-1]), last)
        kernel, xla = (jax.vmap(op.both(how), in_axes=axes) for how in ("interpret", "xla"))
        close(*jax.jit(lambda *args, kernel=kernel, xla=xla: (kernel(*args), xla(*args)))(*args))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "quick_gelu"])
def test_scan_and_remat(name):
    """A scan over rematerialised layers, the way a model uses it."""
    op = OPS[name]
    x, *vectors = op.make((6,), 12)

    def loss(implementation, x, *vectors):
        def layer(x, vectors):
            return x + op.run(x, *vectors, implementation=implementation), None

        layers = [jnp.stack([vector, vector + 1]) for vector in vectors]
        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, layers, length=2)[0]))

    kernel, xla = (
        jax.grad(functools.partial(loss, how), argnums=range(1 + len(vectors))) for how in ("interpret", "xla")
    )
    close(*jax.jit(lambda *args: (kernel(*args), xla(*args)))(x, *vectors))


def collectives(compiled):
    return sorted(
        re.findall(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?=\()", compiled.as_text())
    )


def row_spec(argument):
    """Batch and tokens over the two mesh axes, in an argument with that letter; see ops.Op."""
    return {"w": P(), "t": P(None, "data", "sequence")}.get(argument, P("data", "sequence"))


@functools.cache
def on_one_device(name):
    """-> arguments, and what XLA's own makes of them."""
    args = OPS[name].make((4, 6), 32)
    return args, jax.jit(OPS[name].both("xla"))(*args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("implementation", ["interpret", None])
def test_rows_sharded_over_two_axes(name, kind, implementation):
    """Batch and tokens sharded: nothing is gathered, and what is a sum over rows is added up once."""
    op = OPS[name]
    args, want = on_one_device(name)
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, row_spec(letter)) for letter in op.arguments]
        placed = [jax.device_put(x, sharding) for x, sharding in zip(args, shardings, strict=True)]
        cotangents = random_like(jax.eval_shape(op.run, *args))
        where = jax.tree.map(lambda x: NamedSharding(mesh, P("data", "sequence") if x.ndim else P()), cotangents)
        cotangents = jax.device_put(cotangents, where)

        def both(cotangents, *arguments):
            first, rest = arguments[: op.differentiable], arguments[op.differentiable :]
            run = functools.partial(op.run, implementation=implementation)
            out, pullback = jax.vjp(lambda *first: run(*first, *rest), *first)
            return jax.tree.leaves((out, pullback(cotangents)))

        compiled = jax.jit(both).lower(cotangents, *placed).compile()
        got = compiled(cotangents, *placed)
        assert set(collectives(compiled)) <= {"all-reduce"}
        close(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_heads_and_columns_stay_sharded(kind):
    """Tensor parallel: a gate sharded by columns and a rotation sharded by heads gather nothing."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(kind,), devices=jax.devices("cpu")[:2])
    specs = {"swiglu": [P(None, None, "tensor")] * 2, "rope": [P(None, None, "tensor")] * 2 + [P()] * 2}
    for name, spec in specs.items():
        op = OPS[name]
        args = op.make((2, 4), 32)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, spec, strict=True)]
            run = jax.jit(functools.partial(op.run, implementation="interpret")).lower(*placed).compile()
            assert not collectives(run)
            close(run(*placed), jax.jit(op.run)(*args))


# ---- lowering for GPUs that are not there ----------------------------------------------------------------------------


def abstract(op, rows, width, dtype):
    """The arguments' shapes, without making them."""
    small = jax.eval_shape(lambda: op.make((1,) * len(rows), width, dtype))
    axes = {"t": 1}

    def grown(letter, x):
        if letter == "w":
            return x
        start = axes.get(letter, 0)
        return jax.ShapeDtypeStruct((*x.shape[:start], *rows, *x.shape[start + len(rows) :]), x.dtype)

    return [grown(letter, x) for letter, x in zip(op.arguments, small, strict=True)]


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
@pytest.mark.parametrize("name, rows, width", REAL, ids=str)
def test_lowers_at_real_shapes(name, rows, width, device_kind):
    """Forward and backward become a Triton call each at the models' shapes."""
    op = OPS[name]
    args = abstract(op, rows, width, "bfloat16")
    first, rest = args[: op.differentiable], args[op.differentiable :]
    run = functools.partial(op.run, implementation="triton")

    def both(first, rest):
        out, pullback = jax.vjp(lambda *first: run(*first, *rest), *first)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    assert triton_calls(both, first, rest, device_kind=device_kind) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", OPS)
def test_lowers_at_odd_widths(name, dtype):
    """Blocks stay powers of two whatever the width."""
    op = OPS[name]
    rows = (1, 7)[-op.rows_axes :]
    for width in (128,) if name == "mrope" else (2, 80, 100):
        assert triton_calls(functools.partial(op.run, implementation="triton"), *op.make(rows, width, dtype)) == 1


def test_none_takes_the_kernels_of_norms_and_losses_on_a_gpu():
    """And XLA's gates and rotations, which fuse with their neighbours: measured in the model, see activations.py and rope.py."""
    for name, kernels in {"rms_norm": 1, "layer_norm": 1, "cross_entropy": 1, "swiglu": 0, "mrope": 0}.items():
        op = OPS[name]
        assert triton_calls(op.run, *op.make((2, 4), 128, "bfloat16")) == kernels


@pytest.mark.parametrize("name", OPS)
def test_cpu_program_has_no_kernel(name):
    """The same call lowered for a CPU is plain XLA; asking for the kernel by name there raises."""
    op = OPS[name]
    args = op.make((2, 4), 32)
    assert _pallas.TRITON_CALL not in jax.jit(op.run).lower(*args).as_text()
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(functools.partial(op.run, implementation="triton")).lower(*args)


# ---- block sizes ------------------------------------------------------------------------------------------------------


def test_measured_blocks_are_preferred(monkeypatch):
    """The nearest measured number of rows at this width wins; another width falls back on the rule."""

    def entry(rows, block):
        return {"op": "norm", "width": 64, "rows": rows, "us": 1.0, "blocks": {"rows": block, "num_warps": 2}}

    monkeypatch.setattr(_tuning, "_tuned", lambda kind: [entry(512, 1), entry(8192, 3)])
    assert _tuning.blocks("norm", rows=7000, width=64).rows == 3
    assert _tuning.blocks("norm", rows=0, width=64).rows == 1
    assert _tuning.blocks("norm", rows=512, width=128) == _tuning.rule("norm", width=128)


@pytest.mark.parametrize("op", tune.KERNELS)
def test_candidates_are_powers_of_two_and_begin_with_the_rule(op):
    """At every width that is tuned for, so that the tuner can compare with the rule."""
    for width in {width for _, width in tune.KERNELS[op].shapes}:
        rule, *others = _tuning.candidates(op, width=width)
        assert rule == _tuning.rule(op, width=width) and rule not in others and others
        for blocks in (rule, *others):
            assert all(n & (n - 1) == 0 for n in (blocks.rows, blocks.num_warps, blocks.columns))


def test_shipped_block_sizes_are_readable():
    """Every file in tuned/ holds entries that make Blocks, for kernels that there are."""
    for file in _tuning.TUNED.glob("*.json"):
        for entry in json.loads(file.read_text()):
            assert entry["op"] in tune.KERNELS
            _tuning.Blocks(**entry["blocks"])


def test_without_the_triton_backend(monkeypatch):
    """Where JAX has dropped it, None is XLA's and a kernel asked for by name says why it cannot run."""
    monkeypatch.setattr(_pallas, "plgpu", None)
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    text = jax.jit(pk.rms_norm).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert _pallas.TRITON_CALL not in text
    with pytest.raises(NotImplementedError, match="has no Triton backend"):
        pk.rms_norm(x, weight, implementation="triton")
