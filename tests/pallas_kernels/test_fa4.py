"""FlashAttention-4: how `attention` calls it and when it picks it.

The values are checked through fa4-jax's reference backend, where the package is installed; tests/gpu checks the kernels.
"""

import functools
import importlib
import sys
import tomllib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _fa4
from tests._support.attention import SEGMENTS, assert_close, collectives, data, gradients, reference
from tests._support.lowered import count_calls

module = importlib.import_module("pallas_kernels.attention")
needs_fa4 = pytest.mark.skipif(importlib.util.find_spec("fa4_jax") is None, reason="fa4-jax is not installed")


@pytest.fixture
def hopper(monkeypatch):
    """Pretends that this machine has a Hopper GPU and a working fa4-jax, and runs its reference backend in float32."""
    monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(_fa4, "import_problem", lambda: None)
    monkeypatch.setattr(_fa4, "BACKEND", "reference")
    monkeypatch.setattr(_fa4, "DTYPES", (*_fa4.DTYPES, jnp.float32))


fa4 = functools.partial(pk.attention, implementation="fa4")


@needs_fa4
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("max_segments", [None, 3, 5], ids=lambda slots: f"{slots} slots")
def test_segments_match_numpy(max_segments, causal, hopper):
    """Padding before, between and after segments; rows without segments; with slots, some unused, and without."""
    ids = np.concatenate([SEGMENTS, [[3, 3, 0, 0, 2, 2, 0, 1, 0]]])
    args = data(batch=5)
    got = gradients(fa4, causal=causal, max_segments=max_segments)(*args, ids)
    assert_close(got, reference(*args, ids, causal=causal))
    padding = (ids == 0)[:, :, None, None]
    assert not any(np.where(padding, x, 0).any() for x in got)


@needs_fa4
def test_whole_rows_and_segments_of_keys_match_numpy(hopper):
    """Without segments, with more keys than queries, and with segment ids of the keys."""
    for sizes, options in (({}, {"causal": True}), ({"tokens": 4}, {"causal": True}), ({"tokens": 4}, {})):
        args = data(**sizes)
        assert_close(gradients(fa4, **options)(*args), reference(*args, **options))
        tokens = args[0].shape[1]
        ids = SEGMENTS[:, 9 - tokens :], SEGMENTS
        assert_close(gradients(fa4, **options)(*args, *ids), reference(*args, *ids, **options))


@needs_fa4
def test_one_program_serves_every_packing(hopper):
    """Two packings of the same shape compile once."""
    args = data()
    run = gradients(fa4, max_segments=4)
    for ids in (SEGMENTS, SEGMENTS[::-1]):
        assert_close(run(*args, ids), reference(*args, ids))
    assert run._cache_size() == 1


@needs_fa4
def test_segments_without_a_slot_become_nan(hopper):
    q, k, v, _ = data()
    out = pk.attention(q, k, v, segment_ids=SEGMENTS, max_segments=2, implementation="fa4")
    np.testing.assert_array_equal(np.isnan(out).any(axis=(2, 3)), SEGMENTS > 2)


@needs_fa4
def test_vmap_scan_and_remat_change_no_value(hopper):
    """Also, a rematerialized scan saves the output and the statistics, so that the forward kernel runs once."""
    args = data()
    for got, want in zip(jax.vmap(gradients(fa4))(*(np.stack([x, x]) for x in args)), reference(*args), strict=True):
        assert_close(got, [want, want])

    def layer(x, _):
        ids = jnp.asarray(SEGMENTS)
        return x + fa4(x, x[:, :, :2], x[:, :, 2:], causal=True, segment_ids=ids, max_segments=4), None

    def loss(layer, x):
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, None, length=2)[0]))

    saved = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    plain, remat = (jax.jit(jax.grad(functools.partial(loss, f))) for f in (layer, saved))
    assert_close([remat(args[0])], [plain(args[0])])
    nothing = jax.grad(functools.partial(loss, jax.checkpoint(layer)))
    assert [count_calls("fa4_fwd", run, args[0]) for run in (plain, remat, nothing)] == [2, 2, 4]


@needs_fa4
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_batch_and_heads_need_no_collective(kind, hopper):
    """On a mesh, each device attends to its own rows and heads; also inside a shard_map."""
    args = data()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    with jax.set_mesh(mesh):
        heads, rows = NamedSharding(mesh, P("data", None, "tensor")), NamedSharding(mesh, P("data"))
        placed = jax.device_put((*args, SEGMENTS), (*[heads] * 4, rows))
        run = gradients(fa4, causal=True, max_segments=4)
        compiled = run.lower(*placed).compile()
        assert_close(compiled(*placed), reference(*args, SEGMENTS, causal=True))
        assert not collectives(compiled)
        local = jax.shard_map(
            lambda *args: run(*args),
            in_specs=(*[P("data", None, "tensor")] * 4, P("data")),
            out_specs=(P("data", None, "tensor"),) * 4,
        )
        assert_close(jax.jit(local)(*placed), reference(*args, SEGMENTS, causal=True))


@needs_fa4
@pytest.mark.parametrize("implementation", ["fa4", None])
@pytest.mark.parametrize(
    "num_ids, options",
    [(0, {}), (1, {}), (1, {"max_segments": 4}), (2, {})],
    ids=["whole rows", "ids", "slots", "ids of keys"],
)
def test_in_a_checked_shard_map(num_ids, options, implementation, hopper, monkeypatch):
    """Regression: results of fa4-jax's primitives lost the mesh axes that they vary over, unlike those of XLA's branch."""
    monkeypatch.setattr(_fa4, "preferred", lambda q, kv_segmented: True)
    args, ids = data(), (SEGMENTS,) * num_ids
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    rows, heads = P("data"), P("data", None, "tensor")
    attend = functools.partial(pk.attention, causal=True, implementation=implementation, **options)
    local = jax.shard_map(
        gradients(attend), mesh=mesh, in_specs=(*[heads] * 4, *[rows] * num_ids), out_specs=(heads,) * 4
    )
    assert_close(jax.jit(local)(*args, *ids), reference(*args, *ids, causal=True))


