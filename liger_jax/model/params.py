"""Names of a pytree's leaves: what checkpoints, sharding rules and converters speak of."""

from typing import Any

import jax


def param_paths(tree: Any) -> dict[str, Any]:
    """{"visual/blocks/attn/qkv/kernel": leaf, ...} for a model, its gradients, or any pytree.

    >>> param_paths({"a": {"b": 1}})
    {'a/b': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """A key path as text. The last step into an NNX Param's value is not part of the name."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
