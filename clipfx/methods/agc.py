"""NFNet's AGC: gradients of units against their weights."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat
from clipfx._core import builder
from clipfx._core.checks import check_number, check_params, helpful
from clipfx._core.clip_factors import check_nonfinite, exceeds
from clipfx._core.leaves import divide, narrow, times, widen
from clipfx._core.matching import places, take
from clipfx._core.paths import leaves_with_path, prefix_lookup
from clipfx._core.running_stats import LARGEST, multiple
from clipfx._core.safe_sums import far
from clipfx._types import AxisName, Scalar


@helpful
def agc(
    max_ratio: Scalar = 0.01,
    eps: Scalar = 1e-3,
    *,
    axis: Any = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the gradient of each unit by a share of the unit's weights.

    .. math:: G_i \leftarrow G_i \min\Bigl(1, \lambda
        \frac{\max(\lVert W_i \rVert, \epsilon)}{\lVert G_i \rVert}\Bigr)

    for the units i of every leaf: what feeds one output. Without `axis` the rank says
    which axes a unit runs over: of scalars, vectors and leaves of one long axis all, of
    rank 2 and 3 the first, of rank 4 and more all but the last. That is right for
    kernels stored input first, as in Flax and Haiku; say it for others. An embedding
    `[V, D]` wants `axis=1`, an attention output kernel `[heads, head_dim, out]`
    `axis=(0, 1)`, and a one-dimensional convolution `[width, in, out]` too.

    The paper leaves out the classifier's weights, and clips biases and gains:

    >>> not_head = lambda params: {name: name != "head" for name in params}
    >>> tx = optax.chain(optax.masked(agc(0.01), not_head), optax.sgd(0.1))

    Weights of zero still move, by :math:`\lambda\epsilon` per step and unit of learning
    rate: layers that start at zero start slowly.

    Args:
      max_ratio: :math:`\lambda` >= 0; 0.01 for batches of 1024 and more, up to 0.16 for
        small ones.
      eps: :math:`\epsilon` >= 0, the least norm that weights count as.
      axis: Axes that a unit runs over: an int or a tuple of ints for all leaves, a
        dict by path, a tree prefix, of such, or a function to such from the path of a
        leaf, as `jax.tree_util` has it: `lambda path: 1 if "embed" in str(path) else
        None`. Without an entry, and for None, the rank decides. Static.
      axis_name: Mesh axes that units are split over, for `shard_map` and `pmap`: a
        name, a tuple of names, or a dict by path of such; `()` if each unit lies whole
        on one device. Needed in `shard_map` for leaves that are split: whether along a
        unit or between units their type does not tell. Static.
      nonfinite: What becomes of a unit whose norm is infinite or NaN. See
        `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; `update` needs params. Its metrics are `[1]`:
      the norm is the largest ratio of a unit, the share that of clipped units. Updates
      `[...]` keep structure, shapes, dtypes and sharding.

    Raises:
      TypeError: If an argument is of the wrong kind, or `update` is not given params.
      ValueError: If a number is negative, `axis` does not fit a leaf, or a leaf is
        split in `shard_map` and `axis_name`, or `axis` where its shards are vectors,
        says nothing of it.

    Example:
      >>> tx = agc(0.1)
      >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
      >>> grads = {"kernel": jnp.array([[6.0, 0.03], [8.0, 0.04]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"]
      Array([[0.3 , 0.03],
             [0.4 , 0.04]], dtype=float32)

    Differs from the source: ranks above 4 are taken too. `optax.adaptive_grad_clip`
    reduces the same axes, whatever its docstring says of rank 3.

    Reference: Brock et al., `High-performance large-scale image recognition without
    normalization <https://arxiv.org/abs/2102.06171>`_, 2021.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "0.01 is what the paper takes")
    check_number("eps", eps, "[0, inf)", "1e-3 is what the paper takes")
    check_nonfinite(nonfinite)
    is_entry = lambda node: not isinstance(node, Mapping)
    axis_of = prefix_lookup(axis, is_entry)
    names_of = prefix_lookup(axis_name, is_entry)

    def clip(path, x, w):
        """A leaf, clipped, and of each unit its norm over what the weights allow."""
        x = jnp.asarray(x)
        split = _compat.varying_axes(x) | _compat.varying_axes(w)
        over = names_of(path)
        over = _no_mesh_axes(path, split) if over is None else over
        over = (over,) if isinstance(over, str) else tuple(over)
        along = axis_of(path)
        along = along(path) if callable(along) else along
        axes = _unit_axes(path, x.shape, along, bool(over or split))
        g, w = widen(x), widen(jnp.asarray(w))
        norm, size = (_unit_norm(v, axes, over).astype(jnp.finfo(g.dtype).dtype)
                      for v in (g, w))  # fmt: skip
        size = jnp.maximum(size, eps)
        limit = multiple(jnp.maximum(max_ratio, 0), size)
        over_limit = exceeds(norm, limit)
        # Two factors, since one may be no normal number.
        up = far(norm.dtype)
        first = jnp.where(over_limit & (norm / up > limit), 1 / up, 1)
        second = jnp.where(over_limit, norm * first, 1)
        second = divide(jnp.where(over_limit, limit, 1), second)
        clipped = times(times(g, first), second)
        # No NaN that is not the updates' own, for jax_debug_nans.
        instead = jnp.zeros_like(norm) if nonfinite == "zero" else norm - norm
        clipped = jnp.where(jnp.isfinite(norm), clipped, instead.astype(g.dtype))
        ratio = jnp.minimum(norm / jnp.where(size > 0, size, 1), LARGEST)
        ratio = jnp.where(size > 0, ratio, jnp.where(norm > 0, LARGEST, 0))
        return narrow(clipped, x.dtype), jnp.where(jnp.isfinite(norm), ratio, norm)

    def change(updates, groups, state, params):
        check_params(params, "agc")
        weights = take(params, places(params, updates, groups, "params"), updates)
        leaves, treedef = jax.tree.flatten(updates)
        ratios = []
        rows = zip(leaves_with_path(updates), weights, groups.index, strict=True)
        for k, ((path, x), w, i) in enumerate(rows):
            if i is not None:
                leaves[k], ratio = clip(path, x, w)
                ratios.append(ratio)
        limit = jnp.maximum(max_ratio, 0)
        became = lambda ratio: jnp.minimum(ratio, limit)
        return builder.Parts(treedef.unflatten(leaves), state, ratios, limit, became)

    return builder.by_part(change)


def _unit_axes(
    path: tuple, shape: tuple[int, ...], axis: Any, split: bool
) -> tuple[int, ...]:
    rank = len(shape)
    if axis is None:
        is_long = lambda size: not isinstance(size, int) or size > 1  # or symbolic
        vector = sum(map(is_long, shape)) <= 1
        if vector and split and rank > 1:
            raise ValueError(
                f"axis must be given for {_show(path)}, which is split, got a shard of "
                f"shape {shape}; it does not tell whether the whole leaf is a vector."
            )
        if vector:
            return tuple(range(rank))
        return (0,) if rank < 4 else tuple(range(rank - 1))
    try:
        entries = axis if isinstance(axis, tuple | list) else (axis,)
        axes = tuple(operator.index(a) for a in entries)
    except TypeError:
        axes = (rank,)
    if not all(-rank <= a < rank for a in axes):
        raise ValueError(
            f"axis must name axes of every leaf, got {axis!r} for {_show(path)} of "
            f"shape {shape}; pass a dict by path, such as "
            '{"embed": 1, "attention": {"out": (0, 1)}}.'
        )
    return axes


def _no_mesh_axes(path: tuple, split: frozenset[str]) -> tuple:
    if split:
        raise ValueError(
            f"axis_name must say whether units of {_show(path)} are split over the "
            f"mesh axes {sorted(split)}, got nothing; name those that they are split "
            "over, () for none, in a dict by path where leaves differ."
        )
    return ()


def _show(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the only leaf"


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _unit_norm(x: jax.Array, axes: tuple, over: tuple) -> jax.Array:
    """The 2-norm along axes, which stay with length 1; also of elements of 1e38."""
    square = lambda v: jnp.square(v.real) + jnp.square(v.imag)
    up = far(jnp.finfo(x.dtype).dtype)
    total = jnp.sum(square(x), axes, keepdims=True)
    small = jnp.sum(square(x / up), axes, keepdims=True)
    if over:
        total, small = jax.lax.psum((total, small), over)
    root = lambda v: jnp.sqrt(jnp.where(v == 0, 1, v))
    largest = jnp.finfo(total.dtype).max
    rescued = jnp.minimum(root(small) * up, largest)
    norm = jnp.where(jnp.isinf(total) & jnp.isfinite(small), rescued, root(total))
    return jnp.where(total == 0, 0, norm)
