"""Compares attention with softmax over full scores: masks, segments, blocks, meshes, and the choice of backend."""

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
from pallas_kernels.segments import clear_in_place, clear_outside, clear_rows
from tests._support.attention import (
    SEGMENTS,
    assert_close,
    collectives,
    data,
    gradients,
    reference,
    root_mean_square_error,
)
from tests._support.lowered import lowered_for_cuda as gpu_text
from tests._support.lowered import triton_calls

module = importlib.import_module("pallas_kernels.attention")


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
def test_values_and_gradients_match_numpy(causal, segmented, one_block, monkeypatch):
    """Covers masks and grouped heads, with all queries at once and in blocks of 16, the last of which is padded."""
    tokens = 9 if one_block else 36
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**28 if one_block else 1)
    args = data(tokens=tokens, sources=tokens)
    ids = [np.repeat(SEGMENTS, tokens // 9, axis=1)] if segmented else []
    assert_close(gradients(pk.attention, causal=causal)(*args, *ids), reference(*args, *ids, causal=causal))


def test_more_keys_than_queries_match_numpy():
    """causal aligns the last query with the last key; keys may have segment ids of their own."""
    args = data(tokens=4, sources=9)
    assert_close(gradients(pk.attention, causal=True)(*args), reference(*args, causal=True))
    ids = SEGMENTS[:, 5:], SEGMENTS
    assert_close(gradients(pk.attention)(*args, *ids), reference(*args, *ids))


def test_padding_values_do_not_matter():
    """For any finite values in padding, its outputs and gradients are zero and all others are unchanged."""
    clean = data()
    padding = (SEGMENTS == 0)[:, :, None, None]
    dirty = [jnp.asarray(np.where(padding, 1e38, x)) for x in clean]
    got = gradients(pk.attention)(*dirty, SEGMENTS)
    assert_close(got, reference(*clean, SEGMENTS))
    assert not any(np.where(padding, x, 0).any() for x in got)


def test_bfloat16_is_as_exact_as_full_scores():
    """The error is at most 1.5 times that of JAX's own attention over full scores in the same dtype."""
    args = data(tokens=33, sources=33, dtype=jnp.bfloat16)
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    results = gradients(pk.attention, causal=True)(*args), gradients(plain)(*args)
    for got, baseline, want in zip(*results, reference(*args, causal=True), strict=True):
        error, allowed = (root_mean_square_error(x, want) for x in (got, baseline))
        assert error <= 1.5 * allowed + 1e-6


@pytest.mark.parametrize("implementation", [None, *module.BACKENDS])
def test_empty_batches_and_queries_without_keys(implementation):
    """Empty batches give empty results; queries without keys give zeros. XLA computes them, by any name.

    Regression: "fa4" and "cudnn" raised.
    """
    q, k, v, _ = (np.asarray(x) for x in data())
    attend = jax.jit(functools.partial(pk.attention, implementation=implementation))
    assert attend(q[:0], k[:0], v[:0]).shape == (0, *q.shape[1:])
    assert not attend(q, k[:, :0], v[:, :0]).any()


def test_vmap_scan_and_remat_change_no_value():
    """Covers vmap, and a scan over rematerialized layers."""
    args = data()
    twice = [np.stack([x, x]) for x in args]
    for got, want in zip(jax.vmap(gradients(pk.attention))(*twice), reference(*args), strict=True):
        assert_close(got, [want, want])

    def stack(layer):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.lax.scan(layer, x, None, length=2)[0]))))

    def layer(x, _):
        return x + pk.attention(x, x[:, :, :2], x[:, :, 2:], causal=True), None

    assert_close([stack(jax.checkpoint(layer))(args[0])], [stack(layer)(args[0])])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_batch_and_heads_need_no_collective(kind, monkeypatch):
    """Holds for blocks of queries, too. Key heads that the devices do not divide are gathered."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    ids = np.repeat(SEGMENTS, 4, axis=1)
    for shape, key_heads, divisible in (((2, 2), 2, True), ((1, 4), 2, False)):
        args = data(tokens=36, sources=36, key_heads=key_heads)
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
        heads = NamedSharding(mesh, P("data", None, "tensor" if divisible else None))
        queries = NamedSharding(mesh, P("data", None, "tensor"))
        with jax.set_mesh(mesh):
            placed = jax.device_put(
                (*args, ids), (queries, heads, heads, queries if divisible else heads, NamedSharding(mesh, P("data")))
            )
            compiled = gradients(pk.attention, causal=True).lower(*placed).compile()
            assert_close(compiled(*placed), reference(*args, ids, causal=True))
            assert not (divisible and collectives(compiled))


@pytest.mark.parametrize("problems, rows", [(None, "data"), ("problems", None), ("problems", "data")])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_vmap_on_explicit_axes(implementation, problems, rows):
    """Over sharded problems or sharded rows. Regression: it raised if the rows were sharded."""
    args = data()
    twice = [jnp.stack([x, x]) for x in args]
    mesh = jax.make_mesh(
        (2, 2), ("problems", "data"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:4]
    )
    run = gradients(functools.partial(pk.attention, implementation=implementation), max_segments=3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(twice, NamedSharding(mesh, P(problems, rows)))
        ids = jax.device_put(jnp.asarray(SEGMENTS), NamedSharding(mesh, P(rows)))
        compiled = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None))).lower(*placed, ids).compile()
        results = compiled(*placed, ids)
    for got, want in zip(results, reference(*args, SEGMENTS), strict=True):
        assert_close(got, [want, want])
    assert bool(collectives(compiled)) == (problems is not None and rows is not None)


def test_backward_saves_no_scores():
    """The backward pass saves arrays of the size and dtype of the inputs, and none of the size of the scores."""
    q, k, v, _ = data(tokens=64, sources=64, dtype=jnp.bfloat16)
    pullback = jax.eval_shape(lambda *args: jax.vjp(pk.attention, *args)[1], q, k, v)
    assert not [x for x in jax.tree.leaves(pullback) if x.size >= q.size and x.dtype == jnp.float32]


# ---- Pallas kernels -----------------------------------------------------------------------------------------------------

interpreted = functools.partial(pk.attention, implementation="interpret")
LONG = np.array([[1] * 70 + [2] * 50 + [0] * 30, [0] * 10 + [4] * 5 + [2] * 135])  # several blocks of 32, 64 and 128


@pytest.mark.parametrize(
    "sizes, causal, ids",
    [
        ({"batch": 4}, True, [SEGMENTS]),
        ({"batch": 2, "tokens": 150, "sources": 150, "dim": 80}, False, [LONG]),
        ({"batch": 2, "tokens": 150, "sources": 150, "dim": 72, "key_heads": 1}, True, [LONG]),
        ({"batch": 1, "tokens": 70, "sources": 70, "dim": 100, "key_heads": 4}, False, []),
        ({"batch": 1, "tokens": 40, "sources": 90}, True, []),
        ({"batch": 1, "tokens": 90, "sources": 40}, True, []),
        ({"batch": 1, "tokens": 20, "sources": 30, "dim": 72, "key_heads": 1}, True, []),
    ],
    ids=["packed", "vision", "packed, one key head", "whole rows", "more keys", "more queries", "one block"],
)
def test_kernel_matches_numpy(sizes, causal, ids):
    """Covers several head sizes and numbers of tokens, unmasked and masked blocks, and queries that see no key."""
    args = data(**sizes)
    assert_close(gradients(interpreted, causal=causal)(*args, *ids), reference(*args, *ids, causal=causal))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens, sources", [(70, 150), (150, 70)])
def test_kernel_compares_segment_ids_of_keys(tokens, sources, causal):
    """Segments of keys may have gaps, as those of a KV cache; queries may see no key."""
    rng = np.random.default_rng(0)
    query_ids, key_ids = (rng.integers(0, 4, (2, length // 10)).repeat(10, axis=1) for length in (tokens, sources))
    args = data(batch=2, tokens=tokens, sources=sources)
    ids = query_ids.astype(np.int32), key_ids.astype(np.int32)
    assert_close(gradients(interpreted, causal=causal)(*args, *ids), reference(*args, *ids, causal=causal))


def test_bfloat16_kernel_is_as_exact_as_xla():
    """The error is at most 1.5 times that of the XLA implementation, with 1e38 in the padding."""
    clean = data(batch=2, tokens=150, sources=150, dim=80, dtype=jnp.bfloat16)
    args = [jnp.where((LONG == 0)[:, :, None, None], 1e38, x).astype(x.dtype) for x in clean]
    results = (gradients(run, causal=True)(*args, LONG) for run in (interpreted, pk.attention))
    for got, baseline, want in zip(*results, reference(*clean, LONG, causal=True), strict=True):
        error, allowed = (root_mean_square_error(x, want) for x in (got, baseline))
        assert error <= 1.5 * allowed


def test_kernel_matches_under_vmap_and_on_a_mesh():
    """Sharded rows and heads need no collective."""
    args = data(batch=2)
    for got, want in zip(
        jax.vmap(gradients(interpreted))(*(np.stack([x, x]) for x in args)), reference(*args), strict=True
    ):
        assert_close(got, [want, want])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, NamedSharding(mesh, P("data", None, "tensor")))
        compiled = gradients(interpreted, causal=True).lower(*placed).compile()
        assert_close(compiled(*placed), reference(*args, causal=True))
        assert not collectives(compiled)


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
def test_kernel_lowers_at_real_shapes(device_kind):
    """Lowers to one Triton call forward and two backward: text and vision, packed, float32, an odd head size, key ids."""
    run = gradients(functools.partial(pk.attention, implementation="triton"), causal=True)
    for sizes in (
        {"segmented": True},
        {"heads": 16, "key_heads": 16, "dim": 80, "segmented": True},
        {"dim": 100, "dtype": jnp.float32},
    ):
        assert triton_calls(run, *shaped(**sizes), device_kind=device_kind) == 3
    args = shaped(segmented=True)
    assert triton_calls(run, *args, args[-1], device_kind=device_kind) == 3


@pytest.mark.parametrize("causal", [False, True])
def test_none_uses_kernels_with_ids_of_keys_from_128_queries_on(causal):
    """For frames with gaps and for a chat's turn after a cache. XLA was measured to be as fast for 64 queries."""
    q, k, v, grad, ids = shaped(segmented=True)
    run = gradients(pk.attention, causal=causal)
    assert triton_calls(run, q, k, v, grad, ids, ids) == 3
    q, grad, few = (jax.ShapeDtypeStruct((x.shape[0], 64, *x.shape[2:]), x.dtype) for x in (q, grad, ids))
    assert triton_calls(run, q, k, v, grad, few, ids) == 0


