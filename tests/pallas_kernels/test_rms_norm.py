"""The kernels of rms_norm: numbers in Pallas's interpreter, every mesh and transformation, and lowering for GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _lowering, _tuning, shapes

kernel = functools.partial(pk.rms_norm, implementation="interpret")
xla = functools.partial(pk.rms_norm, implementation="xla")


def inputs(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    return x, jnp.asarray(1 + 0.3 * rng.normal(size=shape[-1:]), dtype), grad


def gradients(norm):
    def value_and_gradients(x, weight, grad):
        out, pullback = jax.vjp(norm, x, weight)
        return out, *pullback(grad)

    return value_and_gradients


def close(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 80), (2, 3, 100), (5, 1536)], ids=str)
def test_kernel_equals_xla(shape):
    """Any number of rows and any width: the last block of rows and of columns overhangs the array."""
    both = jax.jit(lambda *args: (gradients(kernel)(*args), gradients(xla)(*args)))
    close(*both(*inputs(*shape)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_casting(casting, dtype):
    """Each casting rounds where it says, step by step as numpy does, and the kernel agrees to one unit."""
    x, weight, _ = inputs(6, 48, dtype=dtype)
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)

    def rounded(value):
        return np.asarray(np.asarray(value, np.float32).astype(dtype), np.float64)

    mean_square = np.mean(rounded(x64 * x64) if casting == "none" else x64 * x64, axis=-1, keepdims=True)
    if casting == "none":
        normed = rounded(x64 * rounded(1 / np.sqrt(rounded(mean_square) + 1e-6)))
        want = rounded(normed * rounded(0.5 + w64))
    else:
        normed = x64 / np.sqrt(mean_square + 1e-6)
        want = rounded((rounded(normed) if casting == "llama" else normed) * (0.5 + w64))
    options = {"offset": 0.5, "casting": casting}
    got, of_kernel = jax.jit(lambda *args: (xla(*args, **options), kernel(*args, **options)))(x, weight)
    assert np.mean(np.asarray(got, np.float64) != want) < 0.02  # float32 sums on the other side of a rounding
    close(of_kernel, got, tolerance=2 * float(jnp.finfo(dtype).eps))


def test_programs_walk_over_several_blocks():
    """Backward with few programs: each walks over several blocks of several rows, the last ones past the end."""
    from importlib import import_module

    module = import_module("pallas_kernels.rms_norm")
    static = module._Static(1e-6, 0.0, "llama", "interpret")
    x, weight, grad = inputs(2, 21, 20)
    weight = jnp.stack([weight, -weight])
    _, inverse_rms = module._forward_xla(static, x, weight)
    blocks = _tuning.Blocks(rows=4, num_warps=4, programs=4)
    got = jax.jit(functools.partial(module.backward_kernel, static, interpret=True, blocks=blocks))
    want = jax.jit(functools.partial(module._backward_xla, static))
    close(got(x, grad, weight, inverse_rms), want(x, grad, weight, inverse_rms))


# ---- transformations and meshes --------------------------------------------------------------------------------------


def test_vmap():
    """A batch of problems becomes a longer grid, whether they share a weight or not."""
    x, weight, grad = inputs(3, 4, 5, 8)
    each = jnp.stack([weight, 2 * weight, -weight])
    for weights, axis in ((weight, None), (each, 0)):
        kernels, plain = (jax.vmap(gradients(norm), in_axes=(0, axis, 0)) for norm in (kernel, xla))
        close(*jax.jit(lambda *args, kernels=kernels, plain=plain: (kernels(*args), plain(*args)))(x, weights, grad))


def test_scan_and_remat():
    """A scan over rematerialised layers, the way a model uses it."""

    def stack(norm):
        def loss(x, weight):
            layer = jax.checkpoint(lambda x, w: (x + norm(x, w), None))
            return jnp.sum(jnp.sin(jax.lax.scan(layer, x, jnp.stack([weight, weight + 1]))[0]))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    x, weight, _ = inputs(6, 12)
    close(stack(kernel)(x, weight), stack(xla)(x, weight))


def collectives(compiled):
    return sorted(
        re.findall(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?=\()", compiled.as_text())
    )


@pytest.mark.parametrize("implementation", ["interpret", "xla", None])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_rows_sharded_over_two_axes(kind, implementation):
    """Batch and tokens sharded: nothing is gathered and the weight's gradient is added up once."""
    norm = functools.partial(pk.rms_norm, implementation=implementation)
    args = inputs(4, 6, 16)
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        rows, whole = NamedSharding(mesh, P("data", "sequence")), NamedSharding(mesh, P())
        placed = jax.device_put(args, (rows, whole, rows))
        compiled = jax.jit(gradients(norm)).lower(*placed).compile()
        got = compiled(*placed)
        assert collectives(compiled) == ["all-reduce"]
        assert got[1].sharding.is_equivalent_to(rows, 3)
        close(got, jax.jit(gradients(xla))(*args))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_operands_in_another_layout(kind):
    """A sharded weight is gathered, an x sharded by columns too; arrays on no mesh are taken as they are."""
    args = inputs(8, 16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    want = jax.jit(gradients(xla))(*args)
    with jax.set_mesh(mesh):
        for x_spec, weight_spec, grad_spec in ((P("data"), P("data"), P("data")), (P(None, "data"), P(), P())):
            placed = [NamedSharding(mesh, spec) for spec in (x_spec, weight_spec, grad_spec)]
            close(jax.jit(gradients(kernel))(*jax.device_put(args, tuple(placed))), want)
        close(jax.jit(gradients(kernel))(*args), want)


@pytest.mark.parametrize("axes", [{"data", "model"}, {"data"}], ids=["all manual", "one manual"])
def test_inside_a_shard_map(axes):
    """Inside a user's shard_map, with all of the mesh's axes or with some of them."""
    x, weight, grad = inputs(8, 16)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data"), "axis_names": axes, "check_vma": False}
    mapped = jax.shard_map(kernel, mesh=mesh, **specs)
    found, want = (jax.jit(gradients(norm))(x, weight, grad) for norm in (mapped, xla))
    close(found, want)


# ---- lowering for GPUs that are not there ----------------------------------------------------------------------------


def lowered_for_cuda(function, *args, device_kind="NVIDIA H200", mesh_shape=(1,), wrap=lambda function, mesh: function):
    """StableHLO of `function` for a kind of GPU, made without one; `args` are shapes and dtypes."""
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh(mesh_shape, ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    args = [jax.ShapeDtypeStruct(*arg) for arg in args]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(wrap(function, mesh)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "device_kind, size",
    [("NVIDIA A100-SXM4-80GB", "2b"), ("NVIDIA B200", "7b"), *(("NVIDIA H200", size) for size in shapes.TEXT)],
)
def test_lowers_at_real_shapes(size, device_kind):
    """Forward and backward become one Triton call each, and None chooses them."""
    width = shapes.TEXT[size].hidden
    x, weight = ((4, 2048, width), jnp.bfloat16), ((width,), jnp.bfloat16)
    text = lowered_for_cuda(gradients(pk.rms_norm), x, weight, x, device_kind=device_kind)
    assert text.count(_lowering.TRITON_CALL) == 2


@pytest.mark.parametrize("width", [1, 80, 100, 29_568])
def test_lowers_at_odd_widths(width):
    """Blocks stay powers of two whatever the width; float16 and float32 lower too."""
    dtype = jnp.float16 if width < 100 else jnp.float32
    x, weight = ((7, width), dtype), ((width,), dtype)
    assert lowered_for_cuda(gradients(pk.rms_norm), x, weight, x).count(_lowering.TRITON_CALL) == 2


def test_lowers_inside_a_checked_shard_map():
    """shard_map(check_vma=True), its default: kernels say over which mesh axes their results vary."""

    def wrap(function, mesh):
        return gradients(jax.shard_map(function, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))

    x, weight = ((64, 100), jnp.bfloat16), ((100,), jnp.bfloat16)
    text = lowered_for_cuda(pk.rms_norm, x, weight, x, mesh_shape=(4,), wrap=wrap)
    assert text.count(_lowering.TRITON_CALL) == 2


def test_cpu_program_has_no_kernel():
    """The same call lowered for a CPU is plain XLA; asking for the kernel by name there raises."""
    x, weight, _ = inputs(4, 8)
    assert _lowering.TRITON_CALL not in jax.jit(pk.rms_norm).lower(x, weight).as_text()
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(functools.partial(pk.rms_norm, implementation="triton")).lower(x, weight)


# ---- block sizes ------------------------------------------------------------------------------------------------------


def test_measured_blocks_are_preferred(monkeypatch):
    """The nearest measured number of rows at this width wins; another width falls back on the rule."""

    def entry(rows, block):
        return {"op": "op", "width": 64, "rows": rows, "us": 1.0, "blocks": {"rows": block, "num_warps": 2}}

    monkeypatch.setattr(_tuning, "_tuned", lambda kind: [entry(512, 1), entry(8192, 3)])
    assert _tuning.blocks("op", rows=7000, width=64).rows == 3
    assert _tuning.blocks("op", rows=0, width=64).rows == 1
    assert _tuning.blocks("op", rows=512, width=128) == _tuning.rule("op", width=128)


def test_shipped_block_sizes_are_readable():
    """Every file in tuned/ holds entries that make Blocks, powers of two where Triton wants them."""
    import json

    for file in _tuning.TUNED.glob("*.json"):
        for entry in json.loads(file.read_text()):
            blocks = _tuning.Blocks(**entry["blocks"])
            assert all(n & (n - 1) == 0 for n in (blocks.rows, blocks.num_warps))
