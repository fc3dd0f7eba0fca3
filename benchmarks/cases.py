"""The cases of `liger-jax bench ops`: an operation, its inputs at a model's shapes, and its formula in plain JAX.

Nothing here uses a device, so that the process of the peers can read the same table.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import shapes

EPS = 1e-6
IMAGES = (4096, 2664, 2304, 1600, 1296, 1024, 1024, 784, 576, 484, 340, 192)  # patches of each; 16384 together


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normally distributed numbers, rounded to bfloat16."""

    shape: tuple[int, ...]
    mean: float = 0.0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size. An implementation is called as f(**arrays, **constants, **options)."""

    op: str
    size: str  # how the tables call it
    arrays: dict[str, Normal]  # inputs that have a gradient
    make_constants: Callable[[np.random.Generator], dict[str, np.ndarray]] = lambda rng: {}
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()  # implementations that cannot compute this, or not within the memory
    in_turns: bool = False  # of generation: no gradient, and timed on inputs that no cache holds

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def constants(self) -> dict[str, np.ndarray]:
        """Inputs without a gradient: labels, segments, tables of angles."""
        return self.make_constants(np.random.default_rng(self.seed))

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in self.arrays.items()}


# ---- formulas, as a training script without fused operations has them -------------------------------------------------


def rms_norm(x, weight):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(x.dtype) * weight


def add_rms_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x, weight, bias):
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPS)
    return (normed * weight + bias).astype(x.dtype)


def rope(q, k, cos, sin):
    def rotated(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)

    return rotated(q), rotated(k)


def mrope(q, k, cos, sin, sections):
    ends = np.cumsum(sections)[:-1]

    def chosen(tables):
        return jnp.concatenate([part[i] for i, part in enumerate(jnp.split(tables, ends, axis=-1))], axis=-1)

    return rope(q, k, chosen(cos), chosen(sin))


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def geglu(gate, up):
    return jax.nn.gelu(gate, approximate=True) * up


def quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def cross_entropy(logits, labels):
    logits, counts = logits.astype(jnp.float32), labels >= 0
    of_label = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[:, None], axis=-1)[:, 0]
    losses = jnp.where(counts, jax.nn.logsumexp(logits, axis=-1) - of_label, 0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1)


def linear_cross_entropy(x, weight, labels):
    return cross_entropy(jnp.einsum("nh,vh->nv", x, weight, preferred_element_type=jnp.float32), labels)


def linear_cross_entropy_in_chunks(x, weight, labels, rows=4096):
    """The same sum, `rows` rows after another, computed again in the backward pass: float32 fits at every size."""

    def share(chunk):
        x, labels = chunk
        return linear_cross_entropy(x, weight, labels) * jnp.sum(labels >= 0)

    chunks = [a.reshape(-1, min(rows, len(a)), *a.shape[1:]) for a in (x, labels)]
    return jnp.sum(jax.lax.map(jax.checkpoint(share), chunks)) / jnp.maximum(jnp.sum(labels >= 0), 1)


def attention(q, k, v, *, causal=False, segment_ids=None, **_):
    """One row and key head after another: only their scores are in memory."""
    (batch, tokens, _, dim), kv_heads = q.shape, k.shape[2]
    ids = jnp.ones((batch, tokens), jnp.int32) if segment_ids is None else segment_ids
    order = jnp.arange(tokens)

    def head(operands):
        q, k, v, ids = operands  # [G, T, D], [T, D], [T, D], [T]
        seen = (ids[:, None] == ids) & (~jnp.bool(causal) | (order[:, None] >= order))
        scores = jnp.einsum("gtd,sd->gts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("gts,sd->gtd", weights.astype(v.dtype), v)

    queries = (
        q.reshape(batch, tokens, kv_heads, -1, dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(-1, q.shape[2] // kv_heads, tokens, dim)
    )
    keys, values = (a.transpose(0, 2, 1, 3).reshape(-1, tokens, dim) for a in (k, v))
    out = jax.lax.map(jax.checkpoint(head), (queries, keys, values, jnp.repeat(ids, kv_heads, axis=0)))
    return out.reshape(batch, -1, tokens, dim).transpose(0, 2, 1, 3)


def norm_linear(x, norm_weight, weight, bias):
    return rms_norm(x, norm_weight) @ weight.T + bias


def norm_swiglu(x, norm_weight, weight):
    x = rms_norm(x, norm_weight)
    return swiglu(x @ weight[0].T, x @ weight[1].T)


def linear_add(x, weight, residual):
    return residual + x @ weight.T


_ROWS = (rms_norm, add_rms_norm, layer_norm, rope, mrope, swiglu, geglu, quick_gelu)
BY_ROWS = tuple(f.__name__ for f in _ROWS)  # bound by memory alone
_DECODING = (norm_linear, norm_swiglu, linear_add)
FORMULAS = {f.__name__: f for f in (*_ROWS, cross_entropy, linear_cross_entropy, attention, *_DECODING)}
# What values are compared with is the formula in float32; here where that needs less memory than the formula itself.
REFERENCES = FORMULAS | {"linear_cross_entropy": linear_cross_entropy_in_chunks}


# ---- inputs -----------------------------------------------------------------------------------------------------------


def norm(op: str, rows: int, width: int) -> Case:
    x, weight = Normal((rows, width)), Normal((width,), mean=1.0, scale=0.2)
    arrays = {
        "rms_norm": {"x": x, "weight": weight},
        "add_rms_norm": {"x": x, "residual": x, "weight": weight},
        "layer_norm": {"x": x, "weight": weight, "bias": Normal((width,), scale=0.2)},
    }
    return Case(op, f"{rows} x {width}", arrays[op])


def gate(op: str, rows: int, width: int) -> Case:
    names = ("x",) if op == "quick_gelu" else ("gate", "up")
    return Case(op, f"{rows} x {width}", dict.fromkeys(names, Normal((rows, width))))


def rotation(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, sections: Sequence[int] | None = None
) -> Case:
    """mrope with sections, rope without."""
    shape = (*((3,) if sections else ()), batch, tokens, dim // 2)

    def tables(rng):
        angles = rng.uniform(0, 2 * np.pi, shape)
        return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}

    arrays = {"q": Normal((batch, tokens, heads, dim)), "k": Normal((batch, tokens, kv_heads, dim))}
    size = f"{batch} x {tokens}, {heads}/{kv_heads} heads of {dim}"
    options = {"sections": tuple(sections)} if sections else {}
    return Case("mrope" if sections else "rope", size, arrays, tables, options)


def _labels(rows: int, vocab: int, ignored: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, vocab, rows, dtype=np.int32)
    return {"labels": np.where(rng.uniform(size=rows) < ignored, -100, labels).astype(np.int32)}


def token_loss(
    op: str, rows: int, hidden: int, vocab: int, ignored: float = 0.0, without: tuple[str, ...] = ()
) -> Case:
    """cross_entropy (which has no `hidden`) or linear_cross_entropy; `ignored`: the share of labels that do not count."""
    labels = functools.partial(_labels, rows, vocab, ignored)
    if op == "cross_entropy":
        return Case(op, f"{rows} x {vocab}", {"logits": Normal((rows, vocab))}, labels)
    arrays = {"x": Normal((rows, hidden)), "weight": Normal((vocab, hidden), scale=0.02)}
    size = f"{rows} x {hidden} x {vocab}" + (f", {ignored:.0%} of the labels ignored" if ignored else "")
    return Case(op, size, arrays, labels, without=without)


def text_attention(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    q, kv = Normal((batch, tokens, heads, dim)), Normal((batch, tokens, kv_heads, dim))
    size = f"{batch} x {tokens}, {heads}/{kv_heads} heads of {dim}, causal"
    return Case("attention", size, {"q": q, "k": kv, "v": kv}, options={"causal": True})


def image_attention(
    batch: int, heads: int, dim: int, lengths: tuple[int, ...], max_segments: int, size: str, without=()
) -> Case:
    """Full attention within each image; a row holds images of `lengths` patches side by side."""
    qkv = Normal((batch, sum(lengths), heads, dim))
    ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return Case(
        "attention",
        f"{batch} x {sum(lengths)}, {heads} heads of {dim}, {size}",
        {"q": qkv, "k": qkv, "v": qkv},
        lambda rng: {"segment_ids": np.tile(ids, (batch, 1))},
        {"lengths": lengths, "max_segments": max_segments},
        without,
    )


def decode_linear(op: str, rows: int, depth: int, width: int) -> Case:
    """norm_linear, norm_swiglu or linear_add: few rows and a weight [width, depth], or two of them."""
    x, norm = Normal((rows, depth)), Normal((depth,), 1.0, 0.2)
    weight, weights = (Normal((*two, width, depth), scale=depth**-0.5) for two in ((), (2,)))
    arrays = {
        "norm_linear": {"x": x, "norm_weight": norm, "weight": weight, "bias": Normal((width,))},
        "norm_swiglu": {"x": x, "norm_weight": norm, "weight": weights},
        "linear_add": {"x": x, "weight": weight, "residual": Normal((rows, width))},
    }
    return Case(op, f"{rows} x {depth} x {width}", arrays[op], in_turns=True)


def generation(text: shapes.TextSizes, rows: int) -> list[Case]:
    """The products of a layer with a new token."""
    queries = text.heads * text.head_dim
    return [
        decode_linear("norm_linear", rows, text.hidden, queries + 2 * text.kv_heads * text.head_dim),
        decode_linear("linear_add", rows, queries, text.hidden),
        decode_linear("norm_swiglu", rows, text.hidden, text.intermediate),
        decode_linear("linear_add", rows, text.intermediate, text.hidden),
    ]


# ---- the tables -------------------------------------------------------------------------------------------------------

_TEXT, _VISION = shapes.TEXT, shapes.VISION
_FULL_LOGITS = ("jnp", "torch", "torch.compile")  # what holds all logits in float32

CASES: tuple[Case, ...] = (
    *(norm(op, 8192, text.hidden) for op in ("rms_norm", "add_rms_norm") for text in _TEXT.values()),
    norm("layer_norm", 16_384, _VISION.embed),
    *(
        rotation(4, 2048, _TEXT[model].heads, _TEXT[model].kv_heads, 128, sections)
        for sections in (_TEXT["2b"].sections, None)
        for model in ("2b", "7b")
    ),
    rotation(4, 4096, _VISION.heads, _VISION.heads, _VISION.head_dim),
    *(gate("swiglu", 8192, text.intermediate) for text in _TEXT.values()),
    gate("geglu", 8192, _TEXT["2b"].intermediate),
    gate("quick_gelu", 16_384, _VISION.intermediate),
    token_loss("cross_entropy", 8192, 0, _TEXT["2b"].vocab),
    token_loss("linear_cross_entropy", 8192, 1536, 151_936),
    token_loss("linear_cross_entropy", 8192, 1536, 151_936, ignored=0.7, without=("tokamax",)),
    token_loss("linear_cross_entropy", 8192, 3584, 152_064),
    token_loss("linear_cross_entropy", 32_768, 1536, 151_936, without=_FULL_LOGITS),
    token_loss("linear_cross_entropy", 8192, 4096, 128_256),
    *(text_attention(4, 2048, _TEXT[model].heads, _TEXT[model].kv_heads, 128) for model in ("2b", "7b")),
    image_attention(4, 16, 80, (4096,), 1, "one image a row"),
    image_attention(4, 16, 80, (1024,) * 4, 4, "four images a row"),
    image_attention(1, 16, 80, IMAGES, 16, "12 images of mixed sizes", without=("cudnn", "tokamax")),
    *(case for model, rows in (("2b", 1), ("2b", 16), ("7b", 1)) for case in generation(_TEXT[model], rows)),
)


def sweep() -> list[tuple[str, int, Case]]:
    """-> (model, rows, case) of the operations over rows, at the models' widths and from few rows to many.

    A case that two models share stands under the first.
    """
    found: dict[str, tuple[str, int, Case]] = {}

    def add(model: str, rows: int, *of_model: Case) -> None:
        for case in of_model:
            found.setdefault(case.name, (model, rows, case))

    for model, text in _TEXT.items():
        for rows in shapes.TEXT_ROWS:
            heads = text.heads, text.kv_heads, text.head_dim
            add(model, rows, *(norm(op, rows, text.hidden) for op in ("rms_norm", "add_rms_norm")))
            add(model, rows, *(gate(op, rows, text.intermediate) for op in ("swiglu", "geglu")))
            add(model, rows, *(rotation(1, rows, *heads, sections) for sections in (text.sections, None)))
            if rows <= 8192:
                losses = ("cross_entropy", "linear_cross_entropy")
                add(model, rows, *(token_loss(op, rows, text.hidden, text.vocab) for op in losses))
    for rows in shapes.VISION_ROWS:
        heads = _VISION.heads, _VISION.heads, _VISION.head_dim
        add("vision", rows, norm("layer_norm", rows, _VISION.embed), rotation(1, rows, *heads))
        add("vision", rows, gate("quick_gelu", rows, _VISION.intermediate))
    return list(found.values())


def choose(only: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """The cases of the operations, or with the names, in `only`; all if it is empty. ValueError for an unknown name."""
    known = dict.fromkeys([case.op for case in cases] + [case.name for case in cases])
    for name in only:
        if name not in known:
            raise ValueError(f"bench ops: there is no {name!r}; choose from: {'; '.join(known)}")
    return [case for case in cases if not only or case.op in only or case.name in only]
