"""What a training step spends its time on: groups of kernels with their lower bounds, from a trace and the program's HLO.

Kernels inside CUDA graphs carry no HLO instruction in a trace, so they are matched by name: the kernel
`loop_convert_fusion_36` runs the instruction `loop_convert_fusion.36`, and identical ones.
"""

import dataclasses
import gzip
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

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
NOTES: dict[str, str] = {}  # why a group, or an operation, is not at its floor
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `%name = shapes opcode(operands), attributes`."""

    name: str
    shapes: str
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def size(self) -> int:
        return sum(math.prod(shape) * BYTES.get(dtype, 4) for dtype, shape in arrays(self.shapes))

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def arrays(shapes: str) -> list[tuple[str, list[int]]]:
    """Returns (dtype, shape) of each array: [("bf16", [4, 8])] for "bf16[4,8]{1,0}"."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return [(dtype, [int(size) for size in shape.split(",") if size]) for dtype, shape in found]


class Program:
    """A compiled program, parsed from its HLO text.

    Args:
        hlo: the text.
        calls: {kernel: number of calls} in a run of the program.
    """

    def __init__(self, hlo: str, calls: Counter[str]):
        self.calls = calls
        self.computations: dict[str, Computation] = {}
        for line in hlo.split("\n"):
            if header := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else getattr(self, "entry", "")
            elif parsed := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)?(.*)", line):
                name, shapes, opcode, operands, attributes = parsed.groups()
                names = [operands] if opcode == "parameter" else re.findall(r"%([\w.\-]+)", operands)
                current[name] = Instruction(name, shapes, opcode, names, attributes)
        self.executions = Counter[str]()  # of each computation
        self._count_executions(self.entry, 1)
        self.kernels: dict[str, list[tuple[Instruction, str]]] = defaultdict(list)
        for computation in self.executions:  # the instructions of each kernel, with their computations
            for instruction in self.computations[computation].values():
                self.kernels[kernel_name(instruction)].append((instruction, computation))

    def _count_executions(self, name: str, count: int) -> None:
        """Adds the executions of a computation and of those it calls.

        The trace tells how often a branch or a loop of unknown length ran: as often as the kernels named after its fusions.
        Of identical ones, the first counts for all.
        """
        self.executions[name] += count
        for instruction in self.computations[name].values():
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
            for key, called in re.findall(r"(\w+)=\{?%([\w.\-]+)", instruction.attributes):
                if called not in self.computations or (key == "to_apply" and instruction.opcode != "call"):
                    continue
                if trips or instruction.opcode not in ("while", "conditional"):
                    self._count_executions(called, count * int(trips[1] if trips else 1))
                else:
                    fusions = [kernel_name(i) for i in self.computations[called].values() if i.opcode == "fusion"]
                    known = Counter(self.calls[kernel] for kernel in fusions if self.calls[kernel])
                    self._count_executions(called, known.most_common(1)[0][0] if known else 0)

    def matmul_flops(self) -> int:
        """Returns the FLOPs of all calls of cuBLAS: twice the elements of the result times the contracted sizes."""
        total = 0
        for name, count in self.executions.items():
            for instruction in self.computations[name].values():
                if '"__cublas$' in instruction.attributes:
                    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)[1]
                    left = arrays(self.computations[name][instruction.operands[0]].shapes)[0][1]
                    contracted = math.prod(left[int(dim)] for dim in re.findall(r"\d+", dims))
                    total += 2 * count * contracted * math.prod(arrays(instruction.shapes)[0][1])
        return total

    def bytes_moved(self, instruction: Instruction, computation: Computation) -> int:
        """Returns the bytes of outputs and operands; of an operand that is only sliced, those of the slices.

        Of a stack that is updated in place, only the update counts.
        """
        called = re.search(r"calls=%([\w.\-]+)", instruction.attributes)
        if not called:
            return instruction.size + sum(
                computation[name].size for name in instruction.operands if name in computation
            )
        fused = self.computations[called[1]]
        users: dict[str, list[Instruction]] = defaultdict(list)
        for user in fused.values():
            for operand in user.operands:
                users[operand].append(user)

        def read(source: Instruction) -> int:
            total = 0
            for user in users[source.name]:
                if user.opcode == "bitcast":
                    total += read(user)
                elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == source.name:
                    total += user.size
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                    return source.size
            return min(total, source.size)

        def written(result: Instruction) -> int:
            if result.opcode in ("tuple", "bitcast"):
                return sum(written(fused[name]) for name in result.operands)
            return fused[result.operands[1]].size if result.opcode == "dynamic-update-slice" else result.size

        root = next(reversed(fused.values()))  # XLA prints it last
        return written(root) + sum(read(i) for i in fused.values() if i.opcode == "parameter")

    def mean_bytes(self, kernel: str) -> float | None:
        """Returns the bytes that a call of a kernel moves, or None if the program does not tell."""
        runs = [
            (self.bytes_moved(i, self.computations[c]), self.executions[c]) for i, c in self.kernels.get(kernel, ())
        ]
        total = sum(count for _, count in runs)
        return sum(size * count for size, count in runs) / total if total else None


def kernel_name(instruction: Instruction) -> str:
    """Returns the name that the kernel of an instruction has in a trace."""
    pallas = re.search(r"(\w+)/pallas_call$", instruction.op_name)
    return pallas[1] if pallas and instruction.opcode == "custom-call" else re.sub(r"\W", "_", instruction.name)


def operation(instruction: Instruction) -> str:
    """Returns what an instruction computes: "backward, reduce_sum" and the shape of its largest result."""
    *scopes, last = instruction.op_name.removesuffix("/pallas_call").split("/")
    path = "/".join(scopes)
    part = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "optimizer"
    part += ", recomputed" * ("rematted_computation" in path)
    dtype, shape = max(arrays(instruction.shapes), key=lambda array: math.prod(array[1]))
    return f"{part}, {last}, {dtype}[{','.join(str(size) for size in shape if size > 1)}]"


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
    if None in sizes:
        return result
    return result | {"mb": sum(sizes) / 1e6, "floor_ms": sum(sizes) / MEMORY_RATE * 1e3}


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
        operation = row.get("operation", rate)
        notes = [note for pattern, note in NOTES.items() if re.search(pattern, f"{name} {operation}")]
        cells = [f"`{name}`" if "_" in name else name, f"{ms:.1f}", f"{ms / step_ms:.1%}", f"{calls}"]
        cells += [f"{ms / calls * 1e3:.1f}", f"{row['mb'] / calls:.1f}" if "mb" in row else ""]
        cells += [f"{row['floor_ms'] / calls * 1e3:.1f}" if "floor_ms" in row else "", operation, "; ".join(notes)]
        lines.append(f"| {' | '.join(cells)} |")
    other = profile["kernel_ms"] - sum(row["ms"] for row in groups)
    lines += [f"| every other kernel | {other:.1f} | {other / step_ms:.1%} |" + " |" * 6] * bool(groups)
    versions = ", ".join(f"{name} {version}" for name, version in profile["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"A step of {step_ms:.1f} ms: {profile['kernels']:,} kernels take {profile['kernel_ms']:.1f} ms, and no kernel runs "
            f"for {profile['idle_ms']:.1f} ms. {profile['device']}, {versions}, {profile['date']}.",
        ]
    )


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
