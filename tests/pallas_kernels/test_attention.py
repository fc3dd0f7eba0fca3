"""attention against softmax over full scores: masks, segments, blocks, meshes, and what reaches cuDNN."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from tests._support.lowered import triton_calls

module = importlib.import_module("pallas_kernels.attention")

SEGMENTS = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [1] * 9, [0] * 9, [1, 1, 2, 3, 3, 3, 0, 0, 0]])


def data(batch=4, tokens=9, sources=9, heads=4, key_heads=2, dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = ((tokens, heads), (sources, key_heads), (sources, key_heads), (tokens, heads))
    return [jnp.asarray(rng.normal(size=(batch, *size, dim)), dtype) for size in sizes]  # q, k, v, cotangent


def reference(q, k, v, grad, segment_ids=None, kv_segment_ids=None, *, causal=False):
    """All scores at once in float64 numpy -> out, dq, dk, dv."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    (batch, tokens, _, dim), sources, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    many_k, many_v = (np.repeat(x, group, axis=2) for x in (k, v))
    mask = np.ones((batch, tokens, sources), bool)
    if causal:
        mask &= np.tri(tokens, sources, sources - tokens, dtype=bool)
    if segment_ids is not None:
        queries, keys = (
            np.asarray(x) for x in (segment_ids, segment_ids if kv_segment_ids is None else kv_segment_ids)
        )
        mask &= (queries[:, :, None] == keys[:, None]) & (queries != 0)[:, :, None]
    scores = np.einsum("btnd,bsnd->bnts", q, many_k) * dim**-0.5
    p = np.exp(np.where(mask[:, None], scores, -np.inf) - scores.max(axis=-1, keepdims=True))
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnd->btnd", p, many_v)
    dp = np.einsum("btnd,bsnd->bnts", grad, many_v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * dim**-0.5
    dk, dv = np.einsum("bnts,btnd->bsnd", ds, q), np.einsum("bnts,btnd->bsnd", p, grad)
    dk, dv = (x.reshape(batch, sources, -1, group, dim).sum(axis=3) for x in (dk, dv))
    return out, np.einsum("bnts,bsnd->btnd", ds, many_k), dk, dv


def gradients(run, **options):
    """-> out, dq, dk, dv of run(q, k, v), for q, k, v, a cotangent and segment ids."""

    def value_and_gradients(q, k, v, grad, *ids):
        named = dict(zip(("segment_ids", "kv_segment_ids"), ids, strict=False))
        out, pullback = jax.vjp(functools.partial(run, **named, **options), q, k, v)
        return out, *pullback(grad)

    return jax.jit(value_and_gradients)


def close(got, want, tolerance=2e-6):
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)


