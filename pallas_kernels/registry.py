"""One row per operation: its arguments, its formula, its kernels, and the shapes of real models.

Tests, tuning and benchmarks read this table, so that adding an operation touches only its own file, this file and
`__init__`. The package itself does not import it.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import shapes

Sizes = Mapping[str, Any]  # axis name -> size; "..." -> sizes of the row axes

# The axis sizes of a small example; an operation may override them.
SMALL: Sizes = {"...": (2,), "B": 1, "T": 3, "S": 6, "N": 4, "K": 2, "D": 8, "H": 8, "O": 8, "F": 8, "V": 8}
SECTIONS = {8: (2, 1, 1), 32: (4, 6, 6), 128: (16, 24, 24)}  # head size -> sections of mrope


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array argument: its axes, separated by spaces, and the kind of its values.

    An axis is a name, a number, a name divided by 2, or "..." for any number of row axes. The kinds are "normal", "weight"
    (normally distributed around 1), "table" (of cos or sin), "statistic" (a float32 per row), "labels", "mask" and "slot".
    """

    axes: str
    kind: str = "normal"

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape for the sizes of the axes."""

        def axis_sizes(axis: str) -> tuple[int, ...]:
            if axis == "...":
                return tuple(sizes["..."])
            if axis.isdigit():
                return (int(axis),)
            name, _, divisor = axis.partition("/")
            return (sizes[name] // int(divisor or 1),)

        return tuple(size for axis in self.axes.split() for size in axis_sizes(axis))

    def draw(self, rng: np.random.Generator, sizes: Sizes) -> np.ndarray:
        """Returns random values."""
        shape = self.shape(sizes)
        if self.kind == "labels":
            return np.where(rng.uniform(size=shape) < 0.3, -100, rng.integers(0, sizes["V"], shape)).astype(np.int32)
        if self.kind == "mask":
            return (rng.uniform(size=shape) < 0.6).astype(np.int32)
        if self.kind == "slot":
            return np.asarray(sizes["S"] // 2, np.int32)
        if self.kind == "weight":
            return 1 + 0.3 * rng.normal(size=shape)
        return np.round(16 * rng.normal(size=shape)) / 16  # the sum of two is exact in bfloat16


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel whose block sizes are tuned, called as run(*operands, interpret=..., blocks=...)."""

    name: str  # its name in tuned/*.json
    run: Callable[..., Any]
    operands: Mapping[str, Argument]
    shapes: Sequence[tuple[int, int]]  # (rows, width) of real models
    sizes: Callable[[int, int], Sizes]  # (rows, width) -> axis sizes
    uncached: str | None = None  # the operand to time outside all caches: in decoding, the weight


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation, called as function(*arguments, **options, implementation=...)."""

    name: str
    family: str  # "norm", "activation", "rope", "loss", "attention" or "decode"
    function: Callable[..., Any]
    arguments: Mapping[str, Argument]
    formula: Callable[..., Any]  # plain jnp with the same arguments and options: the reference of the tests
    differentiable: tuple[str, ...] = ()  # the arguments that have a gradient, which come first
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # name -> options
    small: Mapping[str, int] = dataclasses.field(default_factory=dict)  # sizes that differ from SMALL
    shapes: Sequence[tuple[tuple[int, ...], int]] = ()  # (rows, width) of real models
    kernels: Sequence[Kernel] = ()

    def sizes(self, rows: Sequence[int], width: int) -> Sizes:
        """Returns the axis sizes for rows of `width` numbers; `rows` has the sizes of the row axes, or batch and tokens."""
        return {**SMALL, **self.small, "...": tuple(rows), "B": rows[0], "T": rows[-1], "D": width, "V": width}

    def example(self, sizes: Sizes | None = None, dtype: Any = "float32", seed: int = 0) -> list[jax.Array]:
        """Returns random arguments for the sizes of the axes (None: small ones), with floating ones in `dtype`."""
        rng = np.random.default_rng(seed)
        arrays = [argument.draw(rng, sizes or {**SMALL, **self.small}) for argument in self.arguments.values()]
        return [jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype) for x in arrays]


# ---- formulas as in a textbook: arithmetic in at least float32, results in the dtype of the inputs -----------------------


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rms_norm(x, weight, *, offset=0.0, casting="llama"):
    normed = _wide(x) / jnp.sqrt(jnp.mean(_wide(x) ** 2, axis=-1, keepdims=True) + 1e-6)
    return (normed * (offset + _wide(weight))).astype(x.dtype)


def _add_rms_norm(x, residual, weight):
    return _rms_norm(x + residual, weight), x + residual


def _layer_norm(x, weight, bias):
    centered = _wide(x) - jnp.mean(_wide(x), axis=-1, keepdims=True)
    normed = centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-6)
    return (normed * _wide(weight) + _wide(bias)).astype(x.dtype)


def _swiglu(gate, up):
    return (_wide(gate) / (1 + jnp.exp(-_wide(gate))) * _wide(up)).astype(gate.dtype)


def _wide_gelu_tanh(x):
    return x / 2 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _geglu(gate, up, *, approximate=True):
    x = _wide(gate)
    gelu = _wide_gelu_tanh(x) if approximate else x / 2 * jax.scipy.special.erfc(-x / 2**0.5)
    return (gelu * _wide(up)).astype(gate.dtype)


def _gelu_tanh(x):
    return _wide_gelu_tanh(_wide(x)).astype(x.dtype)


def _quick_gelu(x):
    return (_wide(x) / (1 + jnp.exp(-1.702 * _wide(x)))).astype(x.dtype)


def _rope(q, k, cos, sin):
    cos, sin = (jnp.tile(_wide(table), 2)[:, :, None] for table in (cos, sin))

    def rotate(x):
        first, second = jnp.split(_wide(x), 2, axis=-1)
        return (_wide(x) * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)

    return rotate(q), rotate(k)


def _mrope(q, k, cos, sin, *, sections=None):
    positions = np.repeat(np.arange(3), sections or SECTIONS[q.shape[-1]])  # which position each frequency uses
    cos, sin = (jnp.stack([t[p, :, :, i] for i, p in enumerate(positions)], axis=-1) for t in (cos, sin))
    return _rope(q, k, cos, sin)


def _qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    return _rope(_rms_norm(q, q_weight), _rms_norm(k, k_weight), cos, sin)


def _cross_entropy(logits, labels, *, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    z = _wide(logits) if softcap is None else softcap * jnp.tanh(_wide(logits) / softcap)
    lse = jax.scipy.special.logsumexp(z, axis=-1)
    log_probs = z - lse[..., None]
    counted = labels != -100
    of_label = jnp.take_along_axis(log_probs, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    losses = -(1 - label_smoothing) * of_label - label_smoothing * jnp.mean(log_probs, axis=-1) + z_loss * lse**2
    losses = jnp.where(counted, losses, 0)
    return losses if reduction == "none" else jnp.sum(losses) / jnp.maximum(jnp.sum(counted), 1)


def _linear_cross_entropy(x, weight, labels):
    return _cross_entropy(_wide(x) @ _wide(weight).T, labels)


def _attention(q, k, v):
    k, v = (jnp.repeat(_wide(x), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", _wide(q), k) / q.shape[-1] ** 0.5
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(scores), v).astype(q.dtype)


def _decode_attention(qkv, cos, sin, keys, values, valid, slot):
    key_heads = keys.shape[2]
    q, k, v = jnp.split(qkv[:, None], (qkv.shape[1] - 2 * key_heads, qkv.shape[1] - key_heads), axis=2)
    q, k = _rope(q, k, cos[:, None], sin[:, None])
    keys, values = keys.at[:, slot].set(k[:, 0]), values.at[:, slot].set(v[:, 0])
    slots = jnp.arange(keys.shape[1])
    visible = ((valid != 0) & (slots < slot)) | (slots == slot)
    grouped = _wide(q).reshape(len(q), key_heads, -1, q.shape[-1])
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, _wide(keys)) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
    out = jnp.einsum("bkgs,bskd->bkgd", weights, _wide(values))
    return out.reshape(q[:, 0].shape).astype(qkv.dtype), keys, values


def _norm_linear(x, norm_weight, weight, bias):
    return (_wide(_rms_norm(x, norm_weight)) @ _wide(weight).T + _wide(bias)).astype(x.dtype)


def _norm_swiglu(x, norm_weight, weight):
    gate, up = jnp.einsum("bh,pfh->pbf", _wide(_rms_norm(x, norm_weight)), _wide(weight))
    return _swiglu(gate, up).astype(x.dtype)


def _linear_add(x, weight, residual):
    return (_wide(residual) + _wide(x) @ _wide(weight).T).astype(x.dtype)


def mrope_by_width(q, k, cos, sin, *, implementation=None):
    """Computes mrope with the sections that SECTIONS has for the head size."""
    return pk.mrope(q, k, cos, sin, SECTIONS[2 * cos.shape[-1]], implementation=implementation)


# ---- kernels to tune ----------------------------------------------------------------------------------------------------

_TEXT, _VISION = list(shapes.TEXT.values()), shapes.VISION  # Qwen2-VL, measured in most detail
_ALL_TEXT = [*_TEXT, *shapes.QWEN2_5_VL.values(), *shapes.QWEN3_VL.values()]
_OTHER_WIDTHS = sorted({text.hidden for text in _ALL_TEXT} - {text.hidden for text in _TEXT})
_ROWS = (2048, 8192, 32_768)
_WIDTHS = [(rows, text.hidden) for text in _TEXT for rows in _ROWS] + [(8192, width) for width in _OTHER_WIDTHS]
# Rows of LayerNorm: patches, and the mergers of Qwen3-VL, of which some normalize four patches at once.
_PATCHES = [(rows, _VISION.embed) for rows in shapes.VISION_ROWS]
_PATCHES += [(16_384, vision.embed) for vision in shapes.QWEN3_VISION.values()]
_PATCHES += [(4096, 4 * vision.embed) for vision in shapes.QWEN3_VISION.values()]
_GATES = [(8192, text.intermediate) for text in _TEXT] + [(16_384, _VISION.intermediate)]
_HEADS = [(8192, 128), (16_384, _VISION.head_dim)]
_VOCABS = sorted({text.vocab for text in _TEXT})


def _mlp_widths(text: shapes.TextSizes) -> tuple[int, int]:
    """Returns the width of an MLP, and that on each of two devices which share it."""
    return text.intermediate, text.intermediate // 2


def _module(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.{name}")  # the package exports functions of the same names


def _of_rows(rows: int, width: int) -> Sizes:
    return {"G": 1, "...": (rows,), "D": width}


def _row_kernels(name: str, module: str, static: tuple, kernel_shapes: Sequence[tuple[int, int]]) -> list[Kernel]:
    """Returns the forward and the backward kernel of an operation over rows, with the operands that its passes declare."""
    op_module = _module(module)
    passes = {"forward": op_module._OPERATION.forward, "backward": op_module._OPERATION.backward}
    return [
        Kernel(
            f"{name}_{direction}",
            functools.partial(getattr(op_module, f"{direction}_kernel"), op_module.StaticArgs(*static)),
            {
                operand: Argument(axes, "statistic" if axes == "G ..." else "normal")
                for operand, axes in operation_pass.operands.items()
            },
            kernel_shapes,
            _of_rows,
        )
        for direction, operation_pass in passes.items()
    ]


def _rope_kernel() -> Kernel:
    rope = _module("rope")
    heads, table = Argument("1 T 16 D"), Argument("1 T D/2", "table")
    return Kernel(
        "rope",
        functools.partial(rope.rotate_kernel, rope.StaticArgs(None, 1, "triton")),
        {"q": heads, "k": heads, "cos": table, "sin": table},
        _HEADS,
        lambda rows, width: {"T": rows, "D": width},
    )


def _qk_norm_rope_kernels() -> list[Kernel]:
    """Returns the forward and the backward kernel; the rows are query heads."""
    module = _module("qk_norm_rope")
    heads = {"q": Argument("1 1 T N D"), "k": Argument("1 1 T K D")}
    gradients = {"d_q": heads["q"], "d_k": heads["k"]}
    vectors = {"q_weight": Argument("1 D"), "k_weight": Argument("1 D")}
    vectors |= {"cos": Argument("1 1 T D/2", "table"), "sin": Argument("1 1 T D/2", "table")}
    static = module.StaticArgs(1e-6, "triton")
    sizes = lambda rows, width: {"T": rows // 16, "N": 16, "K": 8, "D": width}  # noqa: E731
    return [
        Kernel(
            f"qk_norm_rope_{direction}",
            functools.partial(getattr(module, f"{direction}_kernel"), static),
            operands | vectors,
            [(8192 * shapes.QWEN3_VL[size].heads, 128) for size in ("2b", "8b")],
            sizes,
        )
        for direction, operands in {"forward": heads, "backward": heads | gradients}.items()
    ]


def _loss_kernel(name: str, function: str, *statistics: str) -> Kernel:
    kernel, options = getattr(_module("_cross_entropy_kernel"), function), _module("_cross_entropy_math").Options()

    def run(logits, labels, *operands, **launch_options):
        return kernel(options, logits, labels, None, *operands, **launch_options)  # no class weights

    operands = {"logits": Argument("1 T V"), "labels": Argument("1 T", "labels")}
    operands |= {statistic: Argument("1 T", "statistic") for statistic in statistics}
    sizes = [(2048, vocab) for vocab in _VOCABS]
    return Kernel(name, run, operands, sizes, lambda rows, width: {"T": rows, "V": width})


def _decode_kernel(name: str, operands: Mapping[str, str], kernel_shapes: Sequence[tuple[int, int]]) -> Kernel:
    """Returns a kernel for one row, which computes O outputs as sums over H inputs."""
    decode = _module("decode_linear")
    eps = 1e-6 if "norm_weight" in operands else None
    run = functools.partial(getattr(decode, f"{name}_kernel"), decode.StaticArgs(eps, "triton", "triton"))
    arguments = {operand: Argument(axes) for operand, axes in operands.items()}
    sizes = lambda rows, width: {"O": rows, "H": width}  # noqa: E731
    unique_shapes = list(dict.fromkeys(kernel_shapes))  # models share shapes
    return Kernel(f"one_row_{name}", run, arguments, unique_shapes, sizes, uncached="weight")


# ---- the table ----------------------------------------------------------------------------------------------------------

_ROWS_OF_D, _VECTOR = Argument("... D"), Argument("D", "weight")
_TEXT_WIDTHS = [((4, 2048), width) for width in (*(text.hidden for text in _TEXT), *_OTHER_WIDTHS)]

_TABLE = (
    Operation(
        "rms_norm",
        "norm",
        pk.rms_norm,
        {"x": _ROWS_OF_D, "weight": _VECTOR},
        _rms_norm,
        ("x", "weight"),
        variants={"gemma": {"casting": "gemma", "offset": 1.0}},
        shapes=[*_TEXT_WIDTHS, ((4, 4096), _VISION.embed)],
        kernels=_row_kernels("rms_norm", "rms_norm", (1e-6, 0.0, "llama", "triton"), [*_WIDTHS, *_PATCHES[:2]]),
    ),
    Operation(
        "add_rms_norm",
        "norm",
        pk.add_rms_norm,
        {"x": _ROWS_OF_D, "residual": _ROWS_OF_D, "weight": _VECTOR},
        _add_rms_norm,
        ("x", "residual", "weight"),
        shapes=_TEXT_WIDTHS,
        kernels=_row_kernels("add_rms_norm", "add_rms_norm", (1e-6, 0.0, "llama", "triton"), _WIDTHS),
    ),
    Operation(
        "layer_norm",
        "norm",
        pk.layer_norm,
        {"x": _ROWS_OF_D, "weight": _VECTOR, "bias": _VECTOR},
        _layer_norm,
        ("x", "weight", "bias"),
        shapes=[((4, rows // 4), width) for rows, width in _PATCHES[1:]],
        kernels=_row_kernels("layer_norm", "layer_norm", (1e-6, "triton"), _PATCHES),
    ),
    Operation(
        "swiglu",
        "activation",
        pk.swiglu,
        {"gate": _ROWS_OF_D, "up": _ROWS_OF_D},
        _swiglu,
        ("gate", "up"),
        shapes=[((4, 2048), text.intermediate) for text in _TEXT]
        + [((4, 4096), vision.intermediate) for vision in shapes.QWEN2_5_VISION.values()],
        kernels=_row_kernels("gate", "activations", ("silu", "triton"), _GATES),  # used for all activations
    ),
    Operation(
        "geglu",
        "activation",
        pk.geglu,
        {"gate": _ROWS_OF_D, "up": _ROWS_OF_D},
        _geglu,
        ("gate", "up"),
        variants={"exact": {"approximate": False}},
    ),
    Operation(
        "quick_gelu",
        "activation",
        pk.quick_gelu,
        {"x": _ROWS_OF_D},
        _quick_gelu,
        ("x",),
        shapes=[((4, 4096), _VISION.intermediate)],
    ),
    Operation(
        "gelu_tanh",
        "activation",
        pk.gelu_tanh,
        {"x": _ROWS_OF_D},
        _gelu_tanh,
        ("x",),
        shapes=[((4, 4096), vision.intermediate) for vision in shapes.QWEN3_VISION.values()],
    ),
    Operation(
        "rope",
        "rope",
        pk.rope,
        {
            "q": Argument("B T N D"),
            "k": Argument("B T K D"),
            "cos": Argument("B T D/2", "table"),
            "sin": Argument("B T D/2", "table"),
        },
        _rope,
        ("q", "k"),
        shapes=[((4, 4096), dim) for dim in (_VISION.head_dim, *(v.head_dim for v in shapes.QWEN3_VISION.values()))],
        kernels=[_rope_kernel()],
    ),
    Operation(
        "mrope",
        "rope",
        mrope_by_width,
        {
            "q": Argument("B T N D"),
            "k": Argument("B T K D"),
            "cos": Argument("3 B T D/2", "table"),
            "sin": Argument("3 B T D/2", "table"),
        },
        _mrope,
        ("q", "k"),
        shapes=[((4, 2048), shapes.TEXT["2b"].head_dim)],
    ),
    Operation(
        "qk_norm_rope",
        "rope",
        pk.qk_norm_rope,
        {
            "q": Argument("B T N D"),
            "k": Argument("B T K D"),
            "q_weight": _VECTOR,
            "k_weight": _VECTOR,
            "cos": Argument("B T D/2", "table"),
            "sin": Argument("B T D/2", "table"),
        },
        _qk_norm_rope,
        ("q", "k", "q_weight", "k_weight"),
        shapes=[((4, 2048), 128)],
        kernels=_qk_norm_rope_kernels(),
    ),
    Operation(
        "cross_entropy",
        "loss",
        pk.cross_entropy,
        {"logits": Argument("... V"), "labels": Argument("...", "labels")},
        _cross_entropy,
        ("logits",),
        variants={
            "none": {"reduction": "none"},
            "options": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0},
        },
        shapes=[((4, 2048), vocab) for vocab in _VOCABS],
        kernels=[
            _loss_kernel("cross_entropy_forward", "stats_kernel"),
            _loss_kernel("cross_entropy", "stats_and_gradient_kernel", "cotangent"),
            _loss_kernel("cross_entropy_backward", "gradient_kernel", "lse", "cotangent"),
        ],
    ),
    Operation(
        "linear_cross_entropy",
        "loss",
        pk.linear_cross_entropy,
        {"x": Argument("... H"), "weight": Argument("V H"), "labels": Argument("...", "labels")},
        _linear_cross_entropy,
        ("x", "weight"),
    ),
    Operation(
        "attention",
        "attention",
        pk.attention,
        {"q": Argument("B T N D"), "k": Argument("B S K D"), "v": Argument("B S K D")},
        _attention,
        ("q", "k", "v"),
    ),
    Operation(
        "decode_attention",
        "decode",
        pk.decode_attention,
        {
            "qkv": Argument("B heads D"),
            "cos": Argument("B D/2", "table"),
            "sin": Argument("B D/2", "table"),
            "keys": Argument("B S K D"),
            "values": Argument("B S K D"),
            "valid": Argument("B S", "mask"),
            "slot": Argument("", "slot"),
        },
        _decode_attention,
        small={"heads": 8},  # N + 2 K
    ),
    Operation(
        "norm_linear",
        "decode",
        pk.norm_linear,
        {
            "x": Argument("B H"),
            "norm_weight": Argument("H", "weight"),
            "weight": Argument("O H"),
            "bias": Argument("O"),
        },
        _norm_linear,
        kernels=[
            _decode_kernel(
                "norm_linear",
                {"x": "1 H", "norm_weight": "H", "weight": "O H"},
                [
                    (outputs, text.hidden)
                    for text in _ALL_TEXT
                    for outputs in ((text.heads + 2 * text.kv_heads) * text.head_dim, text.vocab)
                ],
            )
        ],
    ),
    Operation(
        "norm_swiglu",
        "decode",
        pk.norm_swiglu,
        {"x": Argument("B H"), "norm_weight": Argument("H", "weight"), "weight": Argument("2 F H")},
        _norm_swiglu,
        kernels=[
            _decode_kernel(
                "norm_swiglu",
                {"x": "1 H", "norm_weight": "H", "weight": "2 O H"},
                [(width, text.hidden) for text in _ALL_TEXT for width in _mlp_widths(text)],
            )
        ],
    ),
    Operation(
        "linear_add",
        "decode",
        pk.linear_add,
        {"x": Argument("B H"), "weight": Argument("O H"), "residual": Argument("B O")},
        _linear_add,
        kernels=[
            _decode_kernel(
                "linear_add",
                {"x": "1 H", "weight": "O H", "residual": "1 O"},
                [
                    (text.hidden, depth)
                    for text in _ALL_TEXT
                    for depth in (text.heads * text.head_dim, *_mlp_widths(text))
                ],
            )
        ],
    ),
)
OPERATIONS = {operation.name: operation for operation in _TABLE}
KERNELS = {kernel.name: kernel for operation in _TABLE for kernel in operation.kernels}
