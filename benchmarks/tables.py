"""Writes the README's tables from benchmarks/results, so that no figure in it was typed.

python benchmarks/tables.py            # rewrites README.md between its <!-- table: ... --> marks
"""

import json
import pathlib
import re
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, LIGER = "liger-jax", "transformers + Liger"


def model_table(results: list[dict]) -> str:
    """Training, generation and conversion, one line a case; the peer beside it where it ran in the same run."""
    lines = ["| | liger-jax | transformers + Liger |", "|---|---|---|"]
    for what, rows, model, devices in dict.fromkeys(map(_case, results)):
        found = {r["package"]: r for r in results if _case(r) == (what, rows, model, devices)}
        cells = [CELLS[what](found[package]) if package in found else "" for package in (OURS, LIGER)]
        on = f", {devices} GPUs" if devices > 1 else ""
        lines.append(f"| {TITLES[what].format(model=model, rows=rows, devices=devices)}{on} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_on(results)])


TITLES = {
    "convert": "{model}: read and convert the checkpoint",
    "train": "{model}: training step, {rows} rows of 2048 tokens with a 64 x 64-patch image each",
    "generate": "{model}: generation, {rows} x 2048 tokens with such an image, 128 new tokens",
}
CELLS: dict[str, Callable[[dict], str]] = {
    "convert": lambda r: f"{r['seconds']:.1f} s, {r['host_gib_above_start']:.1f} GiB of host memory",
    "train": lambda r: f"{r['step_ms']:.0f} ms, {r['peak_gib']:.1f} GiB" + _compiled(r),
    "generate": lambda r: f"{r['ms_per_token']:.2f} ms a token, prompt {r['prefill_ms']:.0f} ms" + _compiled(r),
}


def _compiled(result: dict) -> str:
    return f"; compiles in {result['compile_s']:.0f} s" if "compile_s" in result else ""


def _case(result: dict) -> tuple:
    model = result["model"].replace("qwen2-vl-", "").upper()
    return result["what"], result.get("rows"), model, result.get("devices", 1)


def rms_norm_table(results: list[dict]) -> str:
    """Kernel times of rms_norm, forward and with the backward pass."""
    lines = ["| rows x width | kernel | jitted jnp | Liger |", "|---|---|---|---|"]
    for r in results:
        times = [f"{r[name]['forward_us']:.1f} / {r[name]['both_us']:.1f}" if name in r else "" for name in RMS_NORM]
        lines.append(f"| {r['rows']} x {r['width']} | {' | '.join(times)} |")
    return "\n".join([*lines, "", "Kernel time in us, forward / forward + backward. " + _measured_on(results)])


RMS_NORM = ("triton", "xla", "liger")


def _measured_on(results: list[dict]) -> str:
    versions = dict(pair for r in results for pair in r["versions"].items())
    dates = sorted({r["date"] for r in results})
    return f"{results[0]['device']}, bfloat16, {', '.join(f'{n} {v}' for n, v in versions.items())}, {dates[-1]}."


TABLES = {"model": model_table, "rms_norm": rms_norm_table}


def with_tables(readme: str) -> str:
    """The README with each table made anew from results/<name>.json."""

    def table(match: re.Match) -> str:
        results = json.loads((RESULTS / f"{match[1]}.json").read_text())
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
