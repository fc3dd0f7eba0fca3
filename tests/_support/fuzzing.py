"""Fuzzing: damaged copies of valid JSON and files, the number of inputs of each test, and what may come out.

`FUZZ=20 pytest tests/fuzz` runs 20 times as many inputs, chosen by `--hypothesis-seed` (by default at random).
"""

import contextlib
import copy
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liger_jax.errors import LigerWarning, UserError

# Inputs of each test in a plain run.
INPUTS = {
    "test_records": 800,
    "test_files_of_records": 200,
    "test_messages": 600,
    "test_image_files": 900,
    "test_image_headers": 500,
    "test_image_arrays": 300,
    "test_image_sources": 200,
    "test_prepare": 800,
    "test_packing": 200,
    "test_datasets": 200,
    "test_model_configs": 600,
    "test_image_settings": 300,
    "test_generation_configs": 200,
    "test_processor_folders": 150,
    "test_checkpoint_configs": 100,
    "test_checkpoint_tensors": 100,
    "test_checkpoints_of_newer_families": 100,
    "test_weight_files": 150,
    "test_indexes": 100,
    "test_adapters": 150,
    "test_command_lines": 250,
}
MULTIPLIER = int(os.environ.get("FUZZ", "1"))
LONGEST_MESSAGE = 4000  # characters: a list of 60 tensors; longer messages repeat the input
counts: Counter[str] = Counter()  # inputs so far, by the name of the test


