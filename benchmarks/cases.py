"""The cases of `python -m benchmarks ops`: operations with inputs at the models' shapes, and options.

This module uses no device, so that the process that measures the torch packages can read the same cases.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from liger_jax.errors import UserError
from pallas_kernels import shapes
from pallas_kernels.registry import OPERATIONS

IMAGES = (4096, 2664, 2304, 1600, 1296, 1024, 1024, 784, 576, 484, 340, 192)  # patches of each image; 16384 in total


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
    size: str
    """The size as the tables print it."""
    arrays: dict[str, Normal]
    """Inputs that have a gradient."""
    make_constants: Callable[[np.random.Generator], dict[str, np.ndarray]] = lambda rng: {}
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    """Implementations that do not support this case, or that would run out of GPU memory."""
    decoding: bool = False
    """Whether the operation is for decoding. It then has no gradient and is timed on inputs that are in no cache."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def constants(self) -> dict[str, np.ndarray]:
        """Returns the inputs without a gradient: labels, segments, tables of angles."""
        return self.make_constants(np.random.default_rng(self.seed))

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in self.arrays.items()}


# ---- one case ---------------------------------------------------------------------------------------------------------


def make_arrays(op: str, sizes: dict[str, Any], **scales: float) -> dict[str, Normal]:
    """Returns the inputs of an operation that have a gradient, or all inputs of a decoding operation, which has no gradient.

    Args:
        op: a name in the registry, which has the axes of each argument.
        sizes: the size of each axis.
        scales: standard deviations by name; by default 0.2 for a vector of weights and 1 for other inputs.
    """
    operation = OPERATIONS[op]
    arrays = {}
    for name in operation.differentiable or operation.arguments:
        argument = operation.arguments[name]
        mean, scale = (1.0, 0.2) if argument.kind == "weight" else (0.0, 1.0)
        arrays[name] = Normal(argument.shape(sizes), mean, scales.get(name, scale))
    return arrays


def row_case(op: str, rows: int, width: int) -> Case:
    """Returns a case of a norm or an activation."""
    return Case(op, f"{rows} x {width}", make_arrays(op, {"...": (rows,), "D": width}))


def rope_case(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, sections: Sequence[int] | None = None, *, norm=False
) -> Case:
    """Returns a case of mrope if there are sections, of qk_norm_rope with a `norm`, else of rope."""
    op = "mrope" if sections else "qk_norm_rope" if norm else "rope"
    sizes = {"B": batch, "T": tokens, "N": heads, "K": kv_heads, "D": dim}

    def tables(rng):
        angles = rng.uniform(0, 2 * np.pi, OPERATIONS[op].arguments["cos"].shape(sizes))
        return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}

    size = f"{batch} x {tokens}, {heads}/{kv_heads} heads of {dim}"
    return Case(op, size, make_arrays(op, sizes), tables, {"sections": tuple(sections)} if sections else {})


def _labels(rows: int, vocab: int, ignored: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, vocab, rows, dtype=np.int32)
    return {"labels": np.where(rng.uniform(size=rows) < ignored, -100, labels).astype(np.int32)}


def loss_case(
    op: str, rows: int, hidden: int, vocab: int, ignored: float = 0.0, excluded: tuple[str, ...] = ()
) -> Case:
    """Returns a case of linear_cross_entropy or of cross_entropy, which ignores `hidden`.

    `ignored` is the share of labels that are ignore_index.
    """
    axes = [rows, vocab] if op == "cross_entropy" else [rows, hidden, vocab]
    size = " x ".join(map(str, axes)) + (f", {ignored:.0%} of the labels ignored" if ignored else "")
    arrays = make_arrays(op, {"...": (rows,), "H": hidden, "V": vocab}, weight=0.02)
    return Case(op, size, arrays, functools.partial(_labels, rows, vocab, ignored), excluded=excluded)


