"""The peers of `python -m benchmarks ops` on torch: Liger-Kernel, torch eager and compiled, and cut-cross-entropy.

python -m benchmarks.peers [CASE ...]        # prints one line of JSON after each case

Times are kernel times, as in benchmarks/timing.py. Some of these functions overwrite their inputs, so every run gets copies,
which are made before its kernels are timed. Values are compared with the same formula in float32.
"""

import functools
import gc
import json
import sys
from collections.abc import Callable

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.environment import first_line, versions_of
from benchmarks.formulas import EPS
from benchmarks.timing import REPEATS, spread

try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError:  # the tests also import this module without torch
    torch = None

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")


# ---- plain torch; arrays [B, T, N, D] are transposed to [B, N, T, D], as in transformers --------------------------------


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def rope(q, k, cos, sin):
    def rotate(x):
        x = x.transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return (x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]).transpose(1, 2)

    return rotate(q), rotate(k)


def mrope(q, k, cos, sin, sections):
    def merge(tables):
        parts = tables.split([*sections, *sections], dim=-1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)

    return rope(q, k, merge(cos), merge(sin))


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    return rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def linear_cross_entropy(x, weight, labels):
    return cross_entropy(x @ weight.t(), labels)


def attention(q, k, v, *, causal=False, lengths=None, backend="CUDNN_ATTENTION", **_):
    """Attends within each image: to all images at once if they have one size, else one by one, as transformers does."""

    def images(x):
        if len(set(lengths or ())) > 1:
            return x.split(lengths, dim=1)
        return [x.reshape(-1, lengths[0], *x.shape[2:]) if lengths else x]

    attend = functools.partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        parts = [attend(*(x.transpose(1, 2) for x in qkv)) for qkv in zip(*map(images, (q, k, v)), strict=True)]
    parts = [part.transpose(1, 2) for part in parts]
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).reshape(q.shape)


_TORCH_ROW_OPS = (
    *(rms_norm, add_rms_norm, layer_norm, rope, mrope, qk_norm_rope),
    *(swiglu, geglu, quick_gelu, gelu_tanh),
)
FORMULAS = {f.__name__: f for f in (*_TORCH_ROW_OPS, cross_entropy, linear_cross_entropy, attention)}
LOSSES = ("cross_entropy", "linear_cross_entropy")
REFERENCES = FORMULAS | {"attention": functools.partial(attention, backend="MATH")}


# ---- other packages, imported when called, so that a missing package only fails its own cases ---------------------------


def liger_rms_norm(x, weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def liger_add_rms_norm(x, residual, weight):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def liger_layer_norm(x, weight, bias):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


def liger_rope(q, k, cos, sin):
    from liger_kernel.ops.rope import LigerRopeFunction

    rotated = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return tuple(x.transpose(1, 2) for x in rotated)


def liger_mrope(q, k, cos, sin, sections):
    from liger_kernel.ops.qwen2vl_mrope import LigerQwen2VLMRopeFunction

    rotated = LigerQwen2VLMRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, list(sections))
    return tuple(x.transpose(1, 2) for x in rotated)


def liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_geglu(gate, up):
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)


def liger_cross_entropy(logits, labels):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, labels, None)[0]


def liger_linear_cross_entropy(x, weight, labels, accumulate=None):
    """Computes Liger's loss. `accumulate` is the dtype for sums of the weight's gradient; None for the weight's dtype."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # x, weight, labels, bias, class weights, ignore_index, z-loss, smoothing, reduction, softcap, return_z_loss, accum_dtype
    defaults = (None, None, -100, 0.0, 0.0, "mean", None, False)
    dtype = accumulate and getattr(torch, accumulate)
    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, *defaults, dtype)[0]


def cut_cross_entropy(x, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels)


OTHER_PACKAGES = {
    "rms_norm": {"liger": liger_rms_norm},
    "add_rms_norm": {"liger": liger_add_rms_norm},
    "layer_norm": {"liger": liger_layer_norm},
    "rope": {"liger": liger_rope},
    "mrope": {"liger": liger_mrope},
    "swiglu": {"liger": liger_swiglu},
    "geglu": {"liger": liger_geglu},
    "cross_entropy": {"liger": liger_cross_entropy},
    "linear_cross_entropy": {
        "liger": liger_linear_cross_entropy,
        "liger, float32 sums": functools.partial(liger_linear_cross_entropy, accumulate="float32"),
        "cut-cross-entropy": cut_cross_entropy,
    },
}


def torch_implementations(case: Case) -> dict[str, Callable]:
    """Returns {name: f(**arrays, **constants)} for every torch implementation of this case."""
    formula = FORMULAS[case.op]
    if case.op == "attention":
        functions = {"cudnn in torch": formula}
    else:
        functions = {"torch": formula, "torch.compile": torch.compile(formula, dynamic=False)}
    functions = OTHER_PACKAGES.get(case.op, {}) | functions
    return {name: functools.partial(f, **case.options) for name, f in functions.items() if name not in case.excluded}


# ---- inputs and values -------------------------------------------------------------------------------------------------


def make_inputs(case: Case, device: str) -> tuple[dict, dict]:
    """Returns arrays, and constants as in transformers: int64 labels, and bfloat16 tables as wide as a head."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(normal):
        numbers = torch.randn(normal.shape, generator=generator, device=device)
        return numbers.mul_(normal.scale).add_(normal.mean).bfloat16()

    def constant(value):
        tensor = torch.from_numpy(value).to(device)
        return torch.cat([tensor, tensor], dim=-1).bfloat16() if tensor.is_floating_point() else tensor.long()

    arrays = {name: draw(normal) for name, normal in case.arrays.items()}
    return arrays, {name: constant(value) for name, value in case.constants().items()}


