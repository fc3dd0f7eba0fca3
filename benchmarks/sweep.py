"""The table and the plot of `python -m benchmarks ops --sweep`: times from few rows to many, compared with jitted jnp."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def sweep_table(entries: Sequence[dict]) -> str:
    """Returns a Markdown table of operations by rows, with the forward + backward times of ours / jitted jnp in us."""
    counts = sorted({entry["rows"] for entry in entries})
    table: dict[tuple[str, str], dict[int, str]] = {}
    for entry in entries:
        times = [f"{r['both_us']['median']:.1f}" if "both_us" in r else "-" for r in entry["results"].values()]
        table.setdefault((entry["model"], entry["op"]), {})[entry["rows"]] = " / ".join(times)
    lines = [f"| ours / jnp, us | {' | '.join(map(str, counts))} |", "|---" * (1 + len(counts)) + "|"]
    for (model, op), cells in table.items():
        lines.append(f"| {model} `{op}` | {' | '.join(cells.get(count, '') for count in counts)} |")
    return "\n".join(lines) + "\n"


def plot_sweep(entries: Sequence[dict], path: Path) -> None:
    """Plots time relative to jitted jnp over rows: a panel per model and a line per operation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [m for m in ("2b", "7b", "72b", "vision") if any(entry["model"] == m for entry in entries)]
    ops = list(dict.fromkeys(entry["op"] for entry in entries))
    figure = Figure(figsize=(4.2 * len(models) + 2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        for i, op in enumerate(ops):
            points = sorted(
                (
                    entry["rows"],
                    entry["results"]["ours"]["both_us"]["median"] / entry["results"]["jnp"]["both_us"]["median"],
                )
                for entry in entries
                if (entry["model"], entry["op"]) == (model, op)
                and all("both_us" in entry["results"][name] for name in ("ours", "jnp"))
            )
            if points:
                panel.plot(*np.transpose(points), marker="o", color=f"C{i % 10}", ls="-" if i < 10 else "--", label=op)
        rows = sorted({entry["rows"] for entry in entries if entry["model"] == model})
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(rows, [str(n) for n in rows])
        panel.set_title(f"Qwen2-VL {model}" if model != "vision" else "vision tower")
        panel.set_xlabel("patches" if model == "vision" else "tokens")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, time / time of jitted jnp")
    panels[0].set_ylim(bottom=0)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.suptitle(f"{entries[0]['device']}, bfloat16; below 1 is faster than jitted jnp")
    figure.savefig(path, dpi=120)
