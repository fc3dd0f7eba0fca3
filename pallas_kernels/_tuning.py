"""Block sizes: measured ones from tuned/<device kind>.json, which `python -m pallas_kernels.tune` writes, else a rule."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax

TUNED = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel over rows is cut up."""

    rows: int  # of one block
    num_warps: int
    programs: int = 0  # that take turns with the blocks of rows; 0: one for each
    columns: int = 0  # of one block, in kernels that do not hold rows at full width
    loads: int = 1  # turns of a loop around a product whose loads are under way at once


def blocks(op: str, *, rows: int, width: int) -> Blocks:
    """The measured blocks for this width, at the nearest number of rows; else the rule's."""
    measured = [entry for entry in _tuned(device_kind()) if entry["op"] == op and entry["width"] == width]
    if not measured:
        return rule(op, width=width)
    nearest = min(measured, key=lambda entry: abs(math.log2(entry["rows"]) - math.log2(max(rows, 1))))
    return Blocks(**nearest["blocks"])


def rule(op: str, *, width: int) -> Blocks:
    """What was good on an H200 at most widths: 4 to 32 numbers a thread, two programs an SM where rows are summed."""
    block_width = 1 << max(width - 1, 0).bit_length()
    columns = min(block_width, COLUMNS.get(_family(op), block_width))
    rows = max(1, min(64, NUMBERS[_family(op)] // columns))
    num_warps = min(max(rows * columns // 512, 4), 16)
    return Blocks(
        rows=rows,
        num_warps=num_warps,
        programs=264 if op.endswith("norm_backward") else 0,
        columns=columns if _family(op) in COLUMNS else 0,
        loads=LOADS.get(_family(op), 1),
    )


# A block has so many numbers, and at most so many columns where rows are not held at full width.
NUMBERS = {"one_row": 512, "norm": 4096, "gate": 2048, "rope": 2048, "cross_entropy": 8192}
COLUMNS = {"one_row": 512, "gate": 1024, "cross_entropy": 4096}
LOADS = {"one_row": 3}
# What the tuner tries.
CHOICES = {
    "one_row": {"rows": (1, 2, 4, 8), "num_warps": (1, 2, 4), "columns": (512, 1024), "loads": (1, 2, 3)},
    "norm": {"rows": (1, 2, 4), "num_warps": (2, 4, 8, 16), "programs": (0, 132, 264, 528)},
    "gate": {"rows": (1, 2, 4), "num_warps": (4, 8), "columns": (512, 1024, 2048)},
    "rope": {"rows": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    "cross_entropy": {
        "rows": (1, 2, 4, 8),
        "num_warps": (8, 16, 32),
        "columns": (2048, 4096, 8192),
        "programs": (0, 132),
    },
}


def _family(op: str) -> str:
    return next(family for family in CHOICES if family in op)


def candidates(op: str, *, width: int) -> Iterator[Blocks]:
    """What the tuner tries for a shape: the rule's choice, then all that give a thread 4 to 64 numbers."""
    first, choices = rule(op, width=width), CHOICES[_family(op)]
    yield first
    for values in itertools.product(*choices.values()):
        found = dataclasses.replace(first, **dict(zip(choices, values, strict=True)))
        numbers = found.rows * (found.columns or 1 << max(width - 1, 0).bit_length()) / (32 * found.num_warps)
        walks_without_end = op.endswith("norm_backward") and not found.programs  # a partial sum for every block
        if 4 <= numbers <= 64 and found != first and not walks_without_end:
            yield found


@functools.cache
def device_kind() -> str | None:
    """The GPU of this process, None without one. A program lowered for another device gets the same blocks."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return None


def file_of(kind: str) -> Path:
    """Where the measured blocks of a kind of device are kept."""
    return TUNED / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _tuned(kind: str | None) -> list[dict]:
    file = file_of(kind) if kind else None
    return json.loads(file.read_text()) if file and file.exists() else []
