"""Finds other modules named `convert` or `pallas_kernels`, which would be imported in place of liger-jax's packages.

Such a module is usually a script in the current folder, or a package that another distribution installed.
"""

import sys
import warnings
from importlib import util
from pathlib import Path

from liger_jax.errors import LigerWarning, UserError

ROOT = Path(__file__).resolve().parents[1]


def collision(name: str) -> str | None:
    """Returns what is wrong with the module that `import NAME` finds, or None if it is liger-jax's own.

    Example:
        >>> print(collision("convert"))
        None
        >>> collision("json").partition("; ")[0]  # doctest: +ELLIPSIS
        'json is ...'
    """
    try:
        spec = util.find_spec(name)
    except ValueError:  # a module without a spec, such as one that a test made
        spec = None
    origin = spec.origin if spec is not None else getattr(sys.modules.get(name), "__file__", None)
    expected = ROOT / name / "__init__.py"
    if origin is not None and Path(origin).resolve() == expected:
        return None
    locations = spec.submodule_search_locations if spec is not None else None  # of a folder without __init__.py
    actual = origin or (locations and next(iter(locations))) or "missing"
    return f"{name} is {actual}; expected {expected.parent}, which liger-jax installs. Rename or remove the other one."


def check_imports() -> None:
    """Raises ImportError if `pallas_kernels` is another module, and warns if `convert` is, which only some programs need."""
    if problem := collision("pallas_kernels"):
        raise ImportError(problem)
    if problem := collision("convert"):
        warnings.warn(problem, LigerWarning, stacklevel=3)


def check_commands() -> None:
    """Raises UserError if `convert` is another module."""
    if problem := collision("convert"):
        raise UserError(problem)


def other_distributions() -> list[str]:
    """Returns the other installed distributions that have a package of one of liger-jax's names, and so overwrite it."""
    from importlib import metadata  # takes longer to import than all of this package's modules

    owners = metadata.packages_distributions()
    names = ("liger_jax", "pallas_kernels", "convert")
    return sorted({owner for name in names for owner in owners.get(name, ()) if owner != "liger-jax"})
