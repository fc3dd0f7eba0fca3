"""The block sizes of kernels: measured ones from tuned/<device kind>.json (see `tune`), or those of a rule."""

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
    """The block sizes of a kernel over rows."""

    rows: int  # rows per block
    num_warps: int  # warps per program
    programs: int = 0  # programs that share the blocks of rows; 0: one program per block
    columns: int = 0  # columns per block, in kernels that do not hold rows at full width
    loads: int = 1  # iterations of a loop whose loads are in flight at the same time


def blocks(op: str, *, rows: int, width: int) -> Blocks:
    """Returns the blocks measured for this width at the nearest number of rows; without a measurement, those of the rule."""
    measured = [entry for entry in _tuned(device_kind()) if entry["op"] == op and entry["width"] == width]
    if not measured:
        return rule(op, width=width)
    nearest = min(measured, key=lambda entry: abs(math.log2(entry["rows"]) - math.log2(max(rows, 1))))
    return Blocks(**nearest["blocks"])


def rule(op: str, *, width: int) -> Blocks:
    """Returns blocks that were fast on an H200 at most widths.

    They hold 4 to 32 elements per thread. Kernels that sum over rows get two programs per SM.
    """
    block_width = 1 << max(width - 1, 0).bit_length()
    columns = min(block_width, COLUMNS.get(_family(op), block_width))
    rows = max(1, min(64, ELEMENTS[_family(op)] // columns))
    num_warps = min(max(rows * columns // PER_WARP.get(_family(op), 512), 4), 16)
    return Blocks(
        rows=rows,
        num_warps=num_warps,
        programs=PROGRAMS.get(op, 264 if op.endswith("norm_backward") else 0),
        columns=columns if _family(op) in COLUMNS else 0,
        loads=LOADS.get(_family(op), 1),
    )


# The rule's elements per block and per warp, and columns per block in kernels that do not hold rows at full width.
ELEMENTS = {
    **{"one_row": 512, "qk_norm_rope_forward": 2048, "qk_norm_rope_backward": 4096},
    **{"norm": 4096, "gate": 2048, "rope": 2048, "cross_entropy": 8192},
}
PER_WARP = {"qk_norm_rope_backward": 256}  # so that it takes at most 64 registers
COLUMNS = {"one_row": 512, "gate": 1024, "cross_entropy": 4096}
LOADS = {"one_row": 3}
PROGRAMS = {"qk_norm_rope_backward": 264}
# The values that the tuner tries.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "one_row": {"rows": (1, 2, 4, 8), "num_warps": (1, 2, 4), "columns": (512, 1024), "loads": (1, 2, 3)},
    "qk_norm_rope_forward": {
        "rows": (8, 16, 32),
        "num_warps": (4, 8, 16),
        "programs": (0, 264, 660, 1320),
        "loads": (1, 2),
    },
    "qk_norm_rope_backward": {
        "rows": (8, 16, 32),
        "num_warps": (4, 8, 16),
        "programs": (132, 264, 528, 1056),
        "loads": (1, 2),
    },
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
    """Yields the blocks that the tuner tries: those of the rule, then all others with 4 to 64 elements per thread."""
    first, choices = rule(op, width=width), CHOICES[_family(op)]
    yield first
    for values in itertools.product(*choices.values()):
        candidate = dataclasses.replace(first, **dict(zip(choices, values, strict=True)))
        columns = candidate.columns or 1 << max(width - 1, 0).bit_length()
        elements_per_thread = candidate.rows * columns / (32 * candidate.num_warps)
        stores_a_sum_per_block = op.endswith(("norm_backward", "rope_backward")) and not candidate.programs
        if 4 <= elements_per_thread <= 64 and candidate != first and not stores_a_sum_per_block:
            yield candidate


@functools.cache
def device_kind() -> str | None:
    """Returns the kind of this process's GPU, or None without one. Programs lowered for other GPUs also use its blocks."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return None


def file_of(kind: str) -> Path:
    """Returns the file with the measured blocks of a kind of device."""
    return TUNED / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _tuned(kind: str | None) -> list[dict]:
    file = file_of(kind) if kind else None
    return json.loads(file.read_text()) if file and file.exists() else []
