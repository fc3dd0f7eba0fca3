"""Which conversations each batch of a run has: made from their sizes and a seed alone, so that a run can go on anywhere."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

STRETCH = 50  # batches whose rows are sorted by size together; as in transformers' group_by_length


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Batches of rows of conversations, epoch after epoch. In each epoch every row comes once, and its last batch may have
    fewer.

    Attributes:
        rows: the conversations of each row, by number.
        batch_size: rows in a batch.
        seed: of the order of the rows, another one in each epoch; None: as they stand.
        sizes: [rows, keys]; rows of similar sizes come into a batch together, the first key counts most. None: any rows.

    Example:
        >>> from liger_jax.data.schedule import Plan
        >>> plan = Plan([(0,), (1, 2), (3,)], batch_size=2)
        >>> [plan.batch(step) for step in range(3)]
        [[(0,), (1, 2)], [(3,)], [(0,), (1, 2)]]
    """

    rows: Sequence[tuple[int, ...]]
    batch_size: int
    seed: int | None = None
    sizes: np.ndarray | None = None

    @property
    def epoch_batches(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int) -> list[tuple[int, ...]]:
        """The rows of a step's batch."""
        epoch, place = divmod(step, self.epoch_batches)
        return [self.rows[i] for i in _order(self, epoch)[place * self.batch_size : (place + 1) * self.batch_size]]


@functools.lru_cache(maxsize=4)
def _order(plan: Plan, epoch: int) -> np.ndarray:
    """The rows of an epoch, one batch after the other."""
    count = len(plan.rows)
    if plan.seed is None:
        return np.arange(count)
    rng = np.random.default_rng((plan.seed, epoch))
    order = rng.permutation(count)
    if plan.sizes is None:
        return order
    stretches = np.split(order, range(STRETCH * plan.batch_size, count, STRETCH * plan.batch_size))
    order = np.concatenate([part[np.lexsort(plan.sizes[part].T[::-1])] for part in stretches])
    full = count // plan.batch_size * plan.batch_size
    batches = order[:full].reshape(-1, plan.batch_size)
    return np.concatenate([rng.permutation(batches).ravel(), order[full:]])
