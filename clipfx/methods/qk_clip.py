"""QK-Clip: query and key weights against the largest attention logit of each head."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import _compat
from clipfx._core.checks import check_count, check_number, check_params, helpful
from clipfx._core.clip_factors import exceeds
from clipfx._core.groups import group_leaves, picked
from clipfx._core.leaves import times, widen
from clipfx._core.matching import places, take
from clipfx._core.paths import ordered
from clipfx._core.projections import (
    ROLES,
    Part,
    Projections,
    check_heads,
    key_heads,
    layers_of,
    logits_by_layer,
    members_of,
    names_of_groups,
    which_leaves,
)
from clipfx._core.reductions import as_tuple
from clipfx._core.state import ClipState, check_same_groups, fresh_metrics, next_state
from clipfx._types import AxisName, Scalar


@helpful
def qk_clip(
    tau: Scalar = 100.0,
    alpha: Scalar = 0.5,
    *,
    query: Any = "query",
    key: Any = "key",
    rotary_query: Any = None,
    content_dim: int | None = None,
    head_axis: int | None = None,
    layer_axis: int | None = None,
    batch_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the query and key weights of heads whose attention logits are too large.

    With :math:`S_h` the largest logit of head h in the batch, scaled and in front of
    the softmax,

    .. math::
        \gamma_h = \min(1, \tau / S_h), \qquad
        W_q^h \leftarrow \gamma_h^\alpha W_q^h, \qquad
        W_k^h \leftarrow \gamma_h^{1 - \alpha} W_k^h

    *after* the step of the optimizer, so last in the chain: updates become
    :math:`u' = \gamma^\alpha (w + u) - w`. Biases of query and key are scaled as their
    kernels are. A logit of these weights on the same data is then at most
    :math:`\tau`; what one step adds to it shows in the S of the next.

    - Multi-head: one :math:`\gamma` for each head.
    - Grouped and multi-query: S is first maximised over the query heads that share a
      key head, and one :math:`\gamma` is for all of the group.
    - Latent (MLA): content parts of query and key as above, the rotary part of the
      query by :math:`\gamma`; its rotary key, shared by all heads, and values stay.

    The defaults are for the attention modules of Flax. `update` wants the logits of the
    *same* step, from `clipfx.max_attention_logits` or a kernel:

    >>> clip = optax.chain(optax.adam(1e-3), qk_clip(100.0))
    >>> params = {"block_0": {"query": {"kernel": jnp.ones((8, 2, 4))},
    ...                       "key": {"kernel": jnp.ones((8, 2, 4))}}}
    >>> logits = {"block_0": jnp.array([50.0, 400.0])}  # one for each query head
    >>> zeros = jax.tree.map(jnp.zeros_like, params)
    >>> u, state = clip.update(zeros, clip.init(params), params, max_logits=logits)
    >>> optax.apply_updates(params, u)["block_0"]["query"]["kernel"][0, :, 0]
    Array([1. , 0.5], dtype=float32)

    For DeepSeek's latent attention with its fused projections, content first:

    >>> mla = qk_clip(query="q_b_proj", key="kv_b_proj", content_dim=128)

    and where each part is a leaf of its own:

    >>> mla = qk_clip(query="q_nope", rotary_query="q_rope", key="k_nope")

    Args:
      tau: :math:`\tau` > 0, the largest logit; `math.inf` changes nothing.
      alpha: The query's share in [0, 1]: 0 leaves queries alone, 1 leaves keys.
      query: Which leaves are query projections: a word, or several with `/` between
        them, of their paths, where what stands before it names the layer; a function
        of a leaf's `path` that gives the name of its layer, None for other leaves; or a
        tree prefix of such names. With an index, a pair, it is part of a leaf:
        `("c_attn", np.s_[..., :768])`. Static.
      key: Key projections, in the same way, layer by layer. Static.
      rotary_query: The rotary part of queries in MLA, where it is a leaf of its own.
        Static.
      content_dim: In MLA with fused leaves, how many features of each head are content:
        those behind them are rotary in a query, and values in a key. Static.
      head_axis: Axis of heads, or of heads times features, of a kernel without
        layers. None for -2 of `[..., N, d]`, as `DenseGeneral` has it, and -1 of
        matrices `[D, N d]`. 0 for `[N d, D]`, as in Equinox, and `[N, D, d]`. Biases
        are `[N, d]` or `[N d]`. Static.
      layer_axis: Where a leaf stacks layers, which axis; None where none does. Static.
      batch_axis_name: In `shard_map` and `pmap` the mesh axes that the batch is split
        over, a name or a tuple of names: the largest S over them is taken. None where
        types tell: in `shard_map`, unless it splits weights over the same axes, by
        heads or for FSDP; `()` if heads are split and the batch is not. Static.

    Returns:
      A transform with `clipfx.ClipState`; `update` needs params and `max_logits`. Its
      metrics are `[G]`, a group for each layer: the norm is the largest S of its heads,
      the factor the smallest :math:`\gamma`, the share that of clipped key heads.
      Updates `[...]` keep structure, shapes and dtypes.

    `max_logits` has for every layer an array `[N]`, or `[L, N]` of stacked layers: a
    dict by name of layer, `{"block_0": ...}` or nested as parameters are; what modules
    of Flax have sown, as it is; or an array alone, if there is but one layer. Of
    several arrays of a layer, or below it, as of a module that was called twice, the
    largest count. It must be the maximum over *all* of the batch. Under `jit` it is; in
    `shard_map` and `pmap` it becomes so, see `batch_axis_name`; over micro-batches
    carry it, `seen = jax.tree.map(jnp.maximum, seen, new)`, from -inf, since
    `optax.MultiSteps` shows the transform the last one only.

    An S that is not positive leaves its head alone, :math:`\gamma = 1`; so does one
    that is NaN or infinite, which is counted as `nonfinite`.

    With functions or axes and `optax.inject_hyperparams`, pass `static_args`.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given params or
        `max_logits`.
      ValueError: If a number is out of range, a word fits no leaf, a layer lacks a
        projection or its logits, or heads and shapes do not agree.

    Traps:
      - With normalised queries and keys (QK-norm) it does nothing, since their scale is
        normalised away; gains of the norm would have to be bounded.
      - Logits in front of a soft cap are meant; capped ones say nothing.
      - Give it the master copies: parameters in float32, with the cast to half
        precision behind. Half precision is computed in float32 and rounded, which may
        exceed the bound by the rounding of w, :math:`2^{-8}/\gamma` in bfloat16.
      - Averages of the optimizer, Adam's v and momentum, are not rescaled, nor are
        they in any source.

    Differs from the source: MaxText divides by S + 1e-6; the report is of MLA, with
    alpha 1/2. S may be of magnitudes, see `clipfx.max_attention_logits`.

    Reference: Kimi Team, `Kimi K2: open agentic intelligence
    <https://arxiv.org/abs/2507.20534>`_, 2025; grouped queries as in Megatron-LM.
    """
    check_number("tau", tau, "(0, inf]", "100 is what the report takes")
    check_number("alpha", alpha, "[0, 1]", "0.5 is what the report takes")
    if content_dim is not None:
        check_count("content_dim", content_dim, 1, "None if no leaf has two parts")
    for name, axis in (("head_axis", head_axis), ("layer_axis", layer_axis)):
        if axis is not None:
            check_count(name, axis, -8, "None is the default")
    given = {"query": query, "key": key, "rotary_query": rotary_query}
    roles = [role for role in ROLES if given[role] is not None or role != ROLES[1]]
    which = {role: which_leaves(role, given[role]) for role in roles}
    fixed = Projections(which, content_dim, head_axis, layer_axis)

    def init(params: Any) -> ClipState:
        layers = layers_of(fixed, params)
        return ClipState((), fresh_metrics(params, members_of(fixed, layers)))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        check_params(params, "qk_clip")
        if max_logits is None:
            raise TypeError(
                "max_logits must be passed to qk_clip, got None; call "
                "tx.update(updates, state, params, max_logits=...) with what "
                "clipfx.max_attention_logits says of each layer in this step."
            )
        layers = layers_of(fixed, updates)
        check_same_groups(state, members_of(fixed, layers))
        groups = group_leaves("global", updates)
        weights = take(params, places(params, updates, groups, "params"), updates)
        leaves, treedef = jax.tree.flatten(updates)
        seen = logits_by_layer(max_logits, layers)
        for name, parts in layers.items():
            check_heads(fixed, name, parts, seen[name])
        own = {name: [leaves[part.place] for part in parts] +
                     [weights[part.place] for part in parts]
               for name, parts in layers.items()}  # fmt: skip
        seen = _over_batch(seen, own, batch_axis_name)
        tops, gammas, shares = [], [], []
        for name, parts in layers.items():
            heads = key_heads(fixed, parts, seen[name].shape[-1])
            gamma, share = _gamma(seen[name], heads, tau)
            each = jnp.repeat(gamma, seen[name].shape[-1] // heads, -1)
            for part in parts:
                by = gamma if part.role == "key" else each
                scaled = functools.partial(_scaled, fixed, part, by, alpha)
                u, w = leaves[part.place], weights[part.place]
                leaves[part.place] = _on_part(scaled, part.index, u, w)
            tops.append(seen[name].max(-1))
            gammas.append(gamma.min(-1))
            shares.append(share)
        if not layers:
            return updates, state
        flat = lambda x: jnp.atleast_1d(x).astype(jnp.float32)
        numbers = [jnp.concatenate([*map(flat, x)]) for x in (tops, gammas, shares)]
        names = names_of_groups(fixed, layers)
        order = [names.index(name) for name in ordered(names)]
        norm, gamma, share = (picked(x, order, 0) for x in _everywhere(*numbers))
        limit = jnp.maximum(jnp.asarray(tau).astype(jnp.float32), 0)
        limit = jnp.broadcast_to(limit, norm.shape)
        after = next_state(state, (), norm, limit, gamma, norm.max(), share)
        # Weights of a layer that is not finite are left alone, not zero.
        metrics = after.metrics._replace(factor=gamma)
        return treedef.unflatten(leaves), after._replace(metrics=metrics)

    return optax.GradientTransformationExtraArgs(init, update)


def _over_batch(
    seen: dict[str, jax.Array], own: dict[str, list[Any]], axis_name: Any
) -> dict[str, jax.Array]:
    """The largest over the mesh axes that the batch is split over."""
    over: dict[str, frozenset[Any]] = {}
    for name, logits in seen.items():
        axes = _compat.varying_axes(logits)
        if axis_name is not None:
            over[name] = frozenset(as_tuple(axis_name))
            continue
        leaves = frozenset[str]().union(*map(_compat.varying_axes, own[name]))
        if axes & leaves:
            raise ValueError(
                f"batch_axis_name must say whether mesh axes {sorted(axes & leaves)}, "
                f"over which max_logits and weights of {name!r} are split, split "
                "batches or heads, got nothing; name those of the batch, () for none."
            )
        over[name] = axes
    result = dict(seen)
    for axes in {*over.values()} - {frozenset()}:
        names = [name for name in seen if over[name] == axes]
        # NaN is lost in some maxima; infinity, which is treated as it is, in none.
        rows = [jnp.where(jnp.isnan(seen[name]), jnp.inf, seen[name]) for name in names]
        wide = functools.reduce(jnp.promote_types, (row.dtype for row in rows))
        flat = jnp.concatenate([row.ravel().astype(wide) for row in rows])
        top = jax.lax.pmax(_compat.vary(flat, axes), tuple(sorted(axes, key=str)))
        ends = [*itertools.accumulate(row.size for row in rows)]
        for name, row, end in zip(names, rows, ends, strict=True):
            part = top[end - row.size : end]
            result[name] = part.reshape(row.shape).astype(row.dtype)
    return result


def _everywhere(
    top: jax.Array, gamma: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The metrics `[G]` of all heads, where `shard_map` splits heads over devices."""
    axes = tuple(sorted(_compat.varying_axes(top)))
    if not axes:
        return top, gamma, share
    top = jnp.where(jnp.isnan(top), jnp.inf, top)
    top, least = jax.lax.pmax(jnp.stack([top, -gamma]), axes)
    return top, -least, jax.lax.pmean(share, axes)


def _gamma(logits: jax.Array, heads: int, tau: Any) -> tuple[jax.Array, jax.Array]:
    """Gamma of key heads, `[K]` or `[L, K]`, and which share of them is scaled."""
    # Of a head that is not finite nobody knows by how much to shrink it.
    finite = jnp.where(jnp.isfinite(logits), logits, -jnp.inf)
    top = finite.reshape(*logits.shape[:-1], heads, -1).max(-1)
    limit = jnp.maximum(jnp.asarray(tau).astype(logits.dtype), 0)
    above = top > limit
    gamma = jnp.where(above, limit / jnp.where(above, top, 1), 1)
    return gamma, exceeds(top, limit).astype(jnp.float32).mean(-1)


def _scaled(
    fixed: Projections,
    part: Part,
    gamma: jax.Array,
    alpha: Any,
    u: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """The update to weights scaled by gamma, `[N]` or `[L, N]` of N heads."""
    *layers, heads = gamma.shape
    features = part.shape[part.axis] // heads if part.flat else part.shape[-1]
    alpha = jnp.asarray(alpha).astype(gamma.dtype)
    powers = {"query": (alpha, 1), "key": (1 - alpha, 0), "rotary_query": (1, 1)}
    first, rest = (gamma**power for power in powers[part.role])
    content = features if fixed.content_dim is None else fixed.content_dim
    by_feature = part.role != "rotary_query" and content < features
    factor = first
    if part.flat or by_feature:
        widths = [content, features - content] if by_feature else [features]
        factor = jnp.concatenate(
            [
                jnp.broadcast_to(row[..., None], (*row.shape, width))
                for row, width in zip((first, rest), widths, strict=False)
            ],
            -1,
        )
    if part.flat:
        factor = factor.reshape(*layers, heads * features)
    # Where the axes of the factor lie among those of the weights.
    others = [*range(u.ndim)]
    at = [others.pop(fixed.layer_axis)] if fixed.layer_axis is not None else []
    at += [others[part.axis], *([others[-1]] if by_feature and not part.flat else [])]
    shape = [1] * u.ndim
    for a, size in zip(at, factor.shape, strict=True):
        shape[a] = size
    factor = factor.transpose(np.argsort(at).tolist()).reshape(shape)
    old, wide = u, jnp.promote_types(widen(u).dtype, widen(w).dtype)
    u, w = u.astype(wide), w.astype(wide)
    # Not factor * (w + u) - w, in which a factor near 1 would cancel.
    new = times(u, factor) - times(w, 1 - factor)
    return jnp.where(factor < 1, new.astype(old.dtype), old)


def _on_part(
    fun: Callable[[jax.Array, jax.Array], jax.Array], index: Any, u: Any, w: Any
) -> jax.Array:
    u, w = jnp.asarray(u), jnp.asarray(w)
    return fun(u, w) if index is None else u.at[index].set(fun(u[index], w[index]))
