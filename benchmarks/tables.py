"""`python -m benchmarks tables`: writes the tables of README.md and docs/ from benchmarks/results.

Tables are never edited by hand. A table is the text between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import start
from benchmarks.environment import RESULTS, ROOT
from benchmarks.memory import batch_table, memory_table
from benchmarks.profile import groups_table
from benchmarks.programs import LARGE_ERROR
from benchmarks.record import FAMILY_NAMES, OURS
from benchmarks.soak import growth
from pallas_kernels.registry import OPERATIONS


@dataclasses.dataclass(frozen=True)
class Tables:
    """Writes the tables of README.md and docs/ from the results."""

    root: Path = ROOT
    """Folder of README.md and docs."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> str:
        """Rewrites the pages. Returns the names of those that have a table."""
        written = []
        for page in pages(self.root):
            text = page.read_text()
            if MARK.search(text):
                page.write_text(with_tables(text, self.results))
                written.append(str(page.relative_to(self.root)))
        return "\n".join(written)


MARK = re.compile(r"<!-- table: (\w+) -->.*?<!-- end -->", re.DOTALL)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_tables(text: str, results: Path = RESULTS) -> str:
    """Returns a page with every table rebuilt from the results."""

    def rebuild(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return MARK.sub(rebuild, text)


def _read(results: Path, prefix: str) -> list[list[dict]]:
    """Returns the entries of <prefix>.json and <prefix>_<device>.json, one list per file."""
    files = [file for file in sorted(results.glob(f"{prefix}*.json")) if not file.name.startswith(f"{prefix}_sweep")]
    return [json.loads(file.read_text()) for file in files]


def _measured_on(results: list[dict]) -> str:
    versions = dict(pair for r in results for pair in r["versions"].items())
    dates = sorted({r["date"] for r in results})
    devices = ", ".join(dict.fromkeys(r["device"] for r in results))
    period = dates[-1] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{devices}, bfloat16, {', '.join(f'{n} {v}' for n, v in versions.items())}, {period}."


# ---- training, generation, conversion -----------------------------------------------------------------------------------

TITLES = {
    "convert": "{model}: read and convert the checkpoint",
    "train": "{model}: training step, batch {rows}",
    "train mixed": "{model}: training step, batch {rows}, packed with images of 224 to 1344 px a side",
    "generate": "{model}: generation, {rows} x {prompt_tokens} tokens, 128 new tokens each",
    "start": "{model}: from process start to the first token, weights in {weights}, {programs} compilation cache",
}
CELLS: dict[str, Callable[[dict], str]] = {
    "convert": lambda r: f"{r['seconds']:.1f} s, {r['host_gib_above_start']:.1f} GiB of host memory",
    "train": lambda r: _step_cell(r) + _rates(r) + _compilation(r),
    "train mixed": lambda r: CELLS["train"](r),
    "generate": lambda r: f"{r['ms_per_token']:.2f} ms per token, prefill {r['prefill_ms']:.0f} ms" + _compilation(r),
    "start": lambda r: (
        f"{r['seconds']:.1f} s: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["parts"].items())
        + f"; the remaining {start.NEW_TOKENS - 1} tokens of the answer: {r['rest_s']:.1f} s"
    ),
}


def model_table(results: list[dict]) -> str:
    """Returns one row per case, with the best result of transformers in the same case on the same kind of GPU."""
    lines = ["| | liger-jax | transformers |", "|---|---|---|"]
    order = list(TITLES)
    results = sorted(
        results,
        key=lambda r: (r["model"], order.index(r["what"]), r.get("rows", 0), r.get("devices", 1), str(r.get("device"))),
    )
    usual_device = _usual_device(results)
    for result in (r for r in results if r["package"] == OURS):
        title = TITLES[result["what"]].format(**{"prompt_tokens": 2048} | result | {"model": _model(result)})
        peer = _best_peer(result, results)
        device = "" if result.get("device") == usual_device else f", on an {result['device']}"
        peer_cell = _cell(peer, [_package(peer)] if peer else [])
        notes = ["peer measured in another run"] if peer_cell and result.get("without_peers") else []
        lines.append(f"| {title}{_options(result)}{device} | {_cell(result, notes)} | {peer_cell} |")
    return "\n".join([*lines, "", _measured_on(results)])


def _usual_device(results: list[dict]) -> str | None:
    """Returns the device of most results."""
    return Counter(r.get("device") for r in results).most_common(1)[0][0]


def _best_peer(result: dict, results: list[dict]) -> dict | None:
    """Returns the fastest peer; if all ran out of memory, one of them."""
    peers = [r for r in results if r["package"] != OURS and _work(r) == _work(result)]
    return min(peers, key=lambda r: r.get("step_ms", r.get("ms_per_token", math.inf)), default=None)


def _work(result: dict) -> tuple:
    """Returns the fields in which a result and its peers must agree."""
    names = ("what", "rows", "model", "device", "mesh", "prompt_tokens", "tokens", "lora", "master_weights")
    return tuple(result.get(name) for name in names)


def _cell(result: dict | None, notes: Sequence[str] = ()) -> str:
    if result is None:
        return ""
    if "error" in result:
        return result["error"]
    return CELLS[result["what"]](result) + (f" ({', '.join(notes)})" if any(notes) else "")


def _package(result: dict) -> str:
    """Returns how transformers was run: with Liger's kernels, with checkpointing, with which cache."""
    parts = [result["package"].removeprefix("transformers").replace(" + ", "")]
    parts += ["checkpointing"] * (result.get("remat") == "full")
    parts += [f"{result.get('cache')} cache"] * ("cache" in result)
    return ", ".join(filter(None, parts))


def _options(result: dict) -> str:
    options = [f"{result.get('tokens')} tokens each"] * ("tokens" in result)
    options += [f"{result['devices']} GPUs ({result['mesh']})"] if "mesh" in result else []
    options += [f"limited to {result.get('memory_limit_gib')} GiB a GPU"] * ("memory_limit_gib" in result)
    options += [f"LoRA of rank {result.get('lora')}"] * ("lora" in result)
    options += ["float32 master weights"] * result.get("master_weights", False)
    options += [f'remat "{result.get("remat")}"'] * (result.get("remat", "dots") not in ("dots", "auto"))
    options += ["FlashAttention-4"] * (result.get("attention") == "fa4")
    options += {"none": ["scanned"], "all": ["all layers unrolled"]}.get(result.get("unroll", ""), [])
    return "".join(f", {option}" for option in options)


def _rates(result: dict) -> str:
    """Returns tokens per second without padding, and the model FLOPs utilisation (MFU)."""
    text = f", {result['tokens_per_s'] / 1e3:.1f}k tokens/s" if "tokens_per_s" in result else ""
    if text and "model_flops_utilisation" in result:
        text += f", {result['model_flops_utilisation']:.0%} MFU"
    return text


def _compilation(result: dict) -> str:
    return f"; compiles in {result['compile_s']:.0f} s" if "compile_s" in result else ""


def _model(result: dict) -> str:
    """Returns the name of a model: "Qwen2.5-VL 3B" for "qwen2.5-vl-3b"."""
    family, _, size = result["model"].rpartition("-")
    return f"{family.replace('qwen', 'Qwen').replace('vl', 'VL')} {size.upper()}"


# ---- operations ---------------------------------------------------------------------------------------------------------

OWN_COLUMNS = ("ours", "xla", "jnp", "cudnn", "liger", "copy")  # every other implementation is in "best other"
OPS_NOTE = (
    "Kernel times in us: forward / forward + backward with all gradients, median of 9. `linear_cross_entropy`: in ms, with "
    'the memory used on top of inputs and results. "kernel": our Pallas kernel, where `implementation=None` is XLA. '
    '"copy": the time XLA takes to read and write as many bytes as the forward pass. A star marks a result or gradient that '
    "differs from float32 by more than 2 %. Measured by `python -m benchmarks ops`. "
)
FORWARD_NOTE = "A single time is the forward pass of an operation without a gradient, on inputs that are in no cache. "


def ops_table(results: list[dict]) -> str:
    """Returns kernel times, one row per case: ours, jitted jnp or cuDNN, the peers, and a copy."""
    lines = [
        "| | liger-jax | jitted jnp (cuDNN for attention) | Liger | best other | copy |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        timed = {name: result for name, result in r["results"].items() if "forward_us" in result}
        if "ours" not in timed:
            continue
        best = min((name for name in timed if name not in OWN_COLUMNS), key=lambda n: _total(timed[n]), default=None)
        xla = "cudnn" if "cudnn" in timed else "jnp"
        cells = [_times(r["op"], timed.get(name)) for name in ("ours", xla, "liger")]
        cells += [f"{best} {_times(r['op'], timed[best])}" if best else "", _times(r["op"], timed.get("copy"))]
        lines.append(f"| `{r['op']}` {r['size']}{_attention(r)} | {' | '.join(cells)} |")
    timed = [r["results"]["ours"] for r in results if "forward_us" in r["results"].get("ours", {})]
    note = OPS_NOTE + FORWARD_NOTE * any("both_us" not in result for result in timed)
    return "\n".join([*lines, "", note + _measured_on(results)])


def _attention(result: dict) -> str:
    """Returns the label of cases that were measured with FlashAttention-4."""
    return ", FlashAttention-4" * (result["op"] == "attention" and "fa4-jax" in result["versions"])


def kernels_table(results: list[dict]) -> str:
    """Returns one row per operation: the first measured case, its time, and the times of plain XLA and of Liger."""
    lines = ["| operation | size | liger-jax, us | jitted jnp, us | Liger, us |", "|---|---|---|---|---|"]
    first = {r["op"]: r for r in reversed(results) if "forward_us" in r["results"].get("ours", {})}
    for r in sorted(first.values(), key=results.index):
        plain = "cudnn" if r["op"] == "attention" else "jnp"
        cells = [_microseconds(r["results"].get(name)) for name in ("ours", plain, "liger")]
        cells[1] += " (cuDNN)" * (r["op"] == "attention")
        lines.append(f"| `{r['op']}` | {r['size']}{_attention(r)} | {' | '.join(cells)} |")
    missing = [f"`{name}`" for name in OPERATIONS if name not in first]
    note = f"Not measured alone: {', '.join(missing)}. " if missing else ""
    return "\n".join([*lines, "", note + _measured_on(results)])


def _microseconds(result: dict | None) -> str:
    """Returns "forward / forward + backward" of one implementation, or an empty cell if it was not measured."""
    if result is None or "forward_us" not in result:
        return ""
    return " / ".join(_digits(result[key]["median"]) for key in ("forward_us", "both_us") if key in result)


def _total(result: dict) -> float:
    return result.get("both_us", result["forward_us"])["median"]


def _times(op: str, result: dict | None) -> str:
    """Returns "forward / forward + backward" of one implementation; an empty cell if it was not measured."""
    if result is None:
        return ""
    star = "*" if any(not error <= LARGE_ERROR for error in result.get("errors", {}).values()) else ""
    if "both_us" not in result:
        return _digits(result["forward_us"]["median"]) + star
    forward_us, both_us = (result[key]["median"] for key in ("forward_us", "both_us"))
    if op != "linear_cross_entropy":
        return f"{_digits(forward_us)} / {_digits(both_us)}{star}"
    memory = f", {result['temp_bytes'] / 2**30:.2f} GiB" if "temp_bytes" in result else ""
    return f"{_digits(forward_us / 1e3)} / {_digits(both_us / 1e3)}{star}{memory}"


def _digits(value: float) -> str:
    """Returns a number with at least three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ---- headline -----------------------------------------------------------------------------------------------------------

HEADLINE_LOSS = "linear_cross_entropy 8192 x 1536 x 151936"
HEADLINE_MODELS = ("qwen2.5-vl-7b", "qwen3-vl-8b")  # besides Qwen2-VL 2B; the rows of those that are measured


TRAINING_STEP = "training step, {rows} sequences of 2048 tokens with an image each"
NEW_TOKEN = "new token, after a prompt of 2048 tokens"


def headline_table(model: list[dict], ops: list[dict]) -> str:
    """Returns a training step and a new token of several models, and the loss with its memory."""
    model = [r for r in model if r.get("device") == _usual_device(model)]
    options = {"model": "qwen2-vl-2b", "package": OURS, "devices": 1}
    train = _find(
        model, {**options, "what": "train", "rows": 4, "remat": "dots", "unroll": "vision", "attention": "fa4"}
    )
    decode = _find(model, {**options, "what": "generate", "rows": 1, "attention": None})
    lines = ["| | liger-jax | peer |", "|---|---|---|"]
    for title, result, cell in (
        (f"{TRAINING_STEP}, FlashAttention-4", train, _step_cell),
        (NEW_TOKEN, decode, _token_cell),
        *((TRAINING_STEP, result, _step_cell) for result in _fastest(model, "train", "step_ms")),
        *((NEW_TOKEN, result, _token_cell) for result in _fastest(model, "generate", "ms_per_token")),
    ):
        peer = _best_peer(result, model)
        cache = f", {peer.get('cache')} cache" if peer and "cache" in peer else ""
        peer_cell = f"{peer['package']}{cache}: {peer['error'] if 'error' in peer else cell(peer)}" if peer else ""
        lines.append(f"| {_model(result)}: {title.format(rows=result['rows'])} | {cell(result)} | {peer_cell} |")
    (loss,) = (entry["results"] for entry in ops if entry["case"] == HEADLINE_LOSS)
    peers = [
        f"{name}: {_loss_cell(loss[key])}" for name, key in (("Liger", "liger"), ("torch.compile", "torch.compile"))
    ]
    title = "Qwen2-VL 2B: `linear_cross_entropy` and its gradients, 8192 tokens"
    lines.append(f"| {title} | {_loss_cell(loss['ours'])} | {'; '.join(peers)} |")
    return "\n".join(
        [*lines, "", f"One {train['device']}, bfloat16, random weights; see [benchmarks](docs/benchmarks.md)."]
    )


def _plain(results: list[dict]) -> list[dict]:
    """Returns the results without LoRA, master weights, another length or a lowered limit of memory."""
    return [r for r in _usual_work(results) if "memory_limit_gib" not in r]


def _usual_work(results: list[dict]) -> list[dict]:
    """Returns the results without LoRA, master weights or another length."""
    return [r for r in results if not {"lora", "master_weights", "prompt_tokens", "tokens"} & r.keys()]


def _find(results: list[dict], fields: dict) -> dict:
    """Returns the only result with these fields and without LoRA, master weights or another length."""
    (result,) = (r for r in _plain(results) if all(r.get(name) == value for name, value in fields.items()))
    return result


def _fastest(results: list[dict], benchmark: str, measure: str) -> list[dict]:
    """Returns the best result of each of HEADLINE_MODELS: with 4 rows in training, or fewer if only that has a peer."""
    best = []
    for name in HEADLINE_MODELS:
        own = [r for r in _plain(results) if (r["package"], r["model"], r["what"]) == (OURS, name, benchmark)]
        own = [r for r in own if r.get("devices", 1) == 1 and r["rows"] <= (4 if benchmark == "train" else 1)]
        compared = [r for r in own if "error" not in (_best_peer(r, results) or {"error": "no peer"})]
        if candidates := compared or own:
            rows = max(r["rows"] for r in candidates)
            best.append(min((r for r in candidates if r["rows"] == rows), key=lambda r: r[measure]))
    return best


def _step_cell(result: dict) -> str:
    return f"{result['step_ms']:.0f} ms" + (f", {result['peak_gib']:.1f} GiB" if "peak_gib" in result else "")


def _token_cell(result: dict) -> str:
    return f"{result['ms_per_token']:.2f} ms"


def _loss_cell(result: dict) -> str:
    return f"{_digits(result['both_us']['median'] / 1e3)} ms, {result['temp_bytes'] / 2**30:.2f} GiB"


# ---- convergence -----------------------------------------------------------------------------------------------------


def convergence_table(reports: list[dict]) -> str:
    """Returns how training in bfloat16 compares with float32 and with transformers, per family and peak learning rate."""
    if not reports:
        return NOT_MEASURED
    order = list(FAMILY_NAMES)
    reports = sorted(reports, key=lambda report: (order.index(report.get("family", "qwen2_vl")), report["peak"]))
    families = [FAMILY_NAMES[report.get("family", "qwen2_vl")] for report in reports]
    rates = [f"{report['peak']:.0e}".replace("e-0", "e-") for report in reports]
    columns = [f"{family}, peak rate {rate}" for family, rate in zip(families, rates, strict=True)]

    def row(title: str, finding: str) -> str:
        shares = [f"{report['findings'][finding]:.2%}" for report in reports]
        return f"| {title} | {' | '.join(shares)} |"

    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for package in (OURS, "transformers"):
        lines += [
            row(
                f"{package}: loss drop in bfloat16, share of float32's",
                f"{package}: loss drop in bfloat16, share of float32's",
            ),
            row(
                f"{package}: bfloat16 weights that differ from the start",
                f"{package}: share of bfloat16 weights changed from the start",
            ),
        ]
    lines += [
        row("liger-jax in float32: largest distance from transformers", "float32: largest relative distance"),
        row(
            "liger-jax: second moments in bfloat16, largest distance of a tensor's mean from float32 sums",
            "second moments, mean of a tensor: largest relative distance to float32 sums of the same gradients",
        ),
    ]
    notes: dict[str, list[str]] = {}  # the families of each
    for family, report in zip(families, reports, strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        note = f"{report['device']}, {report['steps']} steps, {versions}, {report['date']}."
        notes.setdefault(note, []).append(family)
    several = len(notes) > 1
    footer = [f"{', '.join(dict.fromkeys(of))}: {note}" if several else note for note, of in notes.items()]
    return "\n".join([*lines, "", " ".join(footer)])


# ---- soak ------------------------------------------------------------------------------------------------------------


def soak_table(report: dict) -> str:
    """Returns the memory and the compilations of each run of one device."""
    lines = [
        "| | kinds of shapes and options | programs compiled in the warm-up | after it | memory after warm-up | change |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in report["runs"].items():
        first, last = (run["memory"][i] / 2**20 for i in (0, -1))
        lines.append(
            f"| {run['count']:,} {name} | {run['kinds']} | {run['programs']} | {run['compilations_after_warm_up']} | "
            f"{first:.1f} MiB, at the end {last:.1f} MiB | at most {growth(run['memory']):.2%} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"{report['device']}, {versions}, {report['date']}."])


# ---- faults ----------------------------------------------------------------------------------------------------------


def faults_table(rows: list[dict]) -> str:
    """Returns how many trials of each fault passed, and the line that the command printed."""
    lines = ["| fault | trials | passed | printed |", "|---|---|---|---|"]
    for row in rows:
        printed = f"`{row['printed']}`".replace("|", "\\|") if row["printed"] else ""
        lines.append(f"| {row['fault']} | {row['tried']} | {row['passed']} | {printed} |")
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    return "\n".join([*lines, "", f"On a CPU, {versions}, {max(row['date'] for row in rows)}."])


NOT_MEASURED = "not measured yet"
# ---- scaling ------------------------------------------------------------------------------------------------------------


def scaling_table(plans: list[dict], measured: list[dict]) -> str:
    """Returns one row per model and number of GPUs: the planned mesh, and what was measured on as many GPUs."""
    lines = [
        "| | GPUs | mesh | remat | GiB per GPU | step | tokens/s | efficiency | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in plans:
        if not plan["fits"]:
            cells = ["does not fit", "", f"{plan['gib']:.0f}", "", "", ""]
        else:
            cells = [_mesh_name(plan) or "none", plan["remat"], f"{plan['gib']:.0f}", f"{plan['step_ms']:.0f} ms"]
            cells += [f"{plan['tokens_per_s'] / 1e3:.0f}k", f"{plan['efficiency']:.0%}"]
        lines.append(f"| {_model(plan)} | {plan['gpus']} | {' | '.join(cells)} | {_measured_step(plan, measured)} |")
    kinds = ", ".join(dict.fromkeys(plan["gpu"] for plan in plans))
    return "\n".join(
        [*lines, "", f"All columns but the last are computed, for {kinds}, by `python -m benchmarks scaling`."]
    )


def _mesh_name(plan: dict) -> str:
    return " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())


def _measured_step(plan: dict, measured: list[dict]) -> str:
    """Returns the fastest step that was measured with a plan's model, mesh and sequences, as it runs by default.

    With more memory than planned, a step may gather all weights at once, so only those within 10 % of the planned memory
    count.
    """
    same = [
        r
        for r in _usual_work(measured)
        if r["package"] == OURS
        and r["what"] == "train"
        and (r["model"], r.get("mesh", "")) == (plan["model"], _mesh_name(plan))
        and (r["rows"], r["remat"]) == (4 * plan["gpus"], plan["remat"])
        and r.get("unroll") != "all"
        and abs(r.get("peak_gib", plan["gib"]) / plan["gib"] - 1) < 0.1
    ]
    if not same:
        return ""
    best = min(same, key=lambda r: r["step_ms"])
    return f"{_step_cell(best)} on {best['device']}"


TABLES: dict[str, Callable[[Path], str]] = {
    "model": lambda results: "\n\n".join(map(model_table, _read(results, "model"))) or NOT_MEASURED,
    "ops": lambda results: "\n\n".join(map(ops_table, _read(results, "ops"))) or NOT_MEASURED,
    "convergence": lambda results: convergence_table(_read(results, "convergence")),
    "soak": lambda results: "\n\n".join(map(soak_table, _read(results, "soak"))) or NOT_MEASURED,
    "faults": lambda results: "\n\n".join(map(faults_table, _read(results, "faults"))) or NOT_MEASURED,
    "profile": lambda results: "\n\n".join(map(groups_table, _read(results, "profile_2b_x4"))) or NOT_MEASURED,
    "memory": lambda results: "\n\n".join(map(memory_table, _read(results, "memory"))) or NOT_MEASURED,
    "memory_batches": lambda results: "\n\n".join(map(batch_table, _read(results, "memory"))) or NOT_MEASURED,
    "kernels": lambda results: "\n\n".join(map(kernels_table, _read(results, "ops"))) or NOT_MEASURED,
    "scaling": lambda results: (
        "\n\n".join(scaling_table(plans, *_read(results, "model")) for plans in _read(results, "scaling"))
        or NOT_MEASURED
    ),
    "headline": lambda results: headline_table(*_read(results, "model"), *_read(results, "ops")),
}