def test_segments_with_gaps_match_numpy():
    """A frame whose windows leave padding between them: its patches see each other across the gap."""
    ids = np.array([[1] * 40 + [0] * 4 + [1] * 86 + [2] * 20, [0] * 20 + [1] * 70 + [0] * 4 + [1] * 46 + [2] * 10])
    args = data(batch=2, tokens=150, sources=150)
    for run in (interpreted, pk.attention):
        assert_close(gradients(run)(*args, ids, ids), reference(*args, ids, ids))


WINDOWS = np.array([[1] * 64, [2] * 32 + [3] * 16 + [4] * 4 + [0] * 12, [5] * 16 + [6] * 4 + [0] * 44, [0] * 64])


@pytest.mark.parametrize("dim", [20, 80])
def test_windows_match_numpy(dim):
    """Blocks of 64 patches that hold a whole window, several small ones, or nothing: a block of queries and one of keys."""
    args = data(batch=4, tokens=64, sources=64, heads=2, dim=dim)
    assert_close(gradients(interpreted)(*args, WINDOWS), reference(*args, WINDOWS))


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
def test_none_uses_kernels_for_windows(device_kind):
    """4 x 4096 patches in windows of 64, whose segment ids have no bound: one kernel in each direction."""
    shapes = [jax.ShapeDtypeStruct((256, 64, 16, 80), jnp.bfloat16)] * 4 + [jax.ShapeDtypeStruct((256, 64), jnp.int32)]
    assert triton_calls(gradients(pk.attention), *shapes, device_kind=device_kind) == 2