@pytest.mark.parametrize(
    "causal, segmented, one_block",
    [
        (False, False, True),
        (True, False, True),
        (False, True, True),
        (True, True, True),
        (False, False, False),
        (True, True, False),
    ],
)
def test_values_and_gradients(causal, segmented, one_block, monkeypatch):
    """Masks and grouped heads, with all queries at once and in blocks of 16, the last one padded."""
    tokens = 9 if one_block else 36
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**28 if one_block else 1)
    args = data(tokens=tokens, sources=tokens)
    ids = [np.repeat(SEGMENTS, tokens // 9, axis=1)] if segmented else []
    close(gradients(pk.attention, causal=causal)(*args, *ids), reference(*args, *ids, causal=causal))


def test_more_keys_than_queries():
    """causal aligns the last query with the last key; key segments of their own."""
    args = data(tokens=4, sources=9)
    close(gradients(pk.attention, causal=True)(*args), reference(*args, causal=True))
    ids = SEGMENTS[:, 5:], SEGMENTS
    close(gradients(pk.attention)(*args, *ids), reference(*args, *ids))


def test_garbage_in_padding():
    """Whatever finite numbers padding holds: its outputs and gradients are zero and nobody else's change."""
    clean = data()
    padding = (SEGMENTS == 0)[:, :, None, None]
    dirty = [jnp.asarray(np.where(padding, 1e38, x)) for x in clean]
    got = gradients(pk.attention)(*dirty, SEGMENTS)
    close(got, reference(*clean, SEGMENTS))
    assert not any(np.where(padding, x, 0).any() for x in got)


def test_bfloat16():
    """At most 1.5 times as far from float64 as JAX's own attention over full scores in the same dtype."""
    args = data(tokens=33, sources=33, dtype=jnp.bfloat16)
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    results = gradients(pk.attention, causal=True)(*args), gradients(plain)(*args)
    for found, other, want in zip(*results, reference(*args, causal=True), strict=True):
        errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - want) ** 2)) for x in (found, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_no_rows_and_no_keys():
    """Empty batches give empty results; queries without any key give zeros."""
    q, k, v, _ = (np.asarray(x) for x in data())
    assert jax.jit(pk.attention)(q[:0], k[:0], v[:0]).shape == (0, *q.shape[1:])
    assert not jax.jit(pk.attention)(q, k[:, :0], v[:, :0]).any()


def test_vmap_scan_remat():
    """A batch of batches, and a loop over rematerialised layers."""
    args = data()
    twice = [np.stack([x, x]) for x in args]
    for found, want in zip(jax.vmap(gradients(pk.attention))(*twice), reference(*args), strict=True):
        close(found, [want, want])

    def stack(layer):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.lax.scan(layer, x, None, length=2)[0]))))

    def layer(x, _):
        return x + pk.attention(x, x[:, :, :2], x[:, :, 2:], causal=True), None

    close([stack(jax.checkpoint(layer))(args[0])], [stack(layer)(args[0])])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_meshes(kind, monkeypatch):
    """Batch and heads sharded, in blocks of queries: no collective at all. Too few key heads are gathered, not wrong."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    ids = np.repeat(SEGMENTS, 4, axis=1)
    for shape, key_heads, silent in (((2, 2), 2, True), ((1, 4), 2, False)):
        args = data(tokens=36, sources=36, key_heads=key_heads)
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
        heads = NamedSharding(mesh, P("data", None, "tensor" if silent else None))
        queries = NamedSharding(mesh, P("data", None, "tensor"))
        with jax.set_mesh(mesh):
            placed = jax.device_put(
                (*args, ids), (queries, heads, heads, queries if silent else heads, NamedSharding(mesh, P("data")))
            )
            compiled = gradients(pk.attention, causal=True).lower(*placed).compile()
            close(compiled(*placed), reference(*args, ids, causal=True))
            found = re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-permute)(?=\()", compiled.as_text())
            assert not (silent and found)


def test_residuals():
    """Backward keeps arrays of the inputs' size in their dtype, and nothing of the size of the scores."""
    q, k, v, _ = data(tokens=64, sources=64, dtype=jnp.bfloat16)
    pullback = jax.eval_shape(lambda *args: jax.vjp(pk.attention, *args)[1], q, k, v)
    assert not [x for x in jax.tree.leaves(pullback) if x.size >= q.size and x.dtype == jnp.float32]


# ---- the kernel -----------------------------------------------------------------------------------------------------

interpreted = functools.partial(pk.attention, implementation="interpret")
LONG = np.array([[1] * 70 + [2] * 50 + [0] * 30, [0] * 10 + [4] * 5 + [2] * 135])  # in blocks of 32, 64 and 128


@pytest.mark.parametrize(
    "sizes, causal, ids",
    [
        ({"batch": 4}, True, [SEGMENTS]),
        ({"batch": 2, "tokens": 150, "sources": 150, "dim": 80}, False, [LONG]),
        ({"batch": 2, "tokens": 150, "sources": 150, "dim": 72, "key_heads": 1}, True, [LONG]),
        ({"batch": 1, "tokens": 70, "sources": 70, "dim": 100, "key_heads": 4}, False, []),
        ({"batch": 1, "tokens": 40, "sources": 90}, True, []),
        ({"batch": 1, "tokens": 90, "sources": 40}, True, []),
    ],
    ids=["packed", "vision", "packed, one key head", "whole rows", "more keys", "more queries"],
)
def test_kernel(sizes, causal, ids):
    """Any head size and number of tokens, whole blocks and masked ones, queries without a key."""
    args = data(**sizes)
    close(gradients(interpreted, causal=causal)(*args, *ids), reference(*args, *ids, causal=causal))


