"""From logits to the next token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"],
    meta_fields=["do_sample"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Values may change without a new compilation; switching one on or off (None) may not.

    Greedy decoding takes the largest logit, which temperature, top_k, top_p and min_p never change.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for a value without a meaning."""
        for name, holds, expected in (
            ("temperature", self.temperature > 0, "above 0 (for the most likely token: do_sample=False)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")


def next_token(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """logits [B, V] -> [B] int32. A row's draws depend on the seed, its row and the step, not on the rows around it."""
    logits = logits.astype(jnp.float32)
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = process_logits(logits, sampling)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def process_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, top-p and min-p, in transformers' order; what is ruled out becomes -inf. [B, V] float32."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jnp.minimum(sampling.top_k, logits.shape[-1]) - 1
        least = jnp.take(-jnp.sort(-logits, axis=-1), kth, axis=-1)
        logits = jnp.where(logits < least[..., None], -jnp.inf, logits)
    if sampling.top_p is not None:
        # a token stays if those more likely than it have less than top_p together
        largest_first = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(largest_first, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        stays = (before < sampling.top_p).at[..., 0].set(True)
        least = jnp.min(jnp.where(stays, largest_first, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        # a token stays if it is at least min_p times as likely as the most likely one
        probabilities = jax.nn.softmax(logits, axis=-1)
        stays = probabilities >= sampling.min_p * probabilities.max(axis=-1, keepdims=True)
        logits = jnp.where(stays, logits, -jnp.inf)
    return logits


def penalise_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Makes tokens that occurred less likely: a positive logit is divided by the penalty, a negative one multiplied.

    logits [B, V], seen [B, V] bool. Tokens of the prompt count, placeholders included, as in transformers.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