def test_large_float16_gradients_stay_finite():
    """A scaled loss may use the whole range of float16, because no rounded intermediate is larger than the gradients."""
    args = data(batch=1, tokens=32, sources=32, dim=128, dtype=jnp.float16)
    args[-1] *= 8192
    _, dq, dk, _ = gradients(interpreted, causal=True)(*args)
    for got, want in zip((dq, dk), reference(*args, causal=True)[1:3], strict=True):
        assert 10_000 < np.max(np.abs(want)) < 65_504 and np.isfinite(got).all()


@pytest.mark.parametrize(
    "reason, options",
    [
        ("scale is 0.0", {"scale": 0.0}),
        ("q has 1024 bytes per head; expected at most 512", {}),
    ],
)
def test_call_unsupported_by_the_kernels_raises(reason, options):
    q, k, v, _ = data(dim=8 if options else 256)
    with pytest.raises(NotImplementedError, match=f"'triton' does not support this call: .*{reason}"):
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
    """Text and vision shapes in bfloat16 lower to one cuDNN call forward and one backward, with the right mask."""
    kind = ("PADDING_" if segmented and causal else "") + (
        "CAUSAL" if causal else "PADDING" if segmented else "NO_MASK"
    )
    for sizes in ({}, {"heads": 16, "key_heads": 16, "dim": 80}):
        run = gradients(pk.attention, causal=causal, max_segments=4 if segmented else None)
        text = lowered_for_cuda(run, *shaped(**sizes, segmented=segmented))
        assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
        assert set(re.findall(r"mask_type[^A-Z]*([A-Z_]+)", text)) == {kind}


