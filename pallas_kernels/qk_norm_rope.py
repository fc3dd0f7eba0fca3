"""RMSNorm of the query and key heads, followed by the rotary position embedding, in one pass over q and k."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _tuning, _validate
from pallas_kernels._operation import DifferentiableOp, Pass
from pallas_kernels._pallas import choose_implementation
from pallas_kernels._tuning import Blocks
from pallas_kernels.rms_norm import StaticArgs as NormArgs
from pallas_kernels.rms_norm import backward_xla as rms_norm_backward_xla
from pallas_kernels.rms_norm import forward_xla as rms_norm_forward_xla
from pallas_kernels.rope import check_arguments, rotate_heads


def qk_norm_rope(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin), with one norm per head, as in Qwen3.

    Args:
        q: [B, T, N, D], float.
        k: [B, T, K, D], q's dtype.
        q_weight: [D], float; shared by all query heads.
        k_weight: [D], float; shared by all key heads.
        cos: [B, T, D/2], float. Constants: no gradient flows into cos and sin.
        sin: [B, T, D/2], float.
        eps: added to the mean square of a head.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        (q, k), normalized and rotated, in their dtype. The arithmetic is float32. Values are rounded as in `rms_norm` with
        casting "llama", then rotated as in `rope`. The backward pass saves only the arguments. It computes the gradient of
        the formula without rounding, in float32, and always sums the gradients of the weights in the same order.

    Raises:
        ValueError: shapes do not match, D is odd, q and k differ in dtype, a dtype is not floating, or implementation is
            unknown.

    Source: Qwen Team 2025, Qwen3 Technical Report, https://arxiv.org/abs/2505.09388

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import qk_norm_rope
        >>> q, ones = jnp.array([[[[3.0, -3.0]]]]), jnp.ones(2)
        >>> quarter_turn = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))
        >>> qk_norm_rope(q, q, ones, ones, *quarter_turn)[0].round(3).tolist()
        [[[[1.0, 1.0]]]]
    """
    op = "qk_norm_rope"
    check_arguments(op, implementation, q, k, cos, sin, tables=())
    _validate.floating(op, q_weight=q_weight, k_weight=k_weight)
    _validate.same_dtype(op, q=q, k=k)
    _validate.shape(op, "q_weight", q_weight.shape, q.shape[-1:])
    _validate.shape(op, "k_weight", k_weight.shape, q.shape[-1:])
    static = StaticArgs(float(eps), implementation)
    q, k = _OPERATION(static, *(x[None] for x in (q, k, q_weight, k_weight, cos, sin)))
    return q[0], k[0]


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    eps: float
    implementation: str | None

    @property
    def norm(self) -> NormArgs:
        """The options of the norm alone."""
        return NormArgs(self.eps, 0.0, "llama", self.implementation)


# ---- XLA implementation: q [G, B, T, N, D], k [G, B, T, K, D], weights [G, D], cos and sin [G, B, T, D/2] -------------


def _forward_xla(static: StaticArgs, q, k, q_weight, k_weight, cos, sin):
    q, k = (rms_norm_forward_xla(static.norm, x, weight)[0] for x, weight in ((q, q_weight), (k, k_weight)))
    return rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)


def _backward_xla(static: StaticArgs, q, k, d_q, d_k, q_weight, k_weight, cos, sin):
    """Returns d_q, d_k, and the float32 gradients [G, D] of the weights."""

    def backward(x, d_out, weight):
        wide = _validate.accumulation_dtype(x.dtype)
        d_normed = rotate_heads(d_out.astype(wide), cos, -sin)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(wide)), axis=-1) + static.eps)
        return rms_norm_backward_xla(static.norm, x, d_normed, weight, inverse_rms)

    (d_q, d_q_weight), (d_k, d_k_weight) = backward(q, d_q, q_weight), backward(k, d_k, k_weight)
    return d_q, d_k, d_q_weight, d_k_weight


# ---- kernels: a program takes blocks of heads of q, or blocks of heads of k --------------------------------------------
# Heads are held as the two halves that RoPE rotates. Refs: q [G T N, 2, D/2], k [G T K, 2, D/2], weights [G, 2, D/2], cos
# and sin [G T, D/2]; T has all tokens of a group.

Halves = list[jax.Array]  # the halves of several heads [heads, D/2], or of one head or weight [D/2]


