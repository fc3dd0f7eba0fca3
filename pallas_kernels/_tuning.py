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
    num_stages: int = 1
    programs: int = 0  # that share all blocks, in kernels that walk over them


def blocks(op: str, *, rows: int, width: int) -> Blocks:
    """The measured blocks for this width, at the nearest number of rows; else the rule's."""
    measured = [entry for entry in _tuned(device_kind()) if entry["op"] == op and entry["width"] == width]
    if not measured:
        return rule(op, width=width)
    nearest = min(measured, key=lambda entry: abs(math.log2(entry["rows"]) - math.log2(max(rows, 1))))
    return Blocks(**nearest["blocks"])


def rule(op: str, *, width: int) -> Blocks:
    """About 2048 numbers a block, 8 a thread, and in kernels that walk over rows a few programs for each of a GPU's SMs."""
    block_width = 1 << max(width - 1, 0).bit_length()
    block_rows = max(1, min(16, 2048 // block_width))
    num_warps = min(max(block_rows * block_width // 512, 4), 16)
    return (
        Blocks(block_rows, num_warps, num_stages=2, programs=512)
        if op.endswith("backward")
        else Blocks(block_rows, num_warps)
    )


def candidates(op: str, *, width: int) -> Iterator[Blocks]:
    """What the tuner tries for a shape; the rule's choice first."""
    first = rule(op, width=width)
    yield first
    axes = (
        sorted({max(1, first.rows // 2), first.rows, 2 * first.rows}),
        (4, 8, 16),
        (1, 2) if first.programs else (1,),
        (264, 528, 1056) if first.programs else (0,),
    )
    yield from (found for found in itertools.starmap(Blocks, itertools.product(*axes)) if found != first)


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
