"""What a training step spends its time on: groups of kernels with their lower bounds.

Joins a trace with the program's HLO by name, because in a trace kernels inside CUDA graphs carry no HLO instruction: the
kernel `loop_convert_fusion_36` runs the instruction `loop_convert_fusion.36`, and identical ones.
"""

import datetime
import gzip
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.environment import versions_of
from benchmarks.hlo import Program, operation

MEMORY_RATE = 4.3e12  # bytes per second that large copies reach on an H200
MATMUL_RATE = 801e12  # FLOPs per second that cuBLAS reaches on large square matrices
SMALLEST_SHARE = 0.01  # of the step, for a row in the table
GROUPS = {  # a pattern of the kernels of each; the first match counts
    "attention": r"fa4_jax|flash|cudnn|fmha",
    "matmuls": r"nvjet|gemm|cublas",
    "copies": r"(?i)memcpy",
    "zero fills": r"(?i)memset",
    "norms": r"(layer|rms)_norm_(forward|backward)",
}
NOTES = {  # why a group is not at its floor, by a pattern of its name and operation; the sizes are those of the 2B
    "^matmuls": "the floor is the rate of large square matrices; many of these are smaller or long and narrow",
    "^attention": "no floor: it depends on the segments",
    "^copies": "a scan takes weights out of their stacks and puts results into theirs; gradients of unrolled layers enter "
    "their stacks; a residual is copied before a matmul adds to it",
    "^zero fills": "a scan initializes stacks that are then overwritten",
    "^norms": "the kernels of `pallas_kernels`: so short that the start and the end of each launch count",
    "^optimizer": "AdamW and the norm of the gradients",
    r"forward, convert_element_type, .*,5120\]": "quick GELU: exponentials and divisions, not memory alone",
    r"backward, .*reduce_sum, .*,5120\]": "gradients of quick GELU and of its bias: exponentials and divisions, and a sum",
    r"backward, .*convert_element_type, .*,8960\]": "gradient of SwiGLU",
}


def gpu_events(trace: Path) -> list[dict]:
    """Returns the kernels and copies of the first GPU in a trace."""
    (file,) = trace.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("ph") == "M" and "name" in event.get("args", {})]
    gpus = [e["pid"] for e in named if e["name"] == "process_name" and "GPU" in e["args"]["name"]]
    streams = {(e["pid"], e.get("tid")) for e in named if e["name"] == "thread_name" and "Stream" in e["args"]["name"]}
    return [
        {**event, "name": re.sub(r"\(.*", "", event["name"])}
        for event in events
        if event.get("ph") == "X"
        and event["pid"] == min(gpus, default=None)
        and (event["pid"], event["tid"]) in streams
    ]


def kernel_table(events: list[dict]) -> str:
    """Returns the kernels by name with their summed time, longest first, as a Markdown table."""
    total, count = Counter[str](), Counter[str]()
    for event in events:
        total[event["name"]] += event["dur"]
        count[event["name"]] += 1
    lines = ["| ms | calls | us each | kernel |", "|---|---|---|---|"]
    lines += [f"| {us / 1e3:.2f} | {count[n]} | {us / count[n]:.1f} | `{n}` |" for n, us in total.most_common(60)]
    return f"{total.total() / 1e3:.1f} ms in {count.total()} kernels.\n\n" + "\n".join(lines) + "\n"


def profile_step(events: list[dict], hlo: str) -> dict:
    """Returns the groups of kernels above SMALLEST_SHARE of a step, the longest first, and the time without kernels."""
    calls = Counter(event["name"] for event in events)
    program = Program(hlo, calls)
    groups: dict[str, list[dict]] = defaultdict(list)
    for event in events:
        groups[group_of(event["name"], program)].append(event)
    span_ms = (max((e["ts"] + e["dur"] for e in events), default=0) - min((e["ts"] for e in events), default=0)) / 1e3
    kernel_ms = total_ms(events)
    rows = [group_row(group, of_group, program) for group, of_group in groups.items()]
    rows = [row for row in rows if row["ms"] >= SMALLEST_SHARE * span_ms]
    return {
        "step_ms": span_ms,
        "kernel_ms": kernel_ms,
        "idle_ms": span_ms - kernel_ms,
        "kernels": len(events),
        "groups": sorted(rows, key=lambda row: -row["ms"]),
    }


def total_ms(events: list[dict]) -> float:
    return sum(event["dur"] for event in events) / 1e3