@pytest.mark.parametrize(
    "reason, sizes, options",
    [
        ("float32", {"dtype": jnp.float32}, {}),
        ("D is 100", {"dim": 100}, {}),
        ("max_segments", {"segmented": True}, {}),
    ],
)
def test_call_unsupported_by_cudnn_falls_back_or_raises(reason, sizes, options):
    """None picks the Pallas kernels, and XLA for float32; requesting cuDNN by name raises."""
    args = shaped(**sizes)
    run = gradients(pk.attention, **options)
    assert "__cudnn" not in lowered_for_cuda(run, *args)
    assert triton_calls(run, *args) == (0 if reason == "float32" else 3)
    with pytest.raises(NotImplementedError, match=reason):
        gradients(pk.attention, implementation="cudnn", **options).trace(*args)


@pytest.mark.parametrize("capability, kernels", [(9.0, 1), (8.0, 3), (8.9, 3), (7.5, 0)])
def test_packed_rows_before_hopper_use_the_kernels(capability, kernels, monkeypatch):
    """Before Hopper, cuDNN supports no segments, so None picks the Pallas kernels from Ampere on, else XLA.

    With cuDNN, one kernel clears the padding of the output.
    """
    monkeypatch.setattr(module._pallas, "compute_capability", lambda: capability)
    monkeypatch.setattr(module._fa4, "import_problem", lambda: "not in this test")
    run = gradients(pk.attention, causal=True, max_segments=4)
    args = shaped(segmented=True)
    assert ("__cudnn" in lowered_for_cuda(run, *args)) == (capability == 9.0)
    assert triton_calls(run, *args, device_kind="NVIDIA A100-SXM4-80GB") == kernels
    assert ("clear_rows" in gpu_text(run, *args)) == (capability == 9.0)


