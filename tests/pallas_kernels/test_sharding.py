"""`split_rows_over`: programs in which JAX allows no custom_partitioning, because their arguments have axes of two types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk


def on_mesh(kind, array, spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    return jax.device_put(array, NamedSharding(mesh, spec))


def norm(x, weight):
    return pk.rms_norm(x, weight)


def qk_norm_rope(x, weight):
    q, k = x.reshape(*x.shape[:2], 4, 8), x[..., :16].reshape(*x.shape[:2], 2, 8)
    angles = jnp.sin(x[..., :4])
    return jnp.concatenate(pk.qk_norm_rope(q, k, weight[:8], weight[8:16], angles, 1 - angles), axis=2)


def attention(x, weight):
    q = x.reshape(*x.shape[:2], 4, 8) * weight.reshape(4, 8)
    return pk.attention(q, q, q, causal=True)


def loss(x, weight):
    labels = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % 4
    return pk.linear_cross_entropy(x, weight.reshape(4, 8).repeat(4, axis=1), labels)


@pytest.mark.parametrize("op", [norm, qk_norm_rope, attention, loss])
def test_values_and_gradients_are_those_of_one_device(op):
    """The backward pass is traced after the context has ended. The odd row count is not divided by the mesh."""
    for rows in (4, 3):
        rng = np.random.default_rng(rows)
        x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, 6, 32), (32,)))
        spec = P("data") if rows % 2 == 0 else P()
        placed = on_mesh(AxisType.Explicit, x, spec)
        on_auto_axes = on_mesh(AxisType.Auto, weight, P("tensor"))

        def total(op, x, weight):
            return jnp.sum(jnp.sin(op(x, weight)))

        @jax.jit
        def run(x, weight):
            function = jax.sharding.auto_axes(
                functools.partial(total, op), out_sharding=NamedSharding(placed.sharding.mesh, P())
            )

            def with_rows_split(x, weight):
                with pk.split_rows_over(("data",)):
                    return function(x, weight)

            return jax.value_and_grad(with_rows_split, argnums=(0, 1))(x, weight)

        expected = jax.value_and_grad(functools.partial(total, op), argnums=(0, 1))(x, weight)
        for actual, reference in zip(
            jax.tree.leaves(run(placed, on_auto_axes)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-5)


def test_mesh_without_the_axis():
    """Regression: a KeyError, and also without a mesh, where there is nothing to split."""
    x, weight = jnp.ones((4, 3, 32)), jnp.ones(32)
    with pk.split_rows_over(("data",)):
        np.testing.assert_array_equal(norm(x, weight), pk.rms_norm(x, weight, implementation="xla"))
    with pk.split_rows_over(("rows",)), pytest.raises(ValueError, match=r"mesh_axes has \['rows'\]; expected any of"):
        norm(on_mesh(AxisType.Auto, x, P("data")), weight)
