"""The implementations of a case that run on JAX: ours, plain XLA, cuDNN through JAX, and tokamax."""

import functools
import sys
import types
from collections.abc import Callable

import jax

import pallas_kernels
from benchmarks.cases import Case
from benchmarks.formulas import FORMULAS

# Operations whose implementation=None is XLA. Their kernel is measured as "kernel".
XLA_BY_DEFAULT = ("swiglu", "geglu", "quick_gelu", "gelu_tanh", "rope", "mrope")


def jax_implementations(case: Case, peers: bool = True) -> dict[str, Callable]:
    """Returns {name: f(**arrays, **constants)} for every JAX implementation of this case."""
    backends = {"ours": None} | ({"kernel": "triton"} if case.op in XLA_BY_DEFAULT else {"xla": "xla"})
    if case.decoding:
        del backends["xla"]  # the same formula as "jnp"
    functions = {name: functools.partial(_ours, case.op, backend) for name, backend in backends.items()}
    functions |= {"cudnn": _cudnn_attention} if case.op == "attention" else {"jnp": FORMULAS[case.op]}
    if peers and case.op in TOKAMAX:
        functions["tokamax"] = TOKAMAX[case.op]
    return {name: functools.partial(f, **case.options) for name, f in functions.items() if name not in case.excluded}


def _ours(op: str, implementation: str | None, *args, lengths=None, **options):
    return getattr(pallas_kernels, op)(*args, **options, implementation=implementation)


def _image_by_image(attention: Callable, q, k, v, lengths):
    """Calls attention(q, k, v) with one batch entry per image. All images must have the same size."""
    images = (a.reshape(-1, lengths[0], *a.shape[2:]) if lengths else a for a in (q, k, v))
    return attention(*images).reshape(q.shape)


def _cudnn_attention(q, k, v, *, causal=False, lengths=None, **_):
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    return _image_by_image(attention, q, k, v, lengths)


def _tokamax():
    # tokamax imports a profiling package that it does not install, for reports that are not made here.
    reports = types.ModuleType("xprof.cli.tools")
    reports.get_kernel_stats_tool = None
    sys.modules.setdefault(reports.__name__, reports)
    import tokamax

    return tokamax


def _tokamax_rms_norm(x, weight):
    return _tokamax().layer_norm(x, weight, None, subtract_mean=False, implementation="triton")


def _tokamax_layer_norm(x, weight, bias):
    return _tokamax().layer_norm(x, weight, bias, implementation="triton")


def _tokamax_linear_cross_entropy(x, weight, labels):
    loss = _tokamax().linear_softmax_cross_entropy_loss
    return loss(x, labels, weight.T, reduction="mean", implementation="chunked_xla")


def _tokamax_attention(q, k, v, *, causal=False, lengths=None, **_):
    attention = functools.partial(_tokamax().dot_product_attention, is_causal=causal, implementation="mosaic_gpu")
    return _image_by_image(attention, q, k, v, lengths)


TOKAMAX = {
    "rms_norm": _tokamax_rms_norm,
    "layer_norm": _tokamax_layer_norm,
    "linear_cross_entropy": _tokamax_linear_cross_entropy,
    "attention": _tokamax_attention,
}
