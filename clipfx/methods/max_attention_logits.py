"""The largest attention logit of each head, without the matrix of logits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import check_count, helpful
from clipfx._core.leaves import widest


@helpful
def max_attention_logits(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    segment_ids: Any = None,
    scale: Any = None,
    signed: bool = True,
    block_size: int = 256,
) -> jax.Array:
    r"""The largest attention logit of each query head, for `clipfx.qk_clip`.

    .. math:: S_h = \max_{b, t, s} \frac{q_{bth} \cdot k_{bs\lceil h \rceil}}{\sqrt d}

    over all pairs of positions that attend to each other, where
    :math:`\lceil h \rceil` is the key head of query head h. It is what
    `jax.nn.dot_product_attention` computes in front of its softmax, again: logits are
    formed block by block and forgotten, in memory `[B, N, block_size, block_size]`.
    That costs a forward pass of query times key, a causal one half of it, and nothing
    backward. A kernel that gives the maximum of its logits, or of their rows, is
    cheaper; and who has the logits `[B, N, T, S]` anyway, masked by -inf, takes
    `jax.lax.stop_gradient(logits).max((0, 2, 3))`.

    Give it query and key as they are multiplied: behind rotary embeddings and norms,
    of latent attention content and rotary parts side by side. An additive bias of
    positions is not part of S: no rescaling of weights changes it.

    Args:
      query: `[B, T, N, d]`, or `[T, N, d]`.
      key: `[B, S, K, d]`, or `[S, K, d]`, where K divides N: key head k serves query
        heads k N / K to (k + 1) N / K - 1, as in `jax.nn.dot_product_attention`.
      mask: bool, broadcastable to `[B, N, T, S]`, True where t attends to s.
      is_causal: Whether t attends to s <= t only, both counted from the first of the
        array: of shards of a sequence say it with a mask. Static.
      segment_ids: int `[B, T]` of packed sequences, for query and key alike, or a pair
        `[B, T]`, `[B, S]`: positions attend within their segment.
      scale: Of the logits; None for :math:`1/\sqrt d`.
      signed: Whether S is the largest logit; else it is the largest magnitude. Static.
      block_size: Positions of query and key in a block. Static.

    Returns:
      `[N]`, float32 or wider: products of half precision are summed in float32, those
      of float32 at JAX's default precision, as by attention itself. -inf
      for a head none of whose positions attend. No gradient flows through it. Inside of
      `shard_map` and `pmap` it is that of the shard.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If shapes do not fit, or `block_size` is less than 1.

    Example:
      >>> q = k = jnp.full((1, 1, 1, 2), 10.0)
      >>> max_attention_logits(q, k, scale=1.0)
      Array([200.], dtype=float32)

    Differs from the source: the report has this maximum from its attention kernel.

    Reference: Kimi Team, `Kimi K2: open agentic intelligence
    <https://arxiv.org/abs/2507.20534>`_, 2025.
    """
    check_count("block_size", block_size, 1, "256 is the default")
    query, key = jax.lax.stop_gradient((jnp.asarray(query), jnp.asarray(key)))
    if query.ndim == key.ndim == 3:
        query, key = query[None], key[None]
    _check_shapes(query, key)
    ids = segment_ids if isinstance(segment_ids, tuple | list) else [segment_ids] * 2
    ids = [x if x is None or jnp.ndim(x) == 2 else jnp.asarray(x)[None] for x in ids]
    length, keys = query.shape[1], key.shape[1]
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[2] // key.shape[2]
    wide = widest((query.dtype, key.dtype))
    rows, columns = min(block_size, length), min(block_size, keys)
    within, never = (jnp.arange(rows), jnp.arange(columns)), jnp.asarray(-jnp.inf, wide)

    def block(start: Any) -> jax.Array:
        """The largest logits of the block of query and key that begins at a pair."""
        t, s = start
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
        q, k = cut(query, t, rows), cut(key, s, columns)
        if repeats > 1:  # not `repeat`, which takes no axis that a mesh splits
            k = jnp.broadcast_to(k[:, :, :, None], (*k.shape[:3], repeats, k.shape[3]))
            k = k.reshape(*k.shape[:2], -1, k.shape[4])
        logits = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=wide)
        logits = logits * jnp.asarray(scale, wide)
        logits = logits if signed else jnp.abs(logits)
        keep = []
        if is_causal:
            # Of full rank, or a TPU would write the mask of every block.
            spread = functools.partial(jax.lax.broadcast_in_dim, shape=logits.shape)
            after = spread(within[0] + (t - s), broadcast_dimensions=(2,))
            keep.append(after >= spread(within[1], broadcast_dimensions=(3,)))
        if ids[0] is not None:
            mine, theirs = cut(ids[0], t, rows), cut(ids[1], s, columns)
            keep.append((mine[:, :, None] == theirs[:, None])[:, None])
        if mask is not None:
            part = mask
            for axis, first, size in ((2, t, rows), (3, s, columns)):
                if mask.shape[axis] > 1:
                    part = jax.lax.dynamic_slice_in_dim(part, first, size, axis)
            keep.append(part)
        for allowed in keep:
            allowed = jnp.broadcast_to(allowed, logits.shape)
            logits = jnp.where(allowed, logits, never)
        return logits.max((0, 2, 3))

    starts = _starts(length, rows, keys, columns, is_causal)
    if len(starts) == 1:
        return block((0, 0))
    # A block that would reach beyond the end begins earlier: to see a logit twice does
    # not change the maximum. What depends on no query the gradient of a scan over
    # layers would compute before it, as masks of all blocks: here all hangs on queries.
    starts, within, never, query = jax.lax.optimization_barrier(
        (jnp.asarray(starts.T), within, never, query)
    )
    return jax.lax.map(block, tuple(starts)).max(0)


def _starts(
    length: int, rows: int, keys: int, columns: int, is_causal: bool
) -> np.ndarray:
    """Where blocks begin, `[n, 2]`, without those that lie in the future."""
    first = lambda size, step: [min(k, size - step) for k in range(0, size, step)]
    pairs = itertools.product(first(length, rows), first(keys, columns))
    return np.array(
        [(t, s) for t, s in pairs if not is_causal or s < t + rows], np.int32
    ).reshape(-1, 2)


def _check_shapes(query: jax.Array, key: jax.Array) -> None:
    fits = query.ndim == key.ndim == 4 and all(
        query.shape[axis] == key.shape[axis] for axis in (0, 3)
    )
    if not fits or query.shape[2] % key.shape[2] or 0 in query.shape + key.shape:
        raise ValueError(
            "query and key must be [B, T, N, d] and [B, S, K, d], where K divides N, "
            f"got {query.shape} and {key.shape}; heads are the last axis but one."
        )
