"""The kernels of all operations, compiled for this machine's GPU, against float32; skipped without a GPU.

Several processes may share the GPU, except for the tests marked "large", which run alone:

    XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/gpu -m "not large" -n 8
    pytest tests/gpu -m large

Those marked "small" run every kernel on little data, for compute-sanitizer (memcheck, then racecheck):

    compute-sanitizer --tool memcheck --target-processes all pytest tests/gpu -m small -n 8
"""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import check, shapes
from tests._support.ops import OPS, REAL


def has_gpu():
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fa4-jax calls deprecated functions of its compiler
]

LIGER = [
    (2, 128, 512),
    (5, 123, 123),
    (9, 7, 41),
    (1, 1, 1023),
    (2, 8, 64),
    (2, 131, 128),
    (3, 423, 92),
]  # the shapes of Liger-Kernel's tests
SHAPES = {name: [((7,), 80), ((33,), 100), ((1,), 29_568), *(((b, t), d) for b, t, d in LIGER)] for name in OPS}
SHAPES |= {"mrope": [((2, 131), 128)]}
SHAPES |= {name: [((2, 131), 128), ((3, 423), 92), ((1, 7), 80)] for name in ("rope", "qk_norm_rope")}
SMALL = ((7,), 80), ((2, 131), 128), ((3, 423), 92)


def small(*values):
    return pytest.param(*values, marks=pytest.mark.small)


CASES = [
    (small if shape in SMALL else pytest.param)(name, *shape)
    for name, op_shapes in SHAPES.items()
    for shape in op_shapes
]
FEWER_ROWS = {"cross_entropy": (16,)}  # drawing more logits on the host is slow
CASES += [
    pytest.param(name, FEWER_ROWS.get(name, rows if OPS[name].row_count == 2 else rows[-1:]), width)
    for name, rows, width in REAL
]


def root_mean_square(x):
    """Returns the root mean square of x, in float32."""
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))


def in_float32(arrays):
    """Returns the arrays with the floating ones in float32."""
    return [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]


def check_errors(results, repeated, xla, truth, name=""):
    """Asserts that `repeated` equals `results` bit for bit, and that their error is at most 1.5 times that of `xla`."""
    for result, again, reference, want in zip(results, repeated, xla, truth, strict=True):
        assert (result == again).all()
        error, allowed = (root_mean_square(x.astype(jnp.float32) - want) for x in (result, reference))
        assert error <= 1.5 * allowed + 2e-6 * float(jnp.max(jnp.abs(want), initial=0)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name, rows, width", CASES, ids=str)
def test_values_and_gradients_are_as_exact_as_xla(name, rows, width, dtype):
    """The error against float32 is at most 1.5 times that of XLA at this dtype, and a second run gives the same bits."""
    op = OPS[name]
    args = op.make(rows, width, dtype)
    run, xla = jax.jit(op.value_and_gradients("triton")), jax.jit(op.value_and_gradients("xla"))
    check_errors(run(*args), run(*args), xla(*args), xla(*in_float32(args)))


@pytest.mark.large
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "cross_entropy none"])
def test_last_rows_of_more_than_two_to_the_31_elements(name):
    """The last rows of an array of over 2^31 elements equal those rows computed alone, to one bfloat16 ulp."""
    op, width = OPS[name], 151_936 if name.startswith("cross") else 8192
    rows = 2**31 // width + 3
    has_rows = ["..." in axes for axes in op.axes]
    has_gradient = [len(axes) == 2 for axes in op.axes]
    args = [
        jnp.concatenate([jnp.broadcast_to(x[:1], (rows - 2, *x.shape[1:])), x]) if of_rows else x
        for of_rows, x in zip(has_rows, op.make((2,), width, "bfloat16"), strict=True)
    ]

    @jax.jit
    def run(*args):
        def kernel(*differentiated):
            remaining = iter(differentiated)
            all_args = [next(remaining) if has_grad else x for has_grad, x in zip(has_gradient, args, strict=True)]
            return op.run(*all_args, implementation="triton")

        out, pullback = jax.vjp(kernel, *(x for has_grad, x in zip(has_gradient, args, strict=True) if has_grad))
        return jax.tree.leaves((out, pullback(jax.tree.map(jnp.ones_like, out))))

    alone = run(*(x[-2:] if of_rows else x for of_rows, x in zip(has_rows, args, strict=True)))
    for whole, part in zip(run(*args), alone, strict=True):
        whole, part = (x.astype(jnp.float32) for x in (whole[-2:], part))
        assert float(jnp.max(jnp.abs(whole - part))) <= 2**-7 * float(jnp.max(jnp.abs(part)))


