"""Compares decode_attention with float64 numpy, and checks which slots of the cache are read and written."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes
from pallas_kernels._tuning import Blocks
from tests._support.lowered import triton_calls

module = importlib.import_module("pallas_kernels.decode_attention")
kernel, xla = (functools.partial(pk.decode_attention, implementation=name) for name in ("interpret", "xla"))


# With 2, 4, 5, 6, 7 and 8 query heads per key head.
REAL = [shapes.TEXT["2b"], shapes.TEXT["7b"], shapes.QWEN2_5_VL["32b"], *shapes.QWEN3_VL.values()]


def operands(batch, heads, key_heads, dim, slots, slot, dtype="float32", norm=False):
    rng = np.random.default_rng(0)
    angle, cache = (batch, dim // 2), (batch, slots, key_heads, dim)
    sizes = {"qkv": (batch, heads + 2 * key_heads, dim), "cos": angle, "sin": angle, "keys": cache, "values": cache}
    arrays = [
        jnp.asarray(rng.normal(size=size), "float32" if name in ("cos", "sin") else dtype)
        for name, size in sizes.items()
    ]
    valid = jnp.asarray(rng.uniform(size=(batch, slots)) < 0.6, jnp.int32)
    weights = [jnp.asarray(1 + 0.3 * rng.normal(size=dim), dtype) for _ in range(2 * norm)]
    return *arrays, valid, jnp.int32(slot), *weights


def truth(qkv, cos, sin, keys, values, valid, slot, *weights):
    """Computes the operation in float64, for one row and head after the other."""
    qkv, cos, sin, keys, values = (np.array(x, np.float64) for x in (qkv, cos, sin, keys, values))
    key_heads, dim = keys.shape[2:]
    q, k, v = np.split(qkv, (qkv.shape[1] - 2 * key_heads, qkv.shape[1] - key_heads), axis=1)

    def rotate(x):
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    if weights:
        q, k = (
            x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
            for x, weight in zip((q, k), weights, strict=True)
        )
    q, keys[:, slot], values[:, slot] = rotate(q), rotate(k), v
    out = np.zeros(q.shape)
    for row, head in np.ndindex(q.shape[:2]):
        visible = [i for i in range(slot + 1) if i == slot or valid[row, i]]
        key_head = head // (q.shape[1] // key_heads)
        p = np.exp(keys[row, visible, key_head] @ q[row, head] / dim**0.5)
        out[row, head] = p / p.sum() @ values[row, visible, key_head]
    return out, keys, values


def distances(got, want):
    return [np.max(np.abs(np.asarray(g, np.float64) - w)) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    "batch, heads, key_heads, dim, slots, slot, dtype, norm",
    [
        (1, 12, 2, 16, 40, 0, "float32", False),  # the first slot: no other slot is read
        (2, 7, 1, 20, 40, 39, "float32", False),  # the last slot; half a head is not a power of two
        (3, 16, 2, 32, 70, 33, "bfloat16", False),  # a group of 8, in the middle of a block
        (1, 14, 2, 8, 130, 128, "float16", False),  # a group of 7, whole blocks
        (1, 20, 1, 16, 20, 11, "float32", False),  # more than 16 queries
        (2, 8, 2, 20, 40, 17, "float32", True),  # a norm, and a group of 4
        (2, 4, 2, 32, 40, 0, "bfloat16", True),  # a norm, and a group of 2
        (1, 10, 2, 16, 40, 39, "float32", False),  # a group of 5
    ],
)
def test_output_and_cache_match_numpy(batch, heads, key_heads, dim, slots, slot, dtype, norm):
    """Covers the cache, too, of which only the slot may change."""
    args = operands(batch, heads, key_heads, dim, slots, slot, dtype, norm)
    want = truth(*args)
    tolerance = 1e-5 if dtype == "float32" else 8 * float(jnp.finfo(dtype).eps)
    for run in (kernel, xla):
        got = jax.jit(run)(*args)
        assert max(distances(got, want)) < tolerance
        unchanged = np.arange(slots) != slot
        assert all((new[:, unchanged] == old[:, unchanged]).all() for new, old in zip(got[1:], args[3:5], strict=True))


def test_number_of_splits_does_not_change_the_output():
    """Covers more and fewer splits than filled blocks: some splits have several blocks, some have none."""
    blocks = Blocks(rows=16, num_warps=4, programs=2 * 4)
    run = jax.jit(functools.partial(module.attend_kernel, module.StaticArgs(1e-6, None), interpret=True, blocks=blocks))
    for slot in (0, 1, 17, 49):
        args = operands(2, 4, 2, 16, 50, slot)
        assert max(distances(run(*args), truth(*args))) < 1e-5, slot


@pytest.mark.parametrize("run", [kernel, xla])
def test_row_of_padding_returns_its_new_value(run):
    """A row of padding returns the new value; the kernel never reads later slots."""
    qkv, cos, sin, keys, values, valid, slot = operands(2, 4, 2, 16, 40, 20)
    unused = jnp.nan if run is kernel else 1e4
    args = qkv, cos, sin, keys.at[:, 21:].set(unused), values.at[:, 21:].set(unused), 0 * valid, slot
    got = jax.jit(run)(*args)[0]
    np.testing.assert_allclose(got, jnp.repeat(qkv[:, -2:], 2, axis=1), rtol=1e-6)


def test_slot_past_the_end_is_clamped():
    """Both the kernel and XLA then write to the last slot."""
    args = operands(2, 4, 2, 16, 40, 39)
    for run in (kernel, xla):
        for got, want in zip(jax.jit(run)(*args[:-1], 47), jax.jit(run)(*args), strict=True):
            assert (got == want).all()


def test_call_unsupported_by_the_kernel_uses_xla_or_raises():
    """Requesting the kernel by name raises; None picks XLA."""
    for size, message in (
        ((65, 1, 8), "65 query heads per key head; expected at most 64"),
        ((2, 1, 256), "1024 bytes per head"),
    ):
        heads, key_heads, dim = size
        args = operands(1, heads, key_heads, dim, 20, 3)
        with pytest.raises(ValueError, match=message):
            kernel(*args)
        assert triton_calls(pk.decode_attention, *args) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("text", REAL, ids=str)
def test_none_lowers_to_two_kernels_at_real_shapes(text, batch, dtype):
    """On a GPU, None lowers to two Triton calls at the models' shapes."""
    heads, angle = (batch, text.heads + 2 * text.kv_heads, text.head_dim), (batch, text.head_dim // 2)
    cache, valid = (batch, 2176, text.kv_heads, text.head_dim), (batch, 2176)
    sizes = {heads: dtype, angle: "float32", cache: dtype, valid: "int32", (): "int32"}
    qkv, angle, cache, valid, slot = (jax.ShapeDtypeStruct(*item) for item in sizes.items())
    args = [qkv, angle, angle, cache, cache, valid, slot]
    if text in shapes.QWEN3_VL.values():
        args += [jax.ShapeDtypeStruct((text.head_dim,), dtype)] * 2
    assert triton_calls(pk.decode_attention, *args) == 2


def test_cpu_program_has_no_kernel():
    """Lowered for a CPU, the same call is XLA only."""
    assert "triton" not in jax.jit(pk.decode_attention).lower(*operands(1, 4, 2, 16, 8, 3)).as_text()