def test_kernel_in_bfloat16():
    """At most 1.5 times as far from float64 as the XLA implementation, beside padding that holds garbage."""
    clean = data(batch=2, tokens=150, sources=150, dim=80, dtype=jnp.bfloat16)
    args = [jnp.where((LONG == 0)[:, :, None, None], 1e38, x).astype(x.dtype) for x in clean]
    results = (gradients(run, causal=True)(*args, LONG) for run in (interpreted, pk.attention))
    for found, other, want in zip(*results, reference(*clean, LONG, causal=True), strict=True):
        errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - want) ** 2)) for x in (found, other)]
        assert errors[0] <= 1.5 * errors[1]


def test_kernel_under_vmap_and_on_a_mesh():
    """A batch of batches; rows and heads sharded, without a collective."""
    args = data(batch=2)
    for found, want in zip(
        jax.vmap(gradients(interpreted))(*(np.stack([x, x]) for x in args)), reference(*args), strict=True
    ):
        close(found, [want, want])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, NamedSharding(mesh, P("data", None, "tensor")))
        compiled = gradients(interpreted, causal=True).lower(*placed).compile()
        close(compiled(*placed), reference(*args, causal=True))
        assert not re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-permute)(?=\()", compiled.as_text())


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
def test_kernel_lowers_at_real_shapes(device_kind):
    """One Triton call forward and two backward: text and vision, packed, float32 and an odd head size."""
    for sizes in (
        {"segmented": True},
        {"heads": 16, "key_heads": 16, "dim": 80, "segmented": True},
        {"dim": 100, "dtype": jnp.float32},
    ):
        run = gradients(functools.partial(pk.attention, implementation="triton"), causal=True)
        assert triton_calls(run, *shaped(**sizes), device_kind=device_kind) == 3


def test_gradients_in_float16():
    """A scaled loss may use all of the range: what is rounded on the way is no larger than what comes out."""
    args = data(batch=1, tokens=32, sources=32, dim=128, dtype=jnp.float16)
    args[-1] *= 8192
    _, dq, dk, _ = gradients(interpreted, causal=True)(*args)
    for found, want in zip((dq, dk), reference(*args, causal=True)[1:3], strict=True):
        assert 10_000 < np.max(np.abs(want)) < 65_504 and np.isfinite(found).all()


@pytest.mark.parametrize(
    "why, options",
    [
        ("segments of keys", {"segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS}),
        ("scale is 0.0", {"scale": 0.0}),
        ("a head takes 1024 bytes, they take 512", {}),
    ],
)
def test_kernel_refuses(why, options):
    q, k, v, _ = data(dim=8 if options else 256)
    with pytest.raises(NotImplementedError, match=f"'triton' cannot do this: .*{why}"):
        pk.attention(q, k, v, implementation="triton", **options)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def lowered_for_cuda(function, *args):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shaped(tokens=2048, heads=12, key_heads=2, dim=128, dtype=jnp.bfloat16, segmented=False):
    sizes = ((tokens, heads), (tokens, key_heads), (tokens, key_heads), (tokens, heads))
    arrays = [jax.ShapeDtypeStruct((4, *size, dim), dtype) for size in sizes]
    return [*arrays, *[jax.ShapeDtypeStruct((4, tokens), jnp.int32)] * segmented]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
def test_none_lowers_to_cudnn(segmented, causal):
    """Text and vision shapes in bfloat16 become one cuDNN call forward and one backward, with the right mask."""
    kind = ("PADDING_" if segmented and causal else "") + (
        "CAUSAL" if causal else "PADDING" if segmented else "NO_MASK"
    )
    for sizes in ({}, {"heads": 16, "key_heads": 16, "dim": 80}):
        run = gradients(pk.attention, causal=causal, max_segments=4 if segmented else None)
        text = lowered_for_cuda(run, *shaped(**sizes, segmented=segmented))
        assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
        assert set(re.findall(r"mask_type[^A-Z]*([A-Z_]+)", text)) == {kind}


@pytest.mark.parametrize(
    "why, sizes, options",
    [
        ("float32", {"dtype": jnp.float32}, {}),
        ("D is 100", {"dim": 100}, {}),
        ("max_segments", {"segmented": True}, {}),
    ],
)
def test_cudnn_refuses(why, sizes, options):
    """What cuDNN cannot do goes to our kernels, float32 to XLA; it raises when cuDNN was asked for by name."""
    args = shaped(**sizes)
    run = gradients(pk.attention, **options)
    assert "__cudnn" not in lowered_for_cuda(run, *args)
    assert triton_calls(run, *args) == (0 if why == "float32" else 3)
    with pytest.raises(NotImplementedError, match=why):
        gradients(pk.attention, implementation="cudnn", **options).trace(*args)


@pytest.mark.parametrize("capability, kernels", [(9.0, 0), (8.0, 3), (8.9, 3), (7.5, 0)])
def test_packed_rows_on_other_gpus(capability, kernels, monkeypatch):
    """Before Hopper cuDNN takes no segments: our kernels do, where tensor cores take bfloat16; XLA on older GPUs."""
    monkeypatch.setattr(module._pallas, "compute_capability", lambda: capability)
    run = gradients(pk.attention, causal=True, max_segments=4)
    args = shaped(segmented=True)
    assert ("__cudnn" in lowered_for_cuda(run, *args)) == (capability == 9.0)
    assert triton_calls(run, *args, device_kind="NVIDIA A100-SXM4-80GB") == kernels


def test_one_query_is_left_to_xla():
    """Decoding is a few matrix products; cuDNN is for many queries."""
    _, k, v, _ = shaped()
    one = jax.ShapeDtypeStruct((4, 1, 12, 128), jnp.bfloat16)
    assert "__cudnn" not in lowered_for_cuda(jax.jit(pk.attention), one, k, v)


def test_find_segments():
    """Start and length of each run, whatever padding lies before, between and after; what has no slot is marked."""
    ids = jnp.array([[0, 0, 1, 1, 0, 2], [3, 3, 3, 3, 3, 3], [0] * 6, [1, 2, 3, 3, 0, 0]])
    found = jax.jit(functools.partial(pk.find_segments, max_segments=2))(ids)
    assert found.starts.tolist() == [[2, 5], [0, -1], [-1, -1], [0, 1]]
    assert found.lengths.tolist() == [[2, 1], [6, -1], [-1, -1], [1, 1]]
    assert found.ids.tolist() == [[0, 0, 1, 1, 0, 2], [1] * 6, [0] * 6, [1, 2, 3, 3, 0, 0]]
    cleared = module._cleared(jnp.ones((4, 6, 1, 1)), found)[..., 0, 0]
    assert np.isnan(cleared[3, 2:4]).all() and cleared[0].tolist() == [0, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="max_segments is 0"):
        pk.find_segments(ids, 0)
    with pytest.raises(ValueError, match="shape"):
        pk.find_segments(ids[0], 2)


def test_segments_found_before():
    """The same values and gradients as from ids, and the same calls of cuDNN."""
    args = data()
    found = pk.find_segments(SEGMENTS, 3)
    close(gradients(pk.attention)(*args, found), reference(*args, SEGMENTS))
    once = gradients(lambda *args, segment_ids: pk.attention(*args, segment_ids=pk.find_segments(segment_ids, 4)))
    text = lowered_for_cuda(once, *shaped(segmented=True))
    assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    with pytest.raises(ValueError, match="beside Segments"):
        pk.attention(*args[:3], segment_ids=found, max_segments=3)
