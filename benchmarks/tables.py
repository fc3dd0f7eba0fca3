"""Writes the README's tables from benchmarks/results, so that no figure in it was typed.

python benchmarks/tables.py            # rewrites README.md between its <!-- table: ... --> marks
"""

import json
import pathlib
import re
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "liger-jax"
LARGE_ERROR = 2e-2  # of a norm, as in benchmarks.ops


def model_table(results: list[dict]) -> str:
    """Training, generation and conversion, one line a case; beside each the best that transformers did with it."""
    lines = ["| | liger-jax | transformers |", "|---|---|---|"]
    order = list(TITLES)
    results = sorted(results, key=lambda r: (r["model"], order.index(r["what"]), r.get("rows", 0), r.get("devices", 1)))
    for ours in (r for r in results if r["package"] == OURS):
        same = [r for r in results if r["package"] != OURS and _work(r) == _work(ours) and "error" not in r]
        peer = min(same, key=lambda r: r.get("step_ms", r.get("ms_per_token")), default=None)
        title = TITLES[ours["what"]].format(**{"prompt_tokens": 2048} | ours | {"model": _model(ours)})
        lines.append(f"| {title}{_options(ours)} | {_cell(ours)} | {_cell(peer, names=True)} |")
    return "\n".join([*lines, "", _measured_on(results)])


TITLES = {
    "convert": "{model}: read and convert the checkpoint",
    "train": "{model}: training step, {rows} rows",
    "train mixed": "{model}: training step, {rows} rows packed with images of 224 to 1344 px a side",
    "generate": "{model}: generation, {rows} x {prompt_tokens} tokens, then 128 new ones",
    "start": "{model}: from the start of a process to the first token, weights in {weights}, {programs} compilation cache",
}
CELLS: dict[str, Callable[[dict], str]] = {
    "convert": lambda r: f"{r['seconds']:.1f} s, {r['host_gib_above_start']:.1f} GiB of host memory",
    "train": lambda r: f"{r['step_ms']:.0f} ms, {r['peak_gib']:.1f} GiB" + _rates(r) + _compiled(r),
    "train mixed": lambda r: CELLS["train"](r),
    "generate": lambda r: f"{r['ms_per_token']:.2f} ms a token, prompt {r['prefill_ms']:.0f} ms" + _compiled(r),
    "start": lambda r: (
        f"{r['seconds']:.1f} s: "
        + ", ".join(f"{n} {s:.1f}" for n, s in r["parts"].items())
        + f"; the rest of an answer of 64 tokens {r['rest_s']:.1f} s"
    ),
}


def _cell(result: dict | None, *, names: bool = False) -> str:
    if result is None or "error" in result:
        return "" if result is None else result["error"]
    how = [result["package"].removeprefix("transformers").replace(" + ", "")]
    how += ["checkpointing"] * (result.get("remat") == "full") + [f"{result.get('cache')} cache"] * ("cache" in result)
    about = [*how] * names + [result.get("note", "")]
    return CELLS[result["what"]](result) + (f" ({', '.join(filter(None, about))})" if any(about) else "")


def _options(result: dict) -> str:
    devices = [f"{result['devices']} GPUs"] * (result.get("devices", 1) > 1)
    kept = [f"LoRA of rank {result.get('lora')}"] * ("lora" in result)
    kept += ["float32 master weights"] * result.get("master_weights", False)
    kept += [f'remat "{result.get("remat")}"'] * (result.get("remat", "dots") not in ("dots", "auto"))
    return "".join(f", {what}" for what in (*devices, *kept, *["unrolled"] * result.get("unroll", False)))


def _rates(result: dict) -> str:
    """Tokens without padding, and the share of the GPU's operations."""
    used = (
        f", {result['model_flops_utilisation']:.0%} of the GPU's FLOP/s" if "model_flops_utilisation" in result else ""
    )
    return f", {result['tokens_per_s'] / 1e3:.1f}k tokens/s{used}" if "tokens_per_s" in result else ""


