"""The demo's two pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_loss(path: Path, losses: Sequence[float], accuracies: Sequence[float]) -> None:
    """Loss and token accuracy of every training step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    lines = axes.plot(steps, losses, color="tab:blue", label="loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right = axes.twinx()
    lines += right.plot(steps, accuracies, color="tab:orange", label="share of right tokens")
    right.set(ylabel="share of right tokens", ylim=(0, 1))
    axes.legend(handles=lines, loc="center right")
    axes.set_title("Training")
    FigureCanvasAgg(figure).print_png(path)


def plot_answers(
    path: Path, prompts: Sequence[Sequence[dict]], answers: Sequence[str], expected: Sequence[str]
) -> None:
    """Each prompt's pictures in a row, with its question, the model's answer in green or red, and the right one."""
    figure = Figure(figsize=(11, 1.0 * len(prompts) + 0.3), layout="constrained")
    most = 3
    rows = figure.subplots(len(prompts), most + 1, squeeze=False, width_ratios=[1] * most + [2.2])
    for axes, messages, answer, right in zip(rows, prompts, answers, expected, strict=True):
        parts = messages[-1]["content"]
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        for axis in axes:
            axis.axis("off")
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture)
        axes[-1].text(0, 0.7, question, fontsize=11, va="center")
        told, colour = (answer, "tab:green") if answer == right else (f"{answer}   (it is {right})", "tab:red")
        told = ascii(told)[1:-1]  # an untrained model says what no font can show
        axes[-1].text(0, 0.3, told, fontsize=14, weight="bold", color=colour, va="center", parse_math=False)
    FigureCanvasAgg(figure).print_png(path)