def large_problem(name, implementation, *, tokens=8192, heads=64, key_heads=8, dim=128, slots=66_000):
    """Returns a function, the operands of one problem, and an operand that all problems share, if there is one."""
    options = {"implementation": implementation}

    def with_gradients(function, count):
        def run(*args):
            out, pullback = jax.vjp(lambda *inputs: function(*inputs, *args[count:]), *args[:count])
            return out, pullback(out)

        return run

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, tokens, n, dim), "bfloat16")
        for key, n in zip(keys, (heads, key_heads, key_heads), strict=True)
    )
    angles = jax.random.normal(keys[0], (1, tokens, dim // 2))
    tables, weight = (jnp.cos(angles), jnp.sin(angles)), jnp.ones(dim, "bfloat16")
    if name == "causal attention":
        return with_gradients(functools.partial(pk.attention, causal=True, **options), 3), (q, k, v), ()
    if name == "attention over segments":
        ids = jnp.arange(tokens)[None] // (tokens // 3) + 1
        attend = with_gradients(lambda q, k, v, ids: pk.attention(q, k, v, segment_ids=ids, **options), 3)
        return attend, (q, k, v, ids), ()
    if name == "rope":
        return with_gradients(functools.partial(pk.rope, **options), 2), (q, k, *tables), ()
    if name == "qk_norm_rope":
        rotate = with_gradients(lambda q, k, *tables: pk.qk_norm_rope(q, k, weight, weight, *tables, **options), 2)
        return rotate, (q, k, *tables), ()

    def decode(*args):
        out, keys, values = pk.decode_attention(*args, **options)
        return out, keys[:, -2:], values[:, -2:]

    qkv = jax.random.normal(keys[0], (1, heads + 2 * key_heads, dim), "bfloat16")
    cache = jax.random.normal(keys[1], (1, slots, key_heads, dim), "bfloat16")
    row = qkv, *(table[:, 0] for table in tables), cache, cache[:, ::-1], jnp.ones((1, slots), jnp.int32)
    return decode, row, (jnp.int32(slots - 1),)


def check_last_of_many_problems(run, operands, shared, *, problems):
    """Asserts that the last of many equal problems in one call gives what it gives alone, to one bfloat16 ulp."""
    run = jax.jit(run)
    repeated = (jnp.broadcast_to(x, (problems, *x.shape[1:])) + jnp.zeros((), x.dtype) for x in operands)
    results = jax.tree.leaves(run(*repeated, *shared))
    for whole, alone in zip(results, jax.tree.leaves(run(*operands, *shared)), strict=True):
        whole, alone = (x.astype(jnp.float32) for x in (whole[-1:], alone))
        assert float(jnp.max(jnp.abs(whole - alone))) <= 2**-7 * float(jnp.max(jnp.abs(alone)))


@pytest.mark.large
@pytest.mark.parametrize(
    "name", ["causal attention", "attention over segments", "rope", "qk_norm_rope", "decode_attention"]
)
def test_last_of_the_rows_of_more_than_two_to_the_31_elements(name):
    """33 rows: of 8192 tokens and 64 heads of 128, or of a cache of 66,000 slots and 8 heads."""
    check_last_of_many_problems(*large_problem(name, "triton"), problems=33)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "text, has_norm",
    [
        small(shapes.TEXT["2b"], False),
        (shapes.TEXT["7b"], False),
        (shapes.QWEN2_5_VL["32b"], False),
        small(shapes.QWEN3_VL["2b"], True),
        (shapes.QWEN3_VL["8b"], True),
    ],
    ids=str,
)
def test_decoding_kernels_are_as_exact_as_xla(text, has_norm, dtype, rows):
    """At the models' shapes, the error is at most 1.5 times that of XLA, and a second run gives the same bits.

    With a norm of the query and key heads, the projection has no bias.
    """
    keys = iter(jax.random.split(jax.random.key(rows), 40))
    all_heads = text.heads + 2 * text.kv_heads

    def normal(*shape, scale=1.0, dtype=dtype):
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    def weight(*shape):
        return normal(*shape, scale=shape[-1] ** -0.5)

    x, norm, residual = normal(rows, text.hidden), normal(text.hidden), normal(rows, text.hidden)
    angles = [normal(rows, text.head_dim // 2, dtype="float32") for _ in range(2)]
    caches = [normal(rows, 300, text.kv_heads, text.head_dim) for _ in range(2)]
    valid = (jax.random.uniform(next(keys), (rows, 300)) < 0.9).astype(jnp.int32)
    bias = () if has_norm else (normal(all_heads * text.head_dim),)
    head_norms = [1 + normal(text.head_dim, scale=0.2) for _ in range(2 * has_norm)]
    calls = {
        pk.norm_linear: (x, norm, weight(all_heads * text.head_dim, text.hidden), *bias),
        pk.norm_swiglu: (x, norm, weight(2, text.intermediate, text.hidden)),
        pk.linear_add: (normal(rows, text.intermediate), weight(text.hidden, text.intermediate), residual),
        pk.decode_attention: (
            *(normal(rows, all_heads, text.head_dim), *angles, *caches, valid, jnp.int32(277)),
            *head_norms,
        ),
    }
    for function, args in calls.items():
        kernel, xla = (jax.jit(functools.partial(function, implementation=name)) for name in ("triton", "xla"))
        calls_of_operation = (kernel, args), (kernel, args), (xla, args), (xla, in_float32(args))
        check_errors(*(jax.tree.leaves(run(*arrays)) for run, arrays in calls_of_operation), function.__name__)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "heads, key_heads, dim, causal, lengths",
    [
        (16, 16, 80, False, [1500, 300, 1]),
        (12, 2, 128, True, [1000, 900]),
        (28, 4, 128, True, []),
        small(6, 3, 100, False, []),
        small(2, 1, 64, True, [2000]),
    ],
)
def test_attention_is_as_exact_as_xla(heads, key_heads, dim, causal, lengths, dtype):
    """Packed or not, the error is at most 1.5 times that of XLA, and a second run gives the same bits."""
    keys = jax.random.split(jax.random.key(dim), 4)
    q, k, v, grad = (
        jax.random.normal(key, (2, 2001, n, dim)).astype(dtype)
        for key, n in zip(keys, (heads, key_heads, key_heads, heads), strict=True)
    )
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids = np.broadcast_to(np.pad(ids, (0, 2001 - len(ids))), (2, 2001)) if lengths else None

    def run(implementation):
        def value_and_gradients(q, k, v, grad):
            f = functools.partial(pk.attention, causal=causal, segment_ids=ids, implementation=implementation)
            out, pullback = jax.vjp(f, q, k, v)
            return out, *pullback(grad)

        return jax.jit(value_and_gradients)

    args = q, k, v, grad
    with jax.default_matmul_precision("highest"):
        truth = run("xla")(*(x.astype(jnp.float32) for x in args))
    check_errors(run("triton")(*args), run("triton")(*args), run("xla")(*args), truth)


@pytest.mark.parametrize("dim", [64, small(72), small(80)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_attention_in_windows_is_as_exact_as_xla(dim, dtype):
    """Blocks of 64 patches that hold a whole window, several small ones with padding after them, or nothing."""
    args = [jax.random.normal(key, (32, 64, 16, dim)).astype(dtype) for key in jax.random.split(jax.random.key(dim), 4)]
    ids = np.tile(np.arange(1, 33, dtype=np.int32)[:, None], (1, 64))
    ids[3] = np.repeat([3, 4, 5, 0], [32, 16, 4, 12])
    ids[4, 16:], ids[5] = 0, 0
    check_attention("triton", args, [ids], causal=False)


@pytest.mark.parametrize("heads, key_heads", [small(16, 8), (32, 8), small(40, 8), (64, 8), (16, 2)])
def test_causal_attention_at_each_group_size_is_as_exact_as_xla(heads, key_heads):
    """The numbers of query heads per key head of the models: 2, 4, 5 and 8."""
    keys = jax.random.split(jax.random.key(heads), 4)
    args = [
        jax.random.normal(key, (1, 1100, n, 128)).astype("bfloat16")
        for key, n in zip(keys, (heads, key_heads, key_heads, heads), strict=True)
    ]
    ids = np.repeat([1, 2, 0], [700, 300, 100]).astype(np.int32)[None]
    check_attention("triton", args, [ids], causal=True)


def test_attention_over_segments_with_gaps_is_as_exact_as_xla():
    """Frames whose windows leave padding between them, as None picks the kernels for them."""
    args = [
        jax.random.normal(key, (2, 1024, 16, 80)).astype("bfloat16") for key in jax.random.split(jax.random.key(0), 4)
    ]
    ids = np.repeat([1, 2, 3, 0], [300, 300, 300, 124]).astype(np.int32)
    ids[[*range(100, 112), *range(400, 444), *range(700, 704)]] = 0
    check_attention(None, args, [np.stack([ids, np.roll(ids, 5)])] * 2, causal=False)


SHAPES_WITH_KEY_IDS = [small(12, 2, 128, True, 200, 900), small(16, 16, 80, False, 300, 500)]


@pytest.mark.parametrize("implementation", ["triton", "fa4"])
@pytest.mark.parametrize("heads, key_heads, dim, causal, tokens, sources", SHAPES_WITH_KEY_IDS)
def test_attention_with_segment_ids_of_keys_is_as_exact_as_xla(
    heads, key_heads, dim, causal, tokens, sources, implementation
):
    """A chat's next turn after a cache with gaps, and other numbers of keys than queries."""
    skip_without_fa4(implementation)
    keys = jax.random.split(jax.random.key(dim), 4)
    args = [
        jax.random.normal(key, (2, length, n, dim)).astype("bfloat16")
        for key, length, n in zip(
            keys, (tokens, sources, sources, tokens), (heads, key_heads, key_heads, heads), strict=True
        )
    ]
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 3, (2, length // 10)).repeat(10, axis=1).astype(np.int32) for length in (tokens, sources)]
    check_attention(implementation, args, ids, causal=causal)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize(
    "heads, key_heads, dim, causal",
    [(16, 16, 64, False), (16, 16, 72, False), (16, 16, 80, False), (12, 2, 128, True), (28, 4, 128, True)],
)
def test_fa4_is_as_exact_as_xla(heads, key_heads, dim, causal, packed, dtype):
    """Packed rows have padding before, between and after segments, and a row without any."""
    skip_without_fa4("fa4")
    keys = jax.random.split(jax.random.key(dim), 4)
    args = [
        jax.random.normal(key, (4, 1100, n, dim)).astype(dtype)
        for key, n in zip(keys, (heads, key_heads, key_heads, heads), strict=True)
    ]
    ids = np.zeros((4, 1100), np.int32)
    ids[0, :700], ids[0, 700:1000], ids[0, 1005:1045] = 1, 2, 3
    ids[1, 13:1013], ids[1, 1099:] = 1, 2
    ids[3] = 1
    check_attention("fa4", args, [ids] if packed else [], causal=causal, max_segments=4 if packed else None)


@pytest.mark.parametrize("max_segments", [None, 4])
@pytest.mark.parametrize("dim, causal", [(64, False), (80, False), (128, True)])
def test_fa4_ignores_large_values_in_padding(dim, causal, max_segments):
    """Regression: without max_segments, the product of a gradient and a value, both in padding or one, became infinite."""
    skip_without_fa4("fa4")
    ids = np.ones((2, 640), np.int32)
    ids[0, 200:300], ids[0, 300:], ids[1, 500:] = 0, 2, 0
    args = [
        jnp.where((ids == 0)[:, :, None, None], 3e38, jax.random.normal(key, (2, 640, 4, dim), jnp.bfloat16))
        for key in jax.random.split(jax.random.key(dim), 4)
    ]
    check_attention("fa4", args, [ids], causal=causal, max_segments=max_segments)


def test_fa4_reads_slices_of_a_scan():
    """XLA fused the slices into the call and lost the zeros that the backward kernel accumulates to."""
    skip_without_fa4("fa4")
    keys = jax.random.split(jax.random.key(0), 4)
    shapes_of_layers = [(3, 2, 512, n, 128) for n in (8, 2, 2, 8)]
    args = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes_of_layers, strict=True)]

    def run(implementation, args):
        @jax.jit
        def value_and_gradients(q, k, v, grad):
            def attend(q, k, v):
                options = {"segment_ids": jnp.ones((2, 512), jnp.int32), "max_segments": 2, "causal": True}
                return jax.lax.scan(
                    lambda carry, x: (carry, pk.attention(*x, implementation=implementation, **options)), 0, (q, k, v)
                )[1]

            out, pullback = jax.vjp(attend, q, k, v)
            return out, *pullback(grad)

        return value_and_gradients(*args)

    for result, want in zip(run("fa4", args), run("xla", in_float32(args)), strict=True):
        assert root_mean_square(result.astype(jnp.float32) - want) <= 0.01 * root_mean_square(want)


@pytest.mark.parametrize("causal", [False, True])
def test_fa4_is_picked_without_segments(causal):
    """None compiles a switch between platforms, whose branches have to return the same structure."""
    skip_without_fa4("fa4")
    keys = jax.random.split(jax.random.key(1), 4)
    args = [jax.random.normal(key, (1, 256, 4, 64), jnp.bfloat16) for key in keys]
    check_attention(None, args, [], causal=causal)


def test_later_processes_load_fa4s_kernels(tmp_path):
    """They generate no code, and attention has the same values."""
    skip_without_fa4("fa4")
    program = textwrap.dedent("""
        import sys
        import jax, jax.numpy as jnp
        import pallas_kernels as pk

        pk.cache_kernels(sys.argv[1])
        q, k, v = (jax.random.normal(jax.random.key(n), (2, 256, n, 80), jnp.bfloat16) for n in (4, 2, 2))
        ids = {"segment_ids": jnp.ones((2, 256), jnp.int32), "max_segments": 2}
        attend = lambda *args: pk.attention(*args, implementation="fa4", **ids)
        if "later" in sys.argv:
            pk._fa4.import_problem()
            import cutejax
            cutejax.compiler.compile_tvm_ffi = None
        print(*jax.device_get(attend(q, k, v)).astype(float).ravel()[::997])
        jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)[0].block_until_ready()
    """)
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    first, later = (
        subprocess.run(
            [sys.executable, "-c", program, tmp_path, *arguments], env=environment, capture_output=True, text=True
        )
        for arguments in ([], ["later"])
    )
    assert later.returncode == 0, later.stderr
    assert first.stdout == later.stdout != ""


def skip_without_fa4(implementation):
    if implementation == "fa4":
        pytest.importorskip("fa4_jax")
        if float(jax.devices()[0].compute_capability) < 9:
            pytest.skip("needs a Hopper GPU")


def check_attention(implementation, args, ids, *, causal, max_segments=None):
    """Asserts that the errors are at most 1.5 times those of XLA, and that all results are zero in padding.

    The reference is float64, in which XLA's float32 has an error, too. A rounding error of float32 is allowed as well.
    """
    named = dict(zip(("segment_ids", "kv_segment_ids"), ids, strict=False))

    def run(implementation, args, **options):
        @jax.jit
        def value_and_gradients(q, k, v, grad):
            f = functools.partial(pk.attention, causal=causal, implementation=implementation, **named, **options)
            out, pullback = jax.vjp(f, q, k, v)
            return out, *pullback(grad)

        return value_and_gradients(*args)

    with jax.enable_x64(True):
        truth = run("xla", [np.asarray(x, np.float64) for x in args])
        assert {x.dtype for x in truth} == {np.dtype("float64")}
    results, xla = run(implementation, args, max_segments=max_segments), run("xla", args)
    for result, reference, want in zip(results, xla, map(np.asarray, truth), strict=True):
        error, allowed = (np.sqrt(np.mean((np.asarray(x, np.float64) - want) ** 2)) for x in (result, reference))
        assert error <= 1.5 * allowed + np.finfo(np.float32).eps * np.sqrt(np.mean(want**2))
    if ids:
        for x, ids_of_x in zip(results, (ids[0], ids[0], ids[-1], ids[-1]), strict=True):
            assert not jnp.where((ids_of_x == 0)[:, :, None, None], x, 0).any()


@pytest.mark.parametrize("counted", [0, 1, 511, 512, small(513), 3000, 4096])
def test_linear_cross_entropy_with_ignored_rows(counted):
    """For any number of counted rows, from none to several chunks, loss and gradients equal those of the full logits."""
    rng = np.random.default_rng(counted)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4096, 256), (4099, 256)))
    labels = np.full(4096, -100)
    labels[rng.permutation(4096)[:counted]] = rng.integers(0, 4099, counted)

    def fused(x, weight):
        return pk.linear_cross_entropy(x, 0.1 * weight, jnp.asarray(labels), chunk_rows=2048, implementation="triton")

    def plain(x, weight):
        logits = x.astype(jnp.float32) @ (0.1 * weight).astype(jnp.float32).T
        return pk.cross_entropy(logits, jnp.asarray(labels), implementation="xla")

    got, want = (jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, weight) for loss in (fused, plain))
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(expected))), 1e-6)
        assert float(jnp.max(jnp.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32)))) <= 0.02 * scale


def test_weight_gradient_does_not_lose_precision_over_chunks():
    """At V = 151936, the bfloat16 gradient of the weight has the same error over many chunks as in one."""
    hidden, vocab = 64, shapes.TEXT["2b"].vocab
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = (
        jax.random.normal(key, (n, hidden), jnp.bfloat16) for key, n in zip(keys[:2], (2048, vocab), strict=True)
    )
    labels = jax.random.randint(keys[2], (2048,), 0, vocab)

    def gradient(chunk, dtype):
        loss = functools.partial(pk.linear_cross_entropy, chunk_rows=chunk, reduction="sum")
        return jax.jit(jax.grad(lambda w: loss(x.astype(dtype), w, labels)))(weight.astype(dtype)).astype(jnp.float32)

    truth, many, one = gradient(2048, "float32"), gradient(128, "bfloat16"), gradient(2048, "bfloat16")
    assert root_mean_square(many - truth) <= 1.1 * root_mean_square(one - truth)


def test_check_of_this_device_passes(capsys):
    """`liger-jax env --check` runs every kernel of every operation, and finds each to agree with XLA."""
    status = check.main()
    assert status == 0, capsys.readouterr().out