def test_slots_reach_to_the_next_start():
    """Padding belongs to the slot before it, which does not use it; unused slots are empty."""
    segments = pk.find_segments(jnp.array([[0, 1, 1, 0, 2], [0] * 5, [1, 2, 2, 0, 0]]), 3)
    offsets, used = _fa4.slot_offsets(segments, 5)
    assert offsets.tolist() == [1, 4, 5, 10, 10, 10, 10, 11, 15, 15]
    assert used.tolist() == [2, 1, 0, 0, 0, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "tokens, options, capability, problem, backend",
    [
        (256, {}, 9.0, None, "fa4"),
        (256, {}, 10.0, None, "fa4"),
        (64, {}, 9.0, None, "cudnn"),
        (256, {}, 9.0, "not installed", "cudnn"),
        (256, {}, 8.0, None, "cudnn"),
        (256, {"dim": 100}, 9.0, None, "pallas"),
        (256, {"dtype": jnp.float32}, 9.0, None, "xla"),
        (1, {}, 9.0, None, "xla"),
        (256, {"key_ids": True}, 9.0, None, "pallas"),
    ],
)
def test_none_picks_fa4_where_it_is_faster(tokens, options, capability, problem, backend, monkeypatch):
    """From 128 queries on, on Hopper and newer, with the package, and without segment ids of the keys."""
    monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda: capability)
    monkeypatch.setattr(_fa4, "import_problem", lambda: problem)
    picked = []
    monkeypatch.setattr(module, "_OPERATION", lambda static, q, *_: picked.append(static.backend) or (q,))
    sizes = {"dtype": jnp.bfloat16} | {name: value for name, value in options.items() if name != "key_ids"}
    q, k, v, _ = (jnp.zeros_like(x) for x in data(tokens=tokens, **sizes))
    ids = (jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))
    pk.attention(
        q, k, v, **dict(zip(("segment_ids", "kv_segment_ids"), ids, strict=True)) if "key_ids" in options else {}
    )
    assert picked == [backend]


@pytest.fixture
def fresh_import(monkeypatch):
    """Forgets whether fa4-jax can be imported on this machine, which has a Hopper GPU, before and after a test."""
    monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda: 9.0)
    _fa4.import_problem.cache_clear()
    yield
    _fa4.import_problem.cache_clear()


def test_missing_package_is_named(fresh_import, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"'fa4' does not support this call: .*pip install liger-jax\[fa4\]"):
        fa4(*data(dtype=jnp.bfloat16, tokens=256, sources=256)[:3])


@pytest.mark.parametrize(
    "version, missing, reason",
    [
        ("0.1.0", "fa4_jax.kernels", "fa4_jax.kernels"),
        ("0.1.7", "fa4_vjp_p", "cannot import name 'fa4_vjp_p'"),
        ("0.1.7", "MaskMod", "cannot import name 'MaskMod'"),
        ("0.10.0", None, "its version is 0.10.0; expected 0.1"),
        ("0.2.0", None, "its version is 0.2.0; expected 0.1"),
        ("0.1", None, None),
    ],
)
def test_package_that_cannot_be_used(fresh_import, monkeypatch, version, missing, reason):
    """It warns once, and is not picked. By name, "fa4" raises with the reason.

    Regression: a version without the names that `attention` imports from it raised ImportError while a program was traced.
    """
    names = {
        "fa4_jax": {"__version__": version, "MaskMod": object},
        "fa4_jax.attention": dict.fromkeys(("AttnConfig", "fa4_fwd_p", "fa4_vjp_p")),
        "fa4_jax.kernels": {},
    }
    for name, values in names.items():
        package = types.ModuleType(name)
        vars(package).update({key: value for key, value in values.items() if key != missing})
        monkeypatch.setitem(sys.modules, name, None if name == missing else package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if reason is None:
        assert _fa4.import_problem() is None
        return
    q, k, v, _ = data(dtype=jnp.bfloat16, tokens=256, sources=256)
    with pytest.warns(UserWarning, match=f"fa4-jax is installed and cannot be used .*{reason}") as warned:
        pk.attention(q, k, v)
    pk.attention(q, k, v)
    assert len(warned) == 1
    with pytest.raises(NotImplementedError, match=f"fa4-jax cannot be used .*{reason}"):
        fa4(q, k, v)


def test_version_is_the_one_that_is_installed():
    optional = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (requirement,) = optional["fa4"]
    assert requirement.startswith(f"fa4-jax[cu13]>={_fa4.VERSION},<0.2;")


def test_call_unsupported_by_fa4_raises(monkeypatch):
    monkeypatch.setattr(_fa4, "import_problem", lambda: None)
    cases = ((jnp.float32, 64, 9.0, "q has dtype float32"), (jnp.bfloat16, 136, 9.0, "D is 136"))
    for dtype, dim, capability, reason in (*cases, (jnp.bfloat16, 64, 8.0, "compute capability 8.0")):
        monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda capability=capability: capability)
        with pytest.raises(NotImplementedError, match=reason):
            fa4(*data(dtype=dtype, dim=dim)[:3])