def text_attention_case(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    """Returns a case of causal attention over one sequence per batch entry."""
    size = f"{batch} x {tokens}, {heads}/{kv_heads} heads of {dim}, causal"
    arrays = make_arrays("attention", {"B": batch, "T": tokens, "S": tokens, "N": heads, "K": kv_heads, "D": dim})
    return Case("attention", size, arrays, options={"causal": True})


def image_attention_case(
    batch: int, heads: int, dim: int, lengths: tuple[int, ...], max_segments: int, size: str, excluded=()
) -> Case:
    """Returns a case of full attention within each image; a sequence packs images of `lengths` patches."""
    patches = sum(lengths)
    ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return Case(
        "attention",
        f"{batch} x {patches}, {heads} heads of {dim}, {size}",
        make_arrays("attention", {"B": batch, "T": patches, "S": patches, "N": heads, "K": heads, "D": dim}),
        lambda rng: {"segment_ids": np.tile(ids, (batch, 1))},
        {"lengths": lengths, "max_segments": max_segments},
        excluded,
    )


def decode_linear_case(op: str, rows: int, depth: int, width: int) -> Case:
    """Returns a case of norm_linear, norm_swiglu or linear_add: few rows and one or two weights [width, depth]."""
    arrays = make_arrays(op, {"B": rows, "H": depth, "O": width, "F": width}, weight=depth**-0.5)
    return Case(op, f"{rows} x {depth} x {width}", arrays, decoding=True)


def decode_layer_cases(text: shapes.TextSizes, rows: int) -> list[Case]:
    """Returns the fused matmuls of one text layer in decoding."""
    queries = text.heads * text.head_dim
    return [
        decode_linear_case("norm_linear", rows, text.hidden, queries + 2 * text.kv_heads * text.head_dim),
        decode_linear_case("linear_add", rows, queries, text.hidden),
        decode_linear_case("norm_swiglu", rows, text.hidden, text.intermediate),
        decode_linear_case("linear_add", rows, text.intermediate, text.hidden),
    ]


def registered_row_cases(family: str) -> list[Case]:
    """Returns the cases of a family of operations over rows ("norm" or "activation"), at the shapes in the registry."""
    return [
        row_case(operation.name, int(np.prod(rows)), width)
        for operation in OPERATIONS.values()
        if operation.family == family
        for rows, width in operation.shapes
    ]


# ---- the tables -------------------------------------------------------------------------------------------------------

_TEXT, _VISION, _QWEN3 = shapes.TEXT, shapes.VISION, shapes.QWEN3_VL
_FULL_LOGITS = ("jnp", "torch", "torch.compile")  # implementations that hold all logits in float32

CASES: tuple[Case, ...] = (
    *registered_row_cases("norm"),
    *(
        rope_case(4, 2048, _TEXT[model].heads, _TEXT[model].kv_heads, 128, sections)
        for sections in (_TEXT["2b"].sections, None)
        for model in ("2b", "7b")
    ),
    rope_case(4, 4096, _VISION.heads, _VISION.heads, _VISION.head_dim),
    *(rope_case(4, 2048, text.heads, text.kv_heads, 128, norm=True) for text in (_QWEN3["2b"], _QWEN3["8b"])),
    *registered_row_cases("activation"),
    row_case("geglu", 8192, _TEXT["2b"].intermediate),  # no supported model uses it
    loss_case("cross_entropy", 8192, 0, _TEXT["2b"].vocab),
    loss_case("linear_cross_entropy", 8192, 1536, 151_936),
    loss_case("linear_cross_entropy", 8192, 1536, 151_936, ignored=0.7, excluded=("tokamax",)),
    loss_case("linear_cross_entropy", 8192, 3584, 152_064),
    loss_case("linear_cross_entropy", 32_768, 1536, 151_936, excluded=_FULL_LOGITS),
    loss_case("linear_cross_entropy", 8192, 4096, 128_256),
    *(text_attention_case(4, 2048, _TEXT[model].heads, _TEXT[model].kv_heads, 128) for model in ("2b", "7b")),
    image_attention_case(4, 16, 80, (4096,), 1, "one image a row"),
    image_attention_case(4, 16, 80, (1024,) * 4, 4, "four images a row"),
    image_attention_case(1, 16, 80, IMAGES, 16, "12 images of mixed sizes", excluded=("cudnn", "tokamax")),
    *(case for model, rows in (("2b", 1), ("2b", 16), ("7b", 1)) for case in decode_layer_cases(_TEXT[model], rows)),
)


def sweep() -> list[tuple[str, int, Case]]:
    """Returns (model, rows, case) for every operation but attention, at the models' widths, from few rows to many.

    A case that two models share is listed under the first.
    """
    cases: dict[str, tuple[str, int, Case]] = {}

    def add(model: str, rows: int, *model_cases: Case) -> None:
        for case in model_cases:
            cases.setdefault(case.name, (model, rows, case))

    for model, text in _TEXT.items():
        for rows in shapes.TEXT_ROWS:
            heads = text.heads, text.kv_heads, text.head_dim
            add(model, rows, *(row_case(op, rows, text.hidden) for op in ("rms_norm", "add_rms_norm")))
            add(model, rows, *(row_case(op, rows, text.intermediate) for op in ("swiglu", "geglu")))
            add(model, rows, *(rope_case(1, rows, *heads, sections) for sections in (text.sections, None)))
            if rows <= 8192:
                losses = ("cross_entropy", "linear_cross_entropy")
                add(model, rows, *(loss_case(op, rows, text.hidden, text.vocab) for op in losses))
    for rows in shapes.VISION_ROWS:
        heads = _VISION.heads, _VISION.heads, _VISION.head_dim
        add("vision", rows, row_case("layer_norm", rows, _VISION.embed), rope_case(1, rows, *heads))
        add("vision", rows, row_case("quick_gelu", rows, _VISION.intermediate))
    return list(cases.values())


def choose(only: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Returns the cases whose operation or name is in `only`, or all cases if `only` is empty.

    Raises:
        UserError: a name in `only` is neither an operation nor a case.
    """
    known = dict.fromkeys([case.op for case in cases] + [case.name for case in cases])
    for name in only:
        if name not in known:
            raise UserError(f"only is {name!r}; expected an operation or a case: {'; '.join(known)}")
    return [case for case in cases if not only or case.op in only or case.name in only]