def norm_halves(x: Halves, weight: Halves, eps: float, dim: int, dtype: Any) -> Halves:
    """Inside a kernel: returns the RMSNorm of heads or of one head, rounded to `dtype` as casting "llama" rounds."""
    inverse_rms = _inverse_rms(x, eps, dim)

    def round_to_dtype(value):
        return value.astype(dtype).astype(value.dtype)

    return [round_to_dtype(round_to_dtype(half * inverse_rms) * scale) for half, scale in zip(x, weight, strict=True)]


def rotate_halves(x: Halves, cos: jax.Array, sin: jax.Array) -> Halves:
    """Inside a kernel: returns heads or one head, rotated by the angles of cos and sin [heads, D/2] or [D/2]."""
    first, second = x
    return [first * cos - second * sin, second * cos + first * sin]


def _inverse_rms(x: Halves, eps: float, dim: int) -> jax.Array:
    return jax.lax.rsqrt(_sum_over_head(x, x) / dim + eps)


def _sum_over_head(a: Halves, b: Halves) -> jax.Array:
    """Returns sum(a * b) over each head: [heads, 1], or a scalar for one head."""
    products = a[0] * b[0] + a[1] * b[1]
    return jnp.sum(products, axis=-1, keepdims=products.ndim > 1)


def _backward_halves(
    x: Halves, d_out: Halves, weight: Halves, cos: jax.Array, sin: jax.Array, eps: float, dim: int
) -> tuple[Halves, Halves]:
    """Returns d_x, and each head's contribution to the gradient of the weight; see `rms_norm.backward_xla`."""
    inverse_rms, d_normed = _inverse_rms(x, eps, dim), rotate_halves(d_out, cos, -sin)
    x_hat = [half * inverse_rms for half in x]
    g = [d_half * scale for d_half, scale in zip(d_normed, weight, strict=True)]
    mean = _sum_over_head(g, x_hat) / dim
    d_x = [inverse_rms * (a - b * mean) for a, b in zip(g, x_hat, strict=True)]
    return d_x, [a * b for a, b in zip(d_normed, x_hat, strict=True)]


class _HeadBlock(NamedTuple):
    """Some heads, of one token or of several."""

    rows: Any  # index of the heads in a ref [heads, 2, D/2]
    token: jax.Array  # [heads], the token of each head
    inside: jax.Array  # [heads, D/2], the mask of elements that exist

    def load(self, ref: Any) -> Any:
        """Loads the heads of a ref [heads, 2, D/2], or their tokens' vectors of a ref [tokens, D/2], in the ref's dtype."""
        if len(ref.shape) == 2:
            index = self.token[:, None], jnp.arange(self.inside.shape[1])[None, :]
            return _pallas.load(ref, tuple(jnp.broadcast_to(i, self.inside.shape) for i in index), self.inside)
        return [_pallas.load(ref, (self.rows, i, slice(None)), self.inside) for i in range(2)]

    def store(self, ref: Any, halves: Halves) -> None:
        """Stores the heads in a ref [heads, 2, D/2]."""
        for i, value in enumerate(halves):
            _pallas.store(ref, (self.rows, i, slice(None)), value, self.inside)