def _compiled(result: dict) -> str:
    return f"; compiles in {result['compile_s']:.0f} s" if "compile_s" in result else ""


def _model(result: dict) -> str:
    return result["model"].replace("qwen2-vl-", "").upper()


def _work(result: dict) -> tuple:
    names = ("what", "rows", "model", "prompt_tokens", "lora", "master_weights")
    return *(result.get(name) for name in names), result.get("devices", 1)


def ops_table(results: list[dict]) -> str:
    """Kernel times of the operations, a row a case: ours, what XLA makes of the formula, the peers, and a copy."""
    lines = ["| | ours | jitted jnp, for attention cuDNN | Liger | best other | copy |", "|---|---|---|---|---|---|"]
    for r in results:
        found = {name: result for name, result in r["results"].items() if "forward_us" in result}
        if "ours" not in found:
            continue
        others = [name for name in found if name not in NOT_OTHERS]
        best = min(others, key=lambda name: _whole(found[name]), default=None)
        cells = [_times(r["op"], found.get(name)) for name in ("ours", "cudnn" if "cudnn" in found else "jnp", "liger")]
        cells += [f"{best} {_times(r['op'], found[best])}" if best else "", _times(r["op"], found.get("copy"))]
        lines.append(f"| `{r['op']}` {r['size']} | {' | '.join(cells)} |")
    ours = [r["results"]["ours"] for r in results if "forward_us" in r["results"].get("ours", {})]
    note = OPS_NOTE + FORWARD_NOTE * any("both_us" not in found for found in ours)
    return "\n".join([*lines, "", note + _measured_on(results)])


def _whole(result: dict) -> float:
    return result.get("both_us", result["forward_us"])["median"]


NOT_OTHERS = ("ours", "xla", "jnp", "cudnn", "liger", "copy")
OPS_NOTE = (
    "Kernel time, forward / forward + backward with all gradients, median of 9, in us; for `linear_cross_entropy` in ms, "
    'and memory on top of inputs and results. "kernel": ours by name, where ours may be XLA\'s by default. "copy": what '
    "XLA takes to read and write as many bytes as the forward pass. A star: a result or gradient is more than 2 % away from "
    "float32. Made by `liger-jax bench ops`. "
)
FORWARD_NOTE = "A single time: forward, of operations without a gradient, on inputs that no cache holds. "


def _times(op: str, result: dict | None) -> str:
    """Forward / forward + backward of one implementation, empty if it was not measured."""
    if result is None:
        return ""
    star = "*" if any(not error <= LARGE_ERROR for error in result.get("errors", {}).values()) else ""
    if "both_us" not in result:
        return _digits(result["forward_us"]["median"]) + star
    forward, both = (result[key]["median"] for key in ("forward_us", "both_us"))
    if op != "linear_cross_entropy":
        return f"{_digits(forward)} / {_digits(both)}{star}"
    memory = f", {result['temp_bytes'] / 2**30:.2f} GiB" if "temp_bytes" in result else ""
    return f"{_digits(forward / 1e3)} / {_digits(both / 1e3)}{star}{memory}"


def _digits(value: float) -> str:
    """Three or more significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _measured_on(results: list[dict]) -> str:
    versions = dict(pair for r in results for pair in r["versions"].items())
    dates = sorted({r["date"] for r in results})
    return f"{results[0]['device']}, bfloat16, {', '.join(f'{n} {v}' for n, v in versions.items())}, {dates[-1]}."


TABLES: dict[str, Callable[[list[dict]], str]] = {"model": model_table, "ops": ops_table}


def table_of(name: str) -> str:
    """The table made from results/<name>.json or, one table a device, from results/<name>_<device>.json."""
    files = [file for file in sorted(RESULTS.glob(f"{name}*.json")) if not file.name.startswith(f"{name}_sweep")]
    return "\n\n".join(TABLES[name](json.loads(file.read_text())) for file in files) or "not measured yet"


def with_tables(readme: str) -> str:
    """The README with each table made anew from the results."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{table_of(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