def fuzz(**strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """Decorates a test: calls it with as many inputs as INPUTS says, always the same ones in a plain run."""

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def counted(*args, **kwargs):
            counts[test.__name__] += 1
            test(*args, **kwargs)

        return settings(
            max_examples=INPUTS[test.__name__] * MULTIPLIER,
            derandomize=MULTIPLIER == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(counted))

    return decorate


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    """Swallows a UserError that says something, and fails for any other exception or a third party's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Pillow ignores damaged metadata with a warning; damaged pixels are errors
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=LigerWarning)
        try:
            yield
        except UserError as error:
            message = str(error)
            assert message.strip(), "a UserError without a message"
            assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:300]} ..."


# ---- values ----------------------------------------------------------------------------------------------------------

# Text that has broken programs: control characters, other scripts, half of a surrogate pair, markers, templates, paths.
ODD_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\0",
        "\ud800",
        "\udfff text",
        "\ufeff",
        "\u202e",
        "é",
        "e\u0301",
        "日本語",
        "👩‍👩‍👧‍👦",
        "ﷺ" * 20,
        "x" * 5000,
    ),
    *("<image>", "<video>", "<image>\n<image>", "\n<image>\n", "<audio>", "<bbox>", "<|image_pad|>", "<|video_pad|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "\ue0f0\ue0f1", "\ue0f2\ue0f3", "{{ messages }}", "{% raise %}"),
    *(
        "a.png",
        "missing.png",
        "../a.png",
        "/",
        ".",
        "~",
        "file://",
        "file://[",
        "file:///etc/passwd",
        "data:",
        "data:,",
    ),
    *("data:image/png;base64,", "data:image/png;base64,!!", "http://localhost/a.png", "A" * 80, "é" * 80, "a/" * 3000),
    *("true", "null", "[]", "{}", "1", "-1", "1e400", "NaN", "image", "text", "video", "user", "assistant", "system"),
)
ODD_NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        14,
        28,
        255,
        256,
        65535,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
    ),
    *(0.0, -0.0, 0.5, 1.0, -1.0, 1 / 255, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), 10**400),
)


def pick(values: Sequence) -> st.SearchStrategy:
    """Returns a strategy like `sampled_from`, whose repr does not list the values."""
    return st.integers(0, len(values) - 1).map(values.__getitem__)


def nest(depth: int) -> Any:
    """Returns lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def scalars() -> st.SearchStrategy:
    return st.one_of(
        st.none(),
        st.booleans(),
        pick(ODD_NUMBERS),
        st.integers(),
        st.floats(),
        pick(ODD_TEXTS),
        st.text(alphabet=st.characters(codec=None), max_size=20),
    )


def json_values(keys: st.SearchStrategy | None = None) -> st.SearchStrategy:
    """Returns a strategy of anything that json.loads can return."""
    keys = pick(ODD_TEXTS) if keys is None else keys
    small = st.recursive(
        scalars(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=6,
    )
    return st.one_of(small, small, small, st.sampled_from([50, 150]).map(nest))


# ---- damage ----------------------------------------------------------------------------------------------------------


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every node below the root."""
    places = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        places.append((tree, key))
        places += _places(value)
    return places


@st.composite
def mostly(draw, usual: st.SearchStrategy, odd: st.SearchStrategy):
    """Draws from `usual`, and once in six times from `odd`. (`one_of` would count the branches of both.)"""
    return draw(odd if draw(st.integers(0, 5)) == 5 else usual)


CHANGES = ("vary",) * 5 + ("replace",) * 4 + ("remove", "add", "repeat", "swap", "rename")


@st.composite
def damaged(draw, trees: st.SearchStrategy, keys: st.SearchStrategy, values: st.SearchStrategy | None = None):
    """Draws a valid JSON value with up to three changes: another value, a key or item less, more, twice, or renamed.

    Args:
        trees: the valid values.
        keys: names for new keys, best those that the reader looks for.
        values: replacements; by default, any JSON value.
    """
    values = json_values(keys) if values is None else values
    root = [copy.deepcopy(draw(trees))]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3]))):
        places = _places(root)
        # the root itself is rarely the one to change
        container, key = draw(st.sampled_from(places[1:] or places)) if draw(st.integers(0, 30)) else places[0]
        change, node = draw(st.sampled_from(CHANGES)), container[key]
        if change == "vary":
            container[key] = draw(_variants(node, keys))
        elif change == "replace":
            container[key] = draw(values)
        elif change == "remove" and container is not root:
            del container[key]
        elif change == "add" and isinstance(node, dict):
            node[draw(keys)] = draw(values)
        elif change == "add" and isinstance(node, list):
            node.append(draw(values))
        elif change == "repeat" and isinstance(container, list) and container is not root:
            container.insert(key, copy.deepcopy(node))
        elif change == "rename" and isinstance(container, dict):
            container[draw(keys)] = container.pop(key)
        elif change == "swap":
            other, other_key = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[other_key])
    return root[0]


def _variants(node: Any, keys: st.SearchStrategy) -> st.SearchStrategy:
    """Returns a strategy of values of the same type."""
    if isinstance(node, bool) or node is None:
        return st.sampled_from([None, False, True])
    if isinstance(node, str):
        odd = pick(ODD_TEXTS)
        return st.one_of(odd, odd.map(lambda text: node + text), odd.map(lambda text: text + node))
    if isinstance(node, int | float):
        return pick(ODD_NUMBERS) | st.sampled_from(
            [node + 1, node - 1, -node, 2 * node, node / 2 if abs(node) < 1e300 else 0]
        )
    if isinstance(node, list):
        return st.sampled_from([node[:1], node[1:], node[::-1], node + node, [node], []])
    return st.tuples(keys, scalars()).map(lambda item: {**node, item[0]: item[1]})


@st.composite
def damaged_bytes(draw, files: st.SearchStrategy):
    """Draws the content of a valid file with up to three changes: truncated, bytes overwritten, removed or inserted."""
    content = bytearray(draw(files))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        # most formats have their structure at the start, and their version in the first bytes
        size = max(len(content), 1)
        first = draw(st.sampled_from([0, 8, 8, 8]))
        last = draw(st.sampled_from([64, 1000, size])) - 1
        place = min(draw(st.integers(first, max(first, last))), size - 1)
        change = draw(st.sampled_from(["overwrite", "overwrite", "overwrite", "truncate", "remove", "insert", "zeros"]))
        if change == "truncate":
            del content[place:]
        elif change == "remove":
            del content[place : place + draw(st.integers(1, 16))]
        elif change == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif change == "zeros":
            content[place : place + 8] = bytes(len(content[place : place + 8]))
        else:
            new = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff"]))
            content[place : place + len(new)] = new
    return bytes(content)