class _HeadPartition(NamedTuple):
    """Divides the heads of q or of k among the programs of a grid (lanes, programs, groups).

    The last lane takes the blocks of k, and the others take the blocks of q in turn, so that programs that run at the same
    time work on the same tokens. A program takes every `programs`-th block of its lane.
    """

    rows: int  # heads of all tokens of a group
    per_token: int
    half: int  # D/2
    first_lane: int
    lanes: int
    block_rows: int
    programs: int
    steps: int  # blocks of a program
    prefetch: bool
    position: tuple[Any, ...] = ()  # inside a kernel: the program's lane, its index in the lane, and its group

    def for_each_block(self, step: Callable, carry: Any, *refs: Any) -> Any:
        """Runs carry = step(block, carry, *values) for each of the program's blocks; returns the last carry.

        The values are the block's part of `refs`, in float32. With `prefetch`, each step loads the next block before it
        works on its own. This takes more registers, and so fewer programs run at the same time.
        """
        lane, program, group = self.position

        def block(i) -> _HeadBlock:
            first = ((program + i * self.programs) * self.lanes + lane - self.first_lane) * self.block_rows
            row = first + jnp.arange(self.block_rows)
            inside = (row < self.rows)[:, None] & self.in_half[None, :]
            token = group * (self.rows // self.per_token) + row // self.per_token
            return _HeadBlock(_pallas.span(group * self.rows + first, self.block_rows), token, inside)

        def load(i):
            return [block(i).load(ref) for ref in refs]

        def work(i, carry, values):
            return step(block(i), carry, *jax.tree.map(_widen, values))

        def load_and_work(i, state):
            carry, values = state
            next_values = load(i + 1)
            return work(i, carry, values), next_values

        if not self.prefetch:
            return jax.lax.fori_loop(0, self.steps, lambda i, carry: work(i, carry, load(i)), carry)
        carry, values = jax.lax.fori_loop(0, self.steps - 1, load_and_work, (carry, load(0)))
        return work(self.steps - 1, carry, values)

    def load_weight(self, ref: Any) -> Halves:
        """Loads the group's weight of a ref [groups, 2, D/2], in float32."""
        return [_widen(_pallas.load(ref, (self.position[2], i, slice(None)), self.in_half)) for i in range(2)]

    def store_sum(self, ref: Any, sums: Halves) -> None:
        """Stores the program's sums over heads in a ref [groups, lanes, programs, 2, D/2]."""
        lane, program, group = self.position
        for i, value in enumerate(sums):
            _pallas.store(ref, (group, lane, program, i, slice(None)), jnp.sum(value, axis=0), self.in_half)

    @property
    def in_half(self) -> jax.Array:
        return jnp.arange(_pallas.next_power_of_2(self.half)) < self.half


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(_validate.accumulation_dtype(x.dtype))


def _for_q_or_k(partitions: Sequence[_HeadPartition], write: Callable, *refs: tuple[Any, Any]) -> None:
    """Inside a kernel: runs write(partition, *refs) for the heads that this program takes. Each of `refs` is (q's, k's)."""
    position = tuple(_pallas.program_id(i) for i in range(3))
    for partition, own_refs in zip(partitions, zip(*refs, strict=True), strict=True):
        own_lane = (partition.first_lane <= position[0]) & (position[0] < partition.first_lane + partition.lanes)
        _pallas.when(own_lane)(functools.partial(write, partition._replace(position=position), *own_refs))


def _qk_norm_rope_forward(
    q_ref, k_ref, q_weight_ref, k_weight_ref, cos_ref, sin_ref, q_out_ref, k_out_ref,
    *, static: StaticArgs, partitions: Sequence[_HeadPartition],
) -> None:  # fmt: skip
    def write(partition, x_ref, weight_ref, out_ref):
        weight = partition.load_weight(weight_ref)

        def step(block, carry, x, cos, sin):
            normed = norm_halves(x, weight, static.eps, 2 * partition.half, out_ref.dtype)
            block.store(out_ref, rotate_halves(normed, cos, sin))
            return carry

        partition.for_each_block(step, None, x_ref, cos_ref, sin_ref)

    _for_q_or_k(partitions, write, (q_ref, k_ref), (q_weight_ref, k_weight_ref), (q_out_ref, k_out_ref))


def _qk_norm_rope_backward(
    q_ref, k_ref, d_q_out_ref, d_k_out_ref, q_weight_ref, k_weight_ref, cos_ref, sin_ref,
    d_q_ref, d_k_ref, d_weights_ref, *, static: StaticArgs, partitions: Sequence[_HeadPartition],
) -> None:  # fmt: skip
    def write(partition, x_ref, d_out_ref, weight_ref, d_x_ref):
        weight = partition.load_weight(weight_ref)

        def step(block, sums, x, d_out, cos, sin):
            d_x, d_weight = _backward_halves(x, d_out, weight, cos, sin, static.eps, 2 * partition.half)
            block.store(d_x_ref, d_x)
            return [a + b for a, b in zip(sums, d_weight, strict=True)]

        zeros = [jnp.zeros((partition.block_rows, half.size), half.dtype) for half in weight]
        partition.store_sum(d_weights_ref, partition.for_each_block(step, zeros, x_ref, d_out_ref, cos_ref, sin_ref))

    refs = (q_ref, k_ref), (d_q_out_ref, d_k_out_ref), (q_weight_ref, k_weight_ref), (d_q_ref, d_k_ref)
    _for_q_or_k(partitions, write, *refs)


def _partition_heads(q: jax.Array, k: jax.Array, blocks: Blocks) -> list[_HeadPartition]:
    """Returns the partitions of q and k: one block per program, unless `blocks.programs` sets the number of programs."""
    groups, *leading, _, dim = q.shape
    lanes_of_q = _pallas.cdiv(q.shape[-2], k.shape[-2])
    sides = [(q.shape[-2], 0, lanes_of_q), (k.shape[-2], lanes_of_q, 1)]  # heads, first lane, lanes
    tokens = math.prod(leading)
    count = max(_pallas.cdiv(tokens * heads, blocks.rows * lanes) for heads, _, lanes in sides)
    # Rounded down: one program more than fit on the GPU would run alone after all others.
    programs = min(max(blocks.programs // (groups * (lanes_of_q + 1)), 1) if blocks.programs else count, count)
    steps = _pallas.cdiv(count, programs)
    return [
        _HeadPartition(
            tokens * heads, heads, dim // 2, first_lane, lanes, blocks.rows, programs, steps, prefetch=blocks.loads > 1
        )
        for heads, first_lane, lanes in sides
    ]


def _launch(kernel: Callable, static: StaticArgs, heads, weights, tables, interpret: bool, blocks, *, sums: bool):
    """Runs a kernel with refs (*heads, *weights, *tables, *results).

    The results have the shapes of q and k, which come first in `heads`. With `sums`, they are followed by the gradients of
    the weights, which each program sums over its heads.
    """
    q, k, *_ = heads
    groups, dim = q.shape[0], q.shape[-1]
    blocks = blocks or _tuning.blocks(kernel.__name__.strip("_"), rows=q.size // dim, width=dim)
    of_q, of_k = _partition_heads(q, k, blocks)
    half = dim // 2
    rows = [x.reshape(-1, 2, half) for x in heads]
    partial_sums = (groups, of_q.lanes + of_k.lanes, of_q.programs, 2, half), _validate.accumulation_dtype(q.dtype)
    q_out, k_out, *d_weights = _pallas.launch(
        functools.partial(kernel, static=static, partitions=(of_q, of_k)),
        [*rows, *(x.reshape(groups, 2, half) for x in weights), *(x.reshape(-1, half) for x in tables)],
        [(x.shape, x.dtype) for x in rows[:2]] + [partial_sums] * sums,
        grid=(of_q.lanes + of_k.lanes, of_q.programs, groups),
        num_warps=blocks.num_warps,
        interpret=interpret,
    )
    d_weights = [part for x in d_weights for part in jnp.split(x, (of_k.first_lane,), axis=1)]
    d_weights = [jnp.sum(x, axis=(1, 2)).reshape(groups, dim) for x in d_weights]
    return q_out.reshape(q.shape), k_out.reshape(k.shape), *d_weights


def forward_kernel(
    static: StaticArgs, q, k, q_weight, k_weight, cos, sin, *, interpret: bool, blocks: Blocks | None = None
):
    """As _forward_xla."""
    operands = (q, k), (q_weight, k_weight), (cos, sin)
    return _launch(_qk_norm_rope_forward, static, *operands, interpret, blocks, sums=False)


def backward_kernel(
    static: StaticArgs, q, k, d_q, d_k, q_weight, k_weight, cos, sin, *, interpret: bool, blocks: Blocks | None = None
):
    """As _backward_xla."""
    operands = (q, k, d_q, d_k), (q_weight, k_weight), (cos, sin)
    return _launch(_qk_norm_rope_backward, static, *operands, interpret, blocks, sums=True)


# ---- the operation: N is the heads of q and those of k, which are sharded alike ----------------------------------------

_HEADS, _TABLES = "G B T N D", "G B T D/2"

_OPERATION = DifferentiableOp(
    forward=Pass(
        choose_implementation(forward_kernel, _forward_xla),
        operands={
            "q": _HEADS,
            "k": _HEADS,
            "q_weight": "G D",
            "k_weight": "G D",
            "cos": _TABLES,
            "sin": _TABLES,
        },
        results={"q_out": _HEADS, "k_out": _HEADS},
        parallel=("G", "B", "T", "N"),
    ),
    backward=Pass(
        choose_implementation(backward_kernel, _backward_xla),
        operands={
            "q": _HEADS,
            "k": _HEADS,
            "d_q_out": _HEADS,
            "d_k_out": _HEADS,
            "q_weight": "G D",
            "k_weight": "G D",
            "cos": _TABLES,
            "sin": _TABLES,
        },
        results={"d_q": _HEADS, "d_k": _HEADS, "d_q_weight": "G D", "d_k_weight": "G D"},
        parallel=("G", "B", "T", "N"),
    ),
    returns=("q_out", "k_out"),
)
