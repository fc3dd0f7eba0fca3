"""Progress bars print a line now and then unless stderr is a terminal."""

import io
import sys

import pytest

from liger_jax import progress
from liger_jax.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stream(monkeypatch):
    """Returns a function that replaces stderr."""

    def replace(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def test_pipes_get_whole_lines(stream):
    piped = stream(io.StringIO())
    with progress_bar(total=40, initial=10, unit="step") as bar:
        for _ in range(30):
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    first, last = piped.getvalue().splitlines()
    assert first.startswith("25% 10/40 [") and last.startswith("100% 40/40 [") and "loss=0.5" in last
    assert "\r" not in piped.getvalue() and piped.getvalue().endswith("]\n")


def test_lines_come_at_most_every_interval(stream, monkeypatch):
    """A line per update if the interval is 0; by default, updates within ten seconds print none."""
    piped = stream(io.StringIO())
    monkeypatch.setattr(progress, "SECONDS", 0)
    assert list(progress_bar("abc", desc="measuring: ")) == ["a", "b", "c"]
    numbers = [line.split(" [")[0] for line in piped.getvalue().splitlines()]
    assert numbers == ["measuring: 0% 0/3", "measuring: 33% 1/3", "measuring: 67% 2/3", "measuring: 100% 3/3"]


def test_terminals_get_a_bar(stream):
    terminal = stream(Terminal())
    list(progress_bar("abc", desc="measuring: "))
    assert terminal.getvalue().startswith("\rmeasuring:   0%|") and "measuring: 100%|" in terminal.getvalue()


def test_hidden_bars_print_nothing(stream):
    piped = stream(io.StringIO())
    list(progress_bar("abc", show=False))
    assert piped.getvalue() == ""
