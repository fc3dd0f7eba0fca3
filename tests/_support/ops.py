"""Every operation with a kernel, as one table for the tests: how to call it, small arguments, shapes of real models."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import shapes

SECTIONS = {8: (2, 1, 1), 32: (4, 6, 6), 128: (16, 24, 24)}


@dataclasses.dataclass(frozen=True)
class Op:
    """run(*arguments, implementation=...); the first `differentiable` arguments have a gradient.

    Arguments by letter, for rows [...] and a width D: x [..., D], w [D], q and k heads [..., 4 or 2, D], c angles
    [..., D/2], t three of them [3, ..., D/2], y labels [...].
    """

    run: Callable
    arguments: str
    differentiable: int
    rows_axes: int = 1  # number of row axes it takes at least

    def make(self, rows: Sequence[int], width: int, dtype="float32", seed: int = 0) -> list[jax.Array]:
        rng = np.random.default_rng(seed)
        normal = {
            "x": lambda: np.round(16 * rng.normal(size=(*rows, width))) / 16,  # sums of two are exact in bfloat16
            "w": lambda: 1 + 0.3 * rng.normal(size=width),
            "q": lambda: rng.normal(size=(*rows, 4, width)),
            "k": lambda: rng.normal(size=(*rows, 2, width)),
            "c": lambda: rng.normal(size=(*rows, width // 2)),
            "t": lambda: rng.normal(size=(3, *rows, width // 2)),
        }
        labels = np.where(rng.uniform(size=rows) < 0.3, -100, rng.integers(0, width, rows)).astype(np.int32)
        return [jnp.asarray(labels) if a == "y" else jnp.asarray(normal[a](), dtype) for a in self.arguments]

    def both(self, implementation: str | None) -> Callable:
        """(arguments, seed) -> results and the gradients for random cotangents, as a list."""

        def value_and_gradients(*arguments):
            first, rest = arguments[: self.differentiable], arguments[self.differentiable :]
            run = functools.partial(self.run, implementation=implementation)
            out, pullback = jax.vjp(lambda *first: run(*first, *rest), *first)
            return jax.tree.leaves((out, pullback(random_like(out))))

        return value_and_gradients


def _mrope(q, k, cos, sin, *, implementation=None):
    return pk.mrope(q, k, cos, sin, SECTIONS[q.shape[-1]], implementation=implementation)


def _losses(logits, labels, *, implementation=None):
    return pk.cross_entropy(logits, labels, reduction="none", implementation=implementation)


def random_like(tree):
    """The same random numbers for the same shapes."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}
OPS = {
    "rms_norm": Op(pk.rms_norm, "xw", 2),
    "rms_norm gemma": Op(functools.partial(pk.rms_norm, casting="gemma", offset=1.0), "xw", 2),
    "add_rms_norm": Op(pk.add_rms_norm, "xxw", 3),
    "layer_norm": Op(pk.layer_norm, "xww", 3),
    "swiglu": Op(pk.swiglu, "xx", 2),
    "geglu": Op(pk.geglu, "xx", 2),
    "geglu exact": Op(functools.partial(pk.geglu, approximate=False), "xx", 2),
    "quick_gelu": Op(pk.quick_gelu, "x", 1),
    "rope": Op(pk.rope, "qkcc", 2, rows_axes=2),
    "mrope": Op(_mrope, "qktt", 2, rows_axes=2),
    "cross_entropy": Op(pk.cross_entropy, "xy", 1),
    "cross_entropy none": Op(_losses, "xy", 1),
    "cross_entropy options": Op(functools.partial(pk.cross_entropy, **ALL), "xy", 1),
}


def close(got, want, tolerance=1e-5):
    """Largest difference, relative to the largest entry or 1."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)


TEXT, VISION = shapes.TEXT["2b"], shapes.VISION
REAL = [  # operation, rows, width
    *((name, (4, 2048), text.hidden) for text in shapes.TEXT.values() for name in ("rms_norm", "add_rms_norm")),
    ("layer_norm", (4, 4096), VISION.embed),
    *(("swiglu", (4, 2048), text.intermediate) for text in shapes.TEXT.values()),
    ("quick_gelu", (4, 4096), VISION.intermediate),
    ("rope", (4, 4096), VISION.head_dim),
    ("mrope", (4, 2048), TEXT.head_dim),
    *(("cross_entropy", (4, 2048), vocab) for vocab in sorted({text.vocab for text in shapes.TEXT.values()})),
]
