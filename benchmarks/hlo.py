"""HLO text of a compiled program: how often its instructions run, and the bytes and FLOPs that they take."""

import dataclasses
import math
import re
from collections import Counter, defaultdict

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}

CALLERS = ("fusion", "call", "while", "conditional", "async-start")  # opcodes of instructions that run computations


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
        return sum(math.prod(shape) * ITEM_BYTES.get(dtype, 4) for dtype, shape in arrays(self.shapes))

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


def arrays(shapes: str) -> list[tuple[str, list[int]]]:
    """Returns (dtype, shape) of each array: [("bf16", [4, 8])] for "bf16[4,8]{1,0}"."""
    matches = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return [(dtype, [int(size) for size in shape.split(",") if size]) for dtype, shape in matches]


class Program:
    """A compiled program, parsed from its HLO text.

    Args:
        hlo: the text.
        calls: {kernel: number of calls} in a run of the program.
    """

    def __init__(self, hlo: str, calls: Counter[str]):
        self.calls = calls
        self.computations: dict[str, Computation] = {}
        entry, current = "", Computation()
        for line in hlo.split("\n"):
            if header := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
                current = self.computations[header[2]] = {}
                entry = header[2] if header[1] else entry
            elif parsed := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)?(.*)", line):
                name, shapes, opcode, operands, attributes = parsed.groups()
                names = [operands] if opcode == "parameter" else re.findall(r"%([\w.\-]+)", operands)
                current[name] = Instruction(name, shapes, opcode, names, attributes)
        self.executions = Counter[str]()  # of each computation
        self._count_executions(entry, 1)
        self.kernels: dict[str, list[tuple[Instruction, str]]] = defaultdict(list)  # instructions, their computations
        for computation in self.executions:
            for instruction in self.computations[computation].values():
                if instruction.opcode in ("fusion", "custom-call"):
                    self.kernels[kernel_name(instruction)].append((instruction, computation))

    def _count_executions(self, name: str, count: int) -> None:
        """Adds the executions of a computation and of those it calls.

        The trace tells how often a branch or a loop of unknown length ran: as often as the kernels named after its fusions.
        Of identical ones, the first counts for all.
        """
        self.executions[name] += count
        for instruction in self.computations[name].values():
            if instruction.opcode not in CALLERS:
                continue
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
            for called in re.findall(r"%([\w.\-]+)", instruction.attributes):
                if called not in self.computations:
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
                    (dims,) = re.findall(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
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
            return instruction.size + sum(computation[name].size for name in instruction.operands)
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
        runs = self.kernels.get(kernel, ())
        total = sum(self.executions[name] for _, name in runs)
        moved = sum(self.executions[name] * self.bytes_moved(i, self.computations[name]) for i, name in runs)
        return moved / total if total else None


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
