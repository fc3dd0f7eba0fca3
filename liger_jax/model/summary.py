"""Summarizes a model as a table: its parameters, and the shapes of its activations for a batch."""

from collections.abc import Sequence
from typing import Any

import jax

from liger_jax.inputs.batch import Batch
from liger_jax.model.params import find_row, param_paths


def summarize(model: Any, batch: Batch | None) -> str:
    """Returns the tables of `QwenVL.summary`. Nothing is computed: JAX only traces the shapes."""
    rows = [("parameter", "axes", "shape", "dtype", "elements")]
    totals: dict[str, tuple[int, int]] = {}  # of a part: elements and bytes
    for path, weight in param_paths(model).items():
        row = find_row(path)
        elements, size = totals.get(row.part, (0, 0))
        totals[row.part] = elements + weight.size, size + weight.size * weight.dtype.itemsize
        rows.append((path, row.axes, *_form(weight), f"{weight.size:,}"))
    totals["total"] = sum(n for n, _ in totals.values()), sum(size for _, size in totals.values())
    rows += [(f"{part}: {size / 2**20:,.1f} MiB", "", "", "", f"{n:,}") for part, (n, size) in totals.items()]
    tables = [_align(rows)]
    if batch is not None:
        outputs = jax.eval_shape(lambda model, batch: model.activations(batch), model, batch)
        tables.append(_align([("activation", "shape", "dtype"), *((name, *_form(x)) for name, x in outputs.items())]))
    return "\n\n".join(tables)


def _form(array: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, str]:
    return " ".join(map(str, array.shape)), str(array.dtype)


def _align(rows: Sequence[tuple[str, ...]]) -> str:
    """Returns rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
