"""The contract of all operations: names, formulas, examples, errors raised before any compute, and transformations."""

import doctest
import importlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.registry import OPERATIONS
from tests._support.ops import close


def random(*shape, dtype="float32"):
    return np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))


x, vector, half = random(2, 8), random(8), random(2, 8, dtype="bfloat16")
q, k, angles, three = random(1, 3, 4, 8), random(1, 3, 2, 8), random(1, 3, 4), random(3, 1, 3, 4)
qkv, cache, ones = random(1, 8, 8), random(1, 6, 2, 8), np.ones((1, 6), int)
square = random(8, 8)
labels, head = np.zeros(2, int), random(5, 8)


def function_and_arguments(name):
    """Returns the function of an operation, and small arguments for it."""
    return OPERATIONS[name].function, [np.asarray(x) for x in OPERATIONS[name].example()]


def test_package_exports_the_contract():
    """The package exports one name per row of the registry, those for segments shared by calls, and two settings."""
    assert sorted(pk.__all__) == sorted([*OPERATIONS, "Segments", "cache_kernels", "find_segments", "split_rows_over"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_function_equals_formula(name):
    """Each operation, with each of its variants, computes the formula of its row in the registry."""
    operation = OPERATIONS[name]
    args = operation.example()
    for options in ({}, *operation.variants.values()):
        close(operation.function(*args, **options), operation.formula(*args, **options))


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(pk.__path__) if not m.name.startswith("_")])
def test_docstring_examples_run(name):
    """The examples in the docstrings run and print the documented results."""
    assert doctest.testmod(importlib.import_module(f"pallas_kernels.{name}")).failed == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_unknown_implementation_raises(name):
    """The implementations "xla" and "interpret" run; an unknown implementation raises and lists the known ones."""
    function, args = function_and_arguments(name)
    jax.eval_shape(lambda: function(*args, implementation="xla"))
    with pytest.raises(ValueError, match=f"{name}: implementation is 'cuda'"):
        function(*args, implementation="cuda")
    jax.eval_shape(lambda: function(*args, implementation="interpret"))


