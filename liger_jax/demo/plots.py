"""The demo's two plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_IMAGES = 3  # shown per question


def plot_loss(path: Path, losses: Sequence[float], accuracies: Sequence[float]) -> None:
    """Plots loss and token accuracy of every training step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    lines = axes.plot(steps, losses, color="tab:blue", label="loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right_axes = axes.twinx()
    lines += right_axes.plot(steps, accuracies, color="tab:orange", label="token accuracy")
    right_axes.set(ylabel="token accuracy", ylim=(0, 1))
    axes.legend(handles=lines, loc="center right")
    axes.set_title("Training")
    FigureCanvasAgg(figure).print_png(path)


def plot_answers(path: Path, conversations: Sequence[Sequence[dict]], answers: Sequence[Mapping[str, Any]]) -> None:
    """Plots one row per conversation: its images, its question, and the model's answer, green if correct and red if not.

    Args:
        path: the PNG file to write.
        conversations: conversations that end with a question and its answer.
        answers: the model's answers to them, as `compare_answers` returns them.
    """
    figure = Figure(figsize=(11, 1.0 * len(answers) + 0.3), layout="constrained")
    rows = figure.subplots(len(answers), MAX_IMAGES + 1, squeeze=False, width_ratios=[1] * MAX_IMAGES + [2.2])
    for axes, conversation, answer in zip(rows, conversations, answers, strict=True):
        parts = conversation[-2]["content"]
        images = [part["image"] for part in parts if part["type"] == "image"]
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        for axis in axes:
            axis.axis("off")
        for axis, image in zip(axes, images, strict=False):
            axis.imshow(image)
        axes[-1].text(0, 0.7, question, fontsize=11, va="center")
        text, color = answer["answer"], "tab:green"
        if not answer["exact"]:
            text, color = f"{text}   (correct: {answer['expected']})", "tab:red"
        text = ascii(text)[1:-1]  # an untrained model generates characters that no font has
        axes[-1].text(0, 0.3, text, fontsize=14, weight="bold", color=color, va="center", parse_math=False)
    FigureCanvasAgg(figure).print_png(path)