def group_of(kernel: str, program: Program) -> str:
    for group, pattern in GROUPS.items():
        if re.search(pattern, kernel):
            return group
    instructions = program.kernels.get(kernel)
    if not instructions:
        return kernel
    instruction = instructions[0][0]
    if instruction.opcode == "fusion" and not instruction.operands:
        return "zero fills"
    return "optimizer" if operation(instruction).startswith("optimizer") else kernel


def group_row(group: str, events: list[dict], program: Program) -> dict:
    """Returns a group's time, calls and operation, and for those that are known, its bytes or FLOPs and its floor."""
    result = {"group": group, "ms": total_ms(events), "calls": len(events)}
    if group == "matmuls":
        flops = program.matmul_flops()
        return result | {"tflop": flops / 1e12, "floor_ms": flops / MATMUL_RATE * 1e3}
    if group == "attention":  # not bound by memory, and how much it computes depends on the segments
        return result
    if group not in GROUPS and group in program.kernels:
        result["operation"] = operation(program.kernels[group][0][0])
    sizes = [copied_bytes(event) or program.mean_bytes(event["name"]) for event in events]
    moved = sum(size for size in sizes if size is not None)
    return result if None in sizes else result | {"mb": moved / 1e6, "floor_ms": moved / MEMORY_RATE * 1e3}


def copied_bytes(event: dict) -> int | None:
    """Returns the bytes that a copy reads and writes, or that a fill writes, according to the trace."""
    details = " ".join(str(value) for value in event.get("args", {}).values())
    if bits := re.match(r"memcpy(\d+)", event["name"]):  # XLA's kernel: each thread copies one vector
        sizes = re.search(r"grid:(\d+),(\d+),(\d+) block:(\d+)", details)
        return 2 * int(bits[1]) // 8 * math.prod(map(int, sizes.groups())) if sizes else None
    size = re.search(r"\b(num_bytes|size):(\d+)", details)
    return int(size[2]) * (1 if size[1] == "num_bytes" else 2) if size else None


def groups_table(profile: dict) -> str:
    """Returns the groups of a profiled step as a Markdown table."""
    step_ms, groups = profile["step_ms"], profile["groups"]
    lines = [
        "| group | ms | share | calls | us each | MB each | floor, us each | operation | notes |",
        "|---" * 9 + "|",
    ]
    for row in groups:
        ms, calls, name = row["ms"], row["calls"], row["group"]
        rate = f"{row['tflop']:.1f} TFLOP, {row['tflop'] / ms * 1e3:.0f} TFLOP/s" if "tflop" in row else ""
        label = row.get("operation", rate)
        notes = [note for pattern, note in NOTES.items() if re.search(pattern, f"{name} {label}")]
        cells = [f"`{name}`" if "_" in name else name, f"{ms:.1f}", f"{ms / step_ms:.1%}", f"{calls}"]
        cells += [f"{ms / calls * 1e3:.1f}", f"{row['mb'] / calls:.1f}" if "mb" in row else ""]
        cells += [f"{row['floor_ms'] / calls * 1e3:.1f}" if "floor_ms" in row else "", label, "; ".join(notes)]
        lines.append(f"| {' | '.join(cells)} |")
    other = profile["kernel_ms"] - sum(row["ms"] for row in groups)
    if groups:
        lines.append(f"| every other kernel | {other:.1f} | {other / step_ms:.1%} |" + " |" * 6)
    versions = ", ".join(f"{name} {version}" for name, version in profile["versions"].items())
    lines += [
        "",
        f"A step of {step_ms:.1f} ms: {profile['kernels']:,} kernels take {profile['kernel_ms']:.1f} ms; "
        f"{_idle(profile['idle_ms'])}. {profile['device']}, {versions}, {profile['date']}.",
    ]
    return "\n".join(lines)


def _idle(ms: float) -> str:
    return f"the GPU is idle for {ms:.1f} ms" if ms >= 0 else f"at least {-ms:.1f} ms of them run beside others"


def write_profile(file: Path, trace: Path, hlo: str, device: str) -> None:
    """Writes the groups of a traced step to a JSON file, and groups and kernels to a Markdown file of the same name.

    Args:
        file: the files, without suffix.
        trace: the folder that `jax.profiler.trace` wrote.
        hlo: the text of the compiled program.
        device: the name of the GPU.
    """
    events = gpu_events(trace)
    origin = {"date": datetime.date.today().isoformat(), "device": device, "versions": versions_of(("jax", "fa4-jax"))}
    profile = origin | profile_step(events, hlo)
    file.with_suffix(".json").write_text(json.dumps(profile, indent=1) + "\n")
    file.with_suffix(".md").write_text(f"{groups_table(profile)}\n\n{kernel_table(events)}")
