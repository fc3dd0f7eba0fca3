"""Compares qk_norm_rope with its formula in float64 and with the separate operations, and lowers it for GPUs."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes
from pallas_kernels._tuning import Blocks
from pallas_kernels.registry import OPERATIONS
from tests._support.lowered import triton_calls
from tests._support.ops import OPS, close, random_like

module = importlib.import_module("pallas_kernels.qk_norm_rope")


def arguments(batch, tokens, heads, key_heads, dim, dtype="float32"):
    sizes = {"B": batch, "T": tokens, "N": heads, "K": key_heads, "D": dim}
    return OPERATIONS["qk_norm_rope"].example(sizes, dtype)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("heads, key_heads, dim", [(4, 2, 128), (5, 1, 36)])
def test_values_and_gradients_match_float64(heads, key_heads, dim, implementation):
    """Covers numbers of heads and half heads that are no powers of two."""
    op, args = OPS["qk_norm_rope"], arguments(2, 3, heads, key_heads, dim)
    got = jax.jit(op.value_and_gradients(implementation))(*args)
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in args]
        out, pullback = jax.vjp(lambda *differentiable: op.formula(*differentiable, *exact[4:]), *exact[:4])
        cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), random_like(got[:2]))
        want = jax.tree.leaves((out, pullback(tuple(cotangents))))
    close(got, want, tolerance=2e-6)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_rounds_as_the_separate_operations(implementation):
    """In bfloat16, every bit equals that of rms_norm followed by rope."""
    q, k, q_weight, k_weight, cos, sin = arguments(2, 5, 4, 2, 64, "bfloat16")
    want = jax.jit(lambda: pk.rope(pk.rms_norm(q, q_weight), pk.rms_norm(k, k_weight), cos, sin))()
    run = functools.partial(pk.qk_norm_rope, implementation=implementation)
    for got, expected in zip(jax.jit(run)(q, k, q_weight, k_weight, cos, sin), want, strict=True):
        assert (got == expected).all()


def test_backward_saves_the_arguments_only():
    """In bfloat16, nothing of the size of q is saved in float32."""
    args = arguments(1, 6, 4, 2, 64, "bfloat16")
    pullback = jax.eval_shape(lambda *first: jax.vjp(lambda *x: pk.qk_norm_rope(*x, *args[4:]), *first)[1], *args[:4])
    saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= args[0].size]
    assert [(leaf.shape[-3:], leaf.dtype) for leaf in saved] == [(args[0].shape[-3:], jnp.bfloat16)]


@pytest.mark.parametrize("loads", [1, 2])
def test_program_takes_several_blocks(loads):
    """With few programs, each takes several blocks of its lane and group. The last blocks reach past the last heads."""
    static, blocks = module.StaticArgs(1e-6, "interpret"), Blocks(rows=4, num_warps=4, programs=12, loads=loads)
    args = [jnp.stack(pair) for pair in zip(arguments(1, 9, 4, 2, 16), arguments(1, 9, 4, 2, 16), strict=True)]
    partitions = module._partition_heads(*args[:2], blocks)
    assert [(p.rows, p.lanes, p.programs, p.steps) for p in partitions] == [(36, 2, 2, 3), (18, 1, 2, 3)]
    args[0] = args[0].at[1].multiply(2.0)
    q, k, *constants = args
    d_q, d_k = random_like((q, k))
    launch = {"interpret": True, "blocks": blocks}
    close(
        jax.jit(functools.partial(module.forward_kernel, static, **launch))(*args), module._forward_xla(static, *args)
    )
    backward = jax.jit(functools.partial(module.backward_kernel, static, **launch))
    close(backward(q, k, d_q, d_k, *constants), module._backward_xla(static, q, k, d_q, d_k, *constants))


@pytest.mark.parametrize("device_kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
@pytest.mark.parametrize("size", shapes.QWEN3_VL)
def test_each_pass_lowers_to_one_kernel_at_the_models_heads(size, device_kind):
    """The forward and the backward pass become one Triton call each, in a step of training and in one of decoding."""
    text = shapes.QWEN3_VL[size]

    def value_and_gradients(*args):
        out, pullback = jax.vjp(lambda *differentiable: pk.qk_norm_rope(*differentiable, *args[4:]), *args[:4])
        return out, pullback(out)

    for batch, tokens in ((4, 2048), (16, 1)):
        head_axes = [(batch, tokens, n, text.head_dim) for n in (text.heads, text.kv_heads)]
        vectors, tables = [(text.head_dim,)] * 2, [(batch, tokens, text.head_dim // 2)] * 2
        args = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (*head_axes, *vectors)]
        args += [jax.ShapeDtypeStruct(shape, "float32") for shape in tables]
        assert triton_calls(value_and_gradients, *args, device_kind=device_kind) == 2