WRONG = {
    "weight has shape": lambda: pk.rms_norm(x, np.ones(7)),
    "casting is 'cast'": lambda: pk.rms_norm(x, vector, casting="cast"),
    "x has dtype int32": lambda: pk.rms_norm(x.astype(np.int32), vector),
    "65537 columns": lambda: pk.rms_norm(np.ones((1, 65_537)), np.ones(65_537), implementation="interpret"),
    "residual has shape": lambda: pk.add_rms_norm(x, x[:1], vector),
    "x float32, residual bfloat16": lambda: pk.add_rms_norm(x, half, vector),
    "bias has shape": lambda: pk.layer_norm(x, vector, np.ones(7)),
    "up has shape": lambda: pk.swiglu(x, x[:1]),
    "cos has shape": lambda: pk.rope(q, k, angles[:, :2], angles),
    "even D": lambda: pk.rope(q[..., :7], k[..., :7], angles, angles),
    "sections is": lambda: pk.mrope(q, k, three, three, (2, 2, 2)),
    "k_weight has shape": lambda: pk.qk_norm_rope(q, k, vector, vector[:7], angles, angles),
    "q float32, k bfloat16": lambda: pk.qk_norm_rope(q, k.astype(jnp.bfloat16), vector, vector, angles, angles),
    "labels has shape": lambda: pk.cross_entropy(x, labels[:1]),
    "labels has dtype": lambda: pk.cross_entropy(x, labels * 1.0),
    "label_smoothing is 2": lambda: pk.cross_entropy(x, labels, label_smoothing=2),
    "softcap is 0": lambda: pk.cross_entropy(x, labels, softcap=0),
    "z_loss is -1": lambda: pk.cross_entropy(x, labels, z_loss=-1),
    "reduction is 'max'": lambda: pk.cross_entropy(x, labels, reduction="max"),
    "normalizer is given": lambda: pk.cross_entropy(x, labels, reduction="sum", normalizer=2),
    "class_weights has shape": lambda: pk.cross_entropy(x, labels, class_weights=np.ones(7)),
    "token_weights has shape": lambda: pk.cross_entropy(x, labels, token_weights=np.ones(7)),
    "weight has shape (5, 7)": lambda: pk.linear_cross_entropy(x, head[:, :7], labels),
    "chunk_rows is 0": lambda: pk.linear_cross_entropy(x, head, labels, chunk_rows=0),
    "x float32, weight bfloat16": lambda: pk.linear_cross_entropy(x, head.astype(jnp.bfloat16), labels),
    "k has 3": lambda: pk.attention(q, q[:, :, :3], q[:, :, :3]),
    "v has shape": lambda: pk.attention(q, k, k[:, :2]),
    "kv_segment_ids without": lambda: pk.attention(q, k, k, kv_segment_ids=np.ones((1, 3), int)),
    "segment_ids has shape": lambda: pk.attention(q, k, k, segment_ids=np.ones((1, 2), int)),
    "weight has shape (8, 7)": lambda: pk.norm_linear(x, vector, square[:, :7]),
    "expected [B, H] and [2, F, H]": lambda: pk.norm_swiglu(x, vector, square),
    "norm_weight has shape": lambda: pk.norm_linear(x, vector[:7], square),
    "residual has shape (1, 8)": lambda: pk.linear_add(x, square, x[:1]),
    "x has 65 rows": lambda: pk.linear_add(random(65, 8), square, random(65, 8), implementation="interpret"),
    "keys has 4; expected N + 2 K": lambda: pk.decode_attention(
        qkv, *[angles[:, 0]] * 2, *[random(1, 6, 4, 8)] * 2, ones, 3
    ),
    "slot has dtype float32; expected an integer": lambda: pk.decode_attention(
        qkv, *[angles[:, 0]] * 2, cache, cache, ones, 3.7
    ),
    "valid has shape": lambda: pk.decode_attention(qkv, *[angles[:, 0]] * 2, cache, cache, ones[:, :5], 3),
    "keys has shape (1, 0, 2, 8)": lambda: pk.decode_attention(
        qkv, *[angles[:, 0]] * 2, *[random(1, 0, 2, 8)] * 2, ones[:, :0], 0
    ),
    "norm_linear: x has 65537 columns": lambda: pk.norm_linear(
        np.ones((2, 65_537)), np.ones(65_537), np.ones((1, 65_537)), implementation="interpret"
    ),
    "q_weight is given alone": lambda: pk.decode_attention(
        qkv, *[angles[:, 0]] * 2, cache, cache, ones, 3, q_weight=vector
    ),
    "max_segments is 0": lambda: pk.attention(q, k, k, segment_ids=np.ones((1, 3), int), max_segments=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_raises(message):
    """The ValueError names the argument, its value or shape, and the expected one."""
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()


@pytest.mark.parametrize("name", OPERATIONS)
def test_list_in_place_of_an_array_raises(name):
    """A list as the first argument raises a TypeError that names the argument."""
    function, (first, *arguments) = function_and_arguments(name)
    with pytest.raises(TypeError, match=f"{name}: .* is a list; expected an array"):
        function(first.tolist(), *arguments)


@pytest.mark.parametrize("name", ["decode_attention", "norm_linear", "norm_swiglu", "linear_add"])
def test_decoding_operation_has_no_gradient(name):
    """Differentiating an operation for decoding raises, for every implementation."""
    function, (first, *arguments) = function_and_arguments(name)
    for implementation in (None, "xla", "interpret"):
        with pytest.raises(NotImplementedError, match=f"{name}: there is no gradient"):
            jax.grad(lambda x: jnp.sum(jax.tree.leaves(function(x, *arguments, implementation=implementation))[0]))(
                first
            )


@pytest.mark.parametrize(
    "name", ["layer_norm", "add_rms_norm", "rope", "mrope", "qk_norm_rope", "swiglu", "quick_gelu"]
)
def test_vmap_and_remat_change_nothing(name):
    """vmap over a leading axis and rematerialization change no value and no gradient."""
    function, (first, *arguments) = function_and_arguments(name)

    def loss(scale, first):
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(function(first * scale, *arguments)))

    @jax.jit
    def run(scales, first):
        separate = [jax.value_and_grad(loss, argnums=(0, 1))(scale, first) for scale in scales]
        batched = jax.vmap(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)), in_axes=(0, None))(scales, first)
        return jax.tree.map(lambda *each: jnp.stack(each), *separate), batched

    want, got = run(np.array([1.0, 2.0], np.float32), first)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-4)
