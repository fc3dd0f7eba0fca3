"""decode_attention: kernels and XLA's against numpy in float64, and what of the cache is read and written."""

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
kernel, xla = (functools.partial(pk.decode_attention, implementation=how) for how in ("interpret", "xla"))


def operands(batch, heads, key_heads, dim, slots, slot, dtype="float32"):
    rng = np.random.default_rng(0)
    angle, cache = (batch, dim // 2), (batch, slots, key_heads, dim)
    sizes = {"qkv": (batch, heads + 2 * key_heads, dim), "cos": angle, "sin": angle, "keys": cache, "values": cache}
    arrays = [
        jnp.asarray(rng.normal(size=size), "float32" if name in ("cos", "sin") else dtype)
        for name, size in sizes.items()
    ]
    valid = jnp.asarray(rng.uniform(size=(batch, slots)) < 0.6, jnp.int32)
    return *arrays, valid, jnp.int32(slot)


def truth(qkv, cos, sin, keys, values, valid, slot):
    """One row and head after the other, over the slots that count."""
    qkv, cos, sin, keys, values = (np.array(x, np.float64) for x in (qkv, cos, sin, keys, values))
    key_heads, dim = keys.shape[2:]
    q, k, v = np.split(qkv, (qkv.shape[1] - 2 * key_heads, qkv.shape[1] - key_heads), axis=1)

    def turn(x):
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    q, keys[:, slot], values[:, slot] = turn(q), turn(k), v
    out = np.zeros(q.shape)
    for row, head in np.ndindex(q.shape[:2]):
        seen = [i for i in range(slot + 1) if i == slot or valid[row, i]]
        of = head // (q.shape[1] // key_heads)
        p = np.exp(keys[row, seen, of] @ q[row, head] / dim**0.5)
        out[row, head] = p / p.sum() @ values[row, seen, of]
    return out, keys, values


def distances(got, want):
    return [np.max(np.abs(np.asarray(g, np.float64) - w)) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize(
    "batch, heads, key_heads, dim, slots, slot, dtype",
    [
        (1, 12, 2, 16, 40, 0, "float32"),  # the first slot: nothing to read
        (2, 7, 1, 20, 40, 39, "float32"),  # the last; an odd half
        (3, 16, 2, 32, 70, 33, "bfloat16"),  # a group of 8, in the middle of a block
        (1, 14, 2, 8, 130, 128, "float16"),  # a group of 7, whole blocks
        (1, 20, 1, 16, 20, 11, "float32"),  # more queries than 16
    ],
)
def test_against_float64(batch, heads, key_heads, dim, slots, slot, dtype):
    """The output, and the cache with nothing changed but the slot."""
    args = operands(batch, heads, key_heads, dim, slots, slot, dtype)
    want = truth(*args)
    tolerance = 1e-5 if dtype == "float32" else 8 * float(jnp.finfo(dtype).eps)
    for run in (kernel, xla):
        got = jax.jit(run)(*args)
        assert max(distances(got, want)) < tolerance
        others = np.arange(slots) != slot
        assert all((new[:, others] == old[:, others]).all() for new, old in zip(got[1:], args[3:5], strict=True))


def test_shares_of_the_cache():
    """More shares than there are filled blocks, and fewer: some have several blocks, some have none."""
    blocks = Blocks(rows=16, num_warps=4, programs=2 * 4)
    run = jax.jit(functools.partial(module.attend_kernel, None, interpret=True, blocks=blocks))
    for slot in (0, 1, 17, 49):
        args = operands(2, 4, 2, 16, 50, slot)
        assert max(distances(run(*args), truth(*args))) < 1e-5, slot


@pytest.mark.parametrize("run", [kernel, xla])
def test_a_row_that_sees_only_itself(run):
    """A row of padding: the new token is all there is, and what slots behind it hold is never read by the kernel."""
    qkv, cos, sin, keys, values, valid, slot = operands(2, 4, 2, 16, 40, 20)
    behind = jnp.nan if run is kernel else 1e4
    args = qkv, cos, sin, keys.at[:, 21:].set(behind), values.at[:, 21:].set(behind), 0 * valid, slot
    got = jax.jit(run)(*args)[0]
    np.testing.assert_allclose(got, jnp.repeat(qkv[:, -2:], 2, axis=1), rtol=1e-6)


def test_a_slot_behind_the_cache():
    """Nothing is written there: it is taken for the last, by the kernel as by XLA."""
    args = operands(2, 4, 2, 16, 40, 39)
    for run in (kernel, xla):
        for found, want in zip(jax.jit(run)(*args[:-1], 47), jax.jit(run)(*args), strict=True):
            assert (found == want).all()


def test_what_the_kernel_does_not_take():
    """By name it says so; None leaves it to XLA."""
    for size, message in (((65, 1, 8), "65 query heads a key head, it takes 64"), ((2, 1, 256), "1024 bytes a head")):
        heads, key_heads, dim = size
        args = operands(1, heads, key_heads, dim, 20, 3)
        with pytest.raises(ValueError, match=message):
            kernel(*args)
        assert triton_calls(pk.decode_attention, *args) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("size", shapes.TEXT)
def test_lowers_at_real_shapes(size, batch, dtype):
    """Two Triton calls at the models' shapes, which None takes on a GPU."""
    text = shapes.TEXT[size]
    heads, angle = (batch, text.heads + 2 * text.kv_heads, text.head_dim), (batch, text.head_dim // 2)
    cache, valid = (batch, 2176, text.kv_heads, text.head_dim), (batch, 2176)
    sizes = {heads: dtype, angle: "float32", cache: dtype, valid: "int32", (): "int32"}
    qkv, angle, cache, valid, slot = (jax.ShapeDtypeStruct(*of) for of in sizes.items())
    args = qkv, angle, angle, cache, cache, valid, slot
    assert triton_calls(pk.decode_attention, *args) == 2


def test_cpu_program_has_no_kernel():
    """The same call lowered for a CPU is plain XLA."""
    assert "triton" not in jax.jit(pk.decode_attention).lower(*operands(1, 4, 2, 16, 8, 3)).as_text()