def _tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def forward_and_backward(function: Callable, arrays: dict, constants: dict, cotangents: tuple | None) -> dict:
    """Returns results and gradients by name."""
    out = _tuple(function(**arrays, **constants))
    gradients = torch.autograd.grad(out, list(arrays.values()), cotangents)
    names = ["out"] if len(out) == 1 else [f"out{i}" for i in range(len(out))]
    named = dict(zip(names, out, strict=True)) | dict(zip((f"d{name}" for name in arrays), gradients, strict=True))
    return {name: value.detach() for name, value in named.items()}


def reference_values(case: Case, arrays: dict, constants: dict, cotangents: tuple | None) -> dict:
    """Returns results and gradients of the formula in float32, for the same rounded inputs."""
    function = functools.partial(REFERENCES[case.op], **case.options)
    constants = {name: value.float() if value.is_floating_point() else value for name, value in constants.items()}
    arrays = {name: value.float().requires_grad_() for name, value in arrays.items()}
    return forward_and_backward(function, arrays, constants, cotangents and tuple(c.float() for c in cotangents))


def relative_errors(values: dict, expected: dict) -> dict[str, float]:
    """Returns |value - expected| / |expected| of every result and gradient."""
    distances = {name: (values[name].float() - e).norm() / e.norm() for name, e in expected.items()}
    return {name: float(f"{value.item():.2e}") for name, value in distances.items()}


# ---- measurement -------------------------------------------------------------------------------------------------------


def kernel_us(calls: list[Callable]) -> list[float]:
    """Returns the summed kernel time of each call in microseconds, or only the mean if the calls differ in their kernels."""
    torch.cuda.synchronize()  # earlier kernels, such as the copies of the inputs, do not count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == on_device and not e.is_user_annotation]
    us = [event.time_range.elapsed_us() for event in sorted(events, key=lambda event: event.time_range.start)]
    if not us:
        raise RuntimeError("the profiler saw no kernel")
    kernels, remainder = divmod(len(us), len(calls))
    return [sum(us) / len(calls)] if remainder else [sum(us[i : i + kernels]) for i in range(0, len(us), kernels)]


def measure_one(case: Case, function: Callable, arrays: dict, constants: dict, cotangents, expected: dict) -> dict:
    """Returns {"forward_us", "both_us", "errors", "temp_bytes"} of one implementation."""

    @torch.no_grad()
    def forward(arrays):
        function(**arrays, **constants)

    def both(arrays, cotangents):
        return forward_and_backward(function, arrays, constants, cotangents)

    def fresh(tensors, gradient=False):
        return {name: tensor.clone().requires_grad_(gradient) for name, tensor in tensors.items()}

    def fresh_both():
        return fresh(arrays, gradient=True), cotangents and tuple(c.clone() for c in cotangents)

    forward(fresh(arrays))  # compiles and autotunes
    copies = [fresh(arrays) for _ in range(REPEATS)]
    result = {"forward_us": spread(kernel_us([functools.partial(forward, copy) for copy in copies]))}
    del copies
    both(*fresh_both())

    copy = fresh_both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = both(*copy)
    above = torch.cuda.max_memory_allocated() - before
    errors = relative_errors(values, expected)
    if case.op == "linear_cross_entropy":
        result["temp_bytes"] = max(0, above - sum(value.nbytes for value in values.values()))
    del copy, values

    copies = [fresh_both() for _ in range(REPEATS)]
    calls = [functools.partial(both, *copy) for copy in copies]
    return result | {"both_us": spread(kernel_us(calls)), "errors": errors}


def measure(case: Case, device: str = "cuda") -> dict[str, dict]:
    """Returns for each implementation the result of `measure_one`, or {"error"}."""
    arrays, constants = make_inputs(case, device)
    cotangents = None  # for a loss, the cotangent is 1
    if case.op not in LOSSES:
        torch.manual_seed(case.seed)
        with torch.no_grad():
            outputs = _tuple(REFERENCES[case.op](**arrays, **constants, **case.options))
        cotangents = tuple(torch.randn(out.shape, device=device).bfloat16() for out in outputs)
        del outputs
    expected = reference_values(case, arrays, constants, cotangents)
    results: dict[str, dict] = {}
    for name, function in torch_implementations(case).items():
        torch._dynamo.reset()  # compiles a separate program for each shape
        try:
            results[name] = measure_one(case, function, arrays, constants, cotangents, expected)
        except Exception as error:  # the other implementations are still measured
            results[name] = {"error": first_line(error)}
        gc.collect()
        torch.cuda.empty_cache()
    return results


def main(names: list[str]) -> None:
    if torch is None or not torch.cuda.is_available():
        sys.exit("benchmarks.peers: device is not a GPU; expected a GPU that torch can use")
    versions = versions_of(PACKAGES)
    comparable = [case for case in cases.choose(names, cases.CASES) if not case.decoding and case.op in FORMULAS]
    for case in comparable:
        report = {"case": case.name, "device": torch.cuda.get_device_name(), "versions": versions}
        try:
            report["results"] = measure(case)
        except Exception as error:  # the inputs or the reference failed
            report["results"] = {"torch": {"error": first_line(error)}}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
