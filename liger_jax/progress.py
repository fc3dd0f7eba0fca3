"""Progress bars: a bar in a terminal or notebook, and a line now and then in a file or pipe."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 10  # between two lines
LINE = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(iterable: Any = None, *, show: bool = True, **options: Any) -> tqdm:
    """Returns tqdm's progress bar, or one that prints a line every SECONDS if stderr is neither a terminal nor a notebook.

    Args:
        iterable: the items to iterate over; None: call `update` instead.
        show: False prints nothing.
        options: those of tqdm, such as total, desc and unit.

    Example:
        >>> list(progress_bar("ab", show=False))
        ['a', 'b']
    """
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        options |= {"file": _Lines(sys.stderr), "bar_format": LINE, "mininterval": SECONDS, "miniters": 1}
    return tqdm(iterable, disable=not show, **options)


class _Lines:
    """A stream that prints each state of a bar as a line of its own, without tqdm's carriage returns and padding."""

    def __init__(self, stream: TextIO):
        self.stream, self.last_count = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        count = line.partition(" [")[0]
        if count not in ("", self.last_count):  # tqdm shows the end a second time when the bar is closed
            self.last_count = count
            print(line, file=self.stream)

    def flush(self) -> None:
        self.stream.flush()
