"""Errors that the user can fix: invalid arguments or input files, missing or conflicting folders.

The command line prints a `UserError` as one line. Any other exception is a bug and keeps its traceback.
"""

import difflib
import warnings
from collections.abc import Sequence


class UserError(ValueError):
    """Raised for a user's mistake. The message names the argument or file, its value, and the expected value.

    Example:
        >>> from liger_jax.errors import UserError
        >>> issubclass(UserError, ValueError)
        True
    """


class NotFoundError(UserError, FileNotFoundError):
    """Raised for a file, folder, or hub repository that does not exist."""


class AlreadyExistsError(UserError, FileExistsError):
    """Raised for an output path that already holds something else."""


class DamagedError(UserError):
    """Raised for a checkpoint that is truncated, incomplete, or holds NaN or infinity."""


class LigerWarning(UserWarning):
    """Category of this package's warnings. The command line prints them and those of pallas_kernels, each as one line."""


class DataWarning(LigerWarning):
    """Category of warnings about data that one process reads. Of several processes, each prints its own."""


def list_some(items: Sequence[str], limit: int = 10, *, separator: str = "; ") -> str:
    """Joins the items of a list for a message: all of them, or the first ones and the number of the others.

    Example:
        >>> list_some(["3", "7", "8"], separator=", ")
        '3, 7, 8'
        >>> list_some(["missing a", "missing b", "missing c"], 2)
        'missing a; missing b; and 1 more'
    """
    count = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *count])


def closest(name: str, choices: Sequence[str]) -> str:
    """Returns "; did you mean CHOICE?" for the choice most like a name, or "" if none is like it.

    Example:
        >>> closest("finetun", ["demo", "finetune", "generate"])
        '; did you mean finetune?'
        >>> closest("serve", ["demo", "finetune", "generate"])
        ''
    """
    matches = difflib.get_close_matches(name.lower(), choices, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def warn_skipped(
    summary: str, messages: Sequence[str], *, category: type[LigerWarning] = LigerWarning, stacklevel: int = 3
) -> None:
    """Warns once about items that were skipped, and lists the first ten. Does nothing if there are none.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_skipped("data.json: skipped 2 of 9 records", ["record 3: no answer", "record 7: no image"])
        >>> str(caught[0].message)
        'data.json: skipped 2 of 9 records: record 3: no answer; record 7: no image'
    """
    if messages:
        warnings.warn(f"{summary}: {list_some(messages)}", category, stacklevel=stacklevel)