def test_single_query_uses_xla():
    """A single query is a few small matmuls, for which None picks XLA."""
    _, k, v, _ = shaped()
    one = jax.ShapeDtypeStruct((4, 1, 12, 128), jnp.bfloat16)
    assert "__cudnn" not in lowered_for_cuda(jax.jit(pk.attention), one, k, v)


def test_find_segments_returns_starts_and_lengths():
    """Covers padding on either side, and segments without a slot, which give NaN."""
    ids = jnp.array([[0, 0, 1, 1, 0, 2], [3, 3, 3, 3, 3, 3], [0] * 6, [1, 2, 3, 3, 0, 0]])
    segments = jax.jit(functools.partial(pk.find_segments, max_segments=2))(ids)
    assert segments.starts.tolist() == [[2, 5], [0, -1], [-1, -1], [0, 1]]
    assert segments.lengths.tolist() == [[2, 1], [6, -1], [-1, -1], [1, 1]]
    assert segments.ids.tolist() == [[0, 0, 1, 1, 0, 2], [1] * 6, [0] * 6, [1, 2, 3, 3, 0, 0]]
    cleared = clear_outside(jnp.ones((4, 6, 1, 1)), segments)[..., 0, 0]
    assert np.isnan(cleared[3, 2:4]).all() and cleared[0].tolist() == [0, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="max_segments is 0"):
        pk.find_segments(ids, 0)
    with pytest.raises(ValueError, match="shape"):
        pk.find_segments(ids[0], 2)


@pytest.mark.parametrize("rows, width", [(1, 1), (31, 300), (70, 256), (96, 520)])
def test_padding_is_cleared_in_place(rows, width):
    """The kernel writes zeros to padding, NaN to segments without a slot, and nothing to the other tokens."""
    x = jax.random.normal(jax.random.key(0), (2, rows, width), jnp.bfloat16).at[0, 0, 0].set(jnp.inf)
    ids = jax.random.randint(jax.random.key(1), (2, rows), 0, 5)
    ids = ids.at[:, 32:64].set(2)  # in a program that writes nothing
    clear = functools.partial(clear_rows, slots=3, interpret=True)
    want = np.where((ids > 3)[..., None], np.nan, np.where((ids == 0)[..., None], 0, np.asarray(x, np.float32)))
    np.testing.assert_array_equal(np.asarray(jax.vmap(clear)(x, ids), np.float32), want)
    np.testing.assert_array_equal(np.asarray(clear(x[1], ids[1]), np.float32), want[1])


def test_cleared_output_is_not_copied():
    """On a GPU, the result of `clear_in_place` is its operand's own memory."""
    shapes = jax.ShapeDtypeStruct((4, 4096, 16, 80), jnp.bfloat16), jax.ShapeDtypeStruct((4, 4096), jnp.int32)
    text = gpu_text(lambda x, ids: clear_in_place(x, pk.find_segments(ids, 4)), *shapes)
    (call,) = (line for line in text.splitlines() if "clear_rows" in line and "custom_call" in line)
    assert "output_operand_alias<output_tuple_indices = []" in call
    assert "tensor<16384x1280xi1>" not in text and "tensor<4x4096x16x80xi1>" not in text


def test_precomputed_segments_equal_ids():
    """The result of find_segments gives the same values, gradients and cuDNN calls as ids."""
    args = data()
    segments = pk.find_segments(SEGMENTS, 3)
    assert_close(gradients(pk.attention)(*args, segments), reference(*args, SEGMENTS))
    run = gradients(lambda *args, segment_ids: pk.attention(*args, segment_ids=pk.find_segments(segment_ids, 4)))
    text = lowered_for_cuda(run, *shaped(segmented=True))
    assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    with pytest.raises(ValueError, match="max_segments is 3; expected None"):
        pk.attention(*args[:3], segment_ids=segments, max_segments=3)
