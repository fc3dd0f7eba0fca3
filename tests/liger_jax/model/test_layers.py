"""The layers: what is merged for the GPU's matmuls changes no value and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import pallas_kernels as pk
from liger_jax.model import text
from liger_jax.model.layers import Initializer, Linear
from tests._support.lowered import lowered_for_cuda


def linear_and_input(out_shape):
    linear = Linear(Initializer(0, "float32", 1.0), (24,), out_shape, bias=True)
    linear.bias[...] = jax.random.normal(jax.random.key(1), out_shape)
    return linear, jax.random.normal(jax.random.key(2), (2, 5, 24))


@pytest.mark.parametrize("out_shape", [(12,), (4, 6), (3, 4, 6)])
def test_linear_adds_its_bias(out_shape):
    """Values, gradients and the layers of `unstacked` equal those of a plain sum."""
    linear, x = linear_and_input(out_shape)

    def plain(linear, x):
        return jnp.tensordot(x, linear.kernel[...], axes=1) + linear.bias[...]

    want, want_pullback = jax.vjp(plain, linear, x)
    got, got_pullback = jax.vjp(lambda linear, x: linear(x), linear, x)
    cotangent = jax.random.normal(jax.random.key(3), want.shape)
    for a, b in zip(jax.tree.leaves(got_pullback(cotangent)), jax.tree.leaves(want_pullback(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if len(out_shape) == 3:
        np.testing.assert_allclose(jnp.stack(linear.unstacked(x), axis=2), want, rtol=1e-6, atol=1e-6)


def test_bias_of_heads_is_a_vector_to_the_matmul():
    """cuBLAS adds only vectors. On a mesh, which may split heads, they stay separate axes."""
    linear, x = linear_and_input((4, 6))
    text = jax.jit(lambda linear, x: linear(x)).lower(linear, x).as_text()
    assert "(tensor<24xf32>) -> tensor<1x1x24xf32>" in text and "tensor<1x1x4x6xf32>" not in text
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        text = jax.jit(lambda linear, x: linear(x)).lower(linear, x).as_text()
    assert "tensor<1x1x4x6xf32>" in text


def test_residual_before_a_norm():
    """Values equal those of the fused operation; with a gradient, it is the fused operation."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, residual, d_normed, d_total = (jax.random.normal(key, (2, 7, 32)) for key in keys)
    operands = x, residual, jax.random.normal(jax.random.key(5), (32,))

    def fused(*operands):
        return pk.add_rms_norm(*operands, eps=1e-6)

    def ours(*operands):
        return text._add_norm(1e-6, *operands)

    for got, want in zip(ours(*operands), fused(*operands), strict=True):
        np.testing.assert_array_equal(got, want)
    got, want = (jax.vjp(function, *operands)[1]((d_normed, d_total)) for function in (ours, fused))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)

    def with_gradient(*operands):
        return jax.vjp(ours, *operands)[1]((operands[0], operands[1]))

    assert "add_rms_norm_forward" not in lowered_for_cuda(ours, *operands)
    text_of_gradient = lowered_for_cuda(with_gradient, *operands)
    assert "add_rms_norm_forward" in text_of_gradient and "add_rms_norm_backward" in text_of_gradient
