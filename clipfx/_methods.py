"""The named methods: groups, threshold and response, with a paper."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._clip import clip_by_norm
from clipfx._norms import group_sizes
from clipfx.thresholds import Threshold, as_threshold


def clip_by_global_norm(
    max_norm: Any,
    *,
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the whole update where its norm exceeds a bound.

    .. math:: g \leftarrow g \, \min(1, c / \lVert g \rVert_p)

    Args:
      max_norm: :math:`c`: a number >= 0, or an Optax schedule.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[1]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If `max_norm` is concrete and negative or NaN, or `ord` below 1.

    Example:
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.adamw(3e-4))

    Differs from `optax.clip_by_global_norm`: see `clipfx.clip_by_norm`.

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013. As threshold they advise 0.5 to 10 times
    the average norm over many updates.
    """
    return clip_by_norm(max_norm, ord=ord, axis_name=axis_name, nonfinite=nonfinite)


def clip_per_layer(
    max_norm: Any,
    *,
    groups: Any = "layer",
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens the update of each layer where its norm exceeds a bound.

    .. math:: g_l \leftarrow g_l \, \min(1, c_l / \lVert g_l \rVert_p)

    The direction is kept inside a layer and changes between layers. With L layers the
    whole update is at most :math:`\sqrt{\sum_l c_l^2}` long, :math:`c\sqrt{L}` for one
    bound.

    Args:
      max_norm: :math:`c_l`: a number >= 0, an array `[G]`, a dict by layer, or an Optax
        schedule.
      groups: What a layer is: `"layer"`, leaves with the same parent; `"leaf"`; or
        a tree prefix of labels. See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or the bounds do not fit
        the groups; if `ord` is below 1.

    Example:
      >>> params = {"encoder": {"w": jnp.ones(4)}, "decoder": {"w": jnp.ones(4)}}
      >>> tx = clip_per_layer({"encoder": 1.0, "decoder": 0.5})
      >>> clipped, _ = tx.update(params, tx.init(params))
      >>> clipped["decoder"]["w"]
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)

    Reference: none; common practice since Pascanu et al., 2013.
    """
    return clip_by_norm(
        max_norm, groups=groups, ord=ord, axis_name=axis_name, nonfinite=nonfinite
    )


def clip_by_block_rms(
    max_rms: Any,
    *,
    groups: Any = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds the root mean square of each block of the update.

    .. math:: g_k \leftarrow g_k \, \min(1, c / \operatorname{rms}(g_k)), \quad
        \operatorname{rms}(g_k) = \lVert g_k \rVert_2 / \sqrt{d_k}

    with :math:`d_k` the number of elements. Norm and threshold in the metrics are
    those of the norm: :math:`\lVert g_k \rVert` and :math:`c \sqrt{d_k}`.

    Args:
      max_rms: :math:`c`, in units of one element: a number >= 0, an array `[G]`, a dict
        by group, or an Optax schedule.
      groups: What a block is, by default a leaf. See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a bound is concrete and negative or NaN, or does not fit the
        groups.

    Example:
      >>> tx = optax.chain(optax.scale_by_factored_rms(), clip_by_block_rms(1.0))

    Reference: Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    rule = as_threshold(max_rms)

    def update(norm, state, *, groups, updates, **extra):
        limit, state = rule.update(norm, state, groups=groups, updates=updates, **extra)
        return limit * jnp.sqrt(group_sizes(updates, groups, axis_name)), state

    return clip_by_norm(
        Threshold(rule.init, update),
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


def normalize_by_norm(
    target: Any = 1.0,
    *,
    groups: Any = "global",
    ord: float | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every update the same norm, whether longer or shorter.

    .. math:: g_k \leftarrow c\, g_k / \lVert g_k \rVert_p

    A norm of zero stays zero. In front of Adam a constant norm only weighs the steps
    against each other: Adam divides the scale out again.

    Args:
      target: :math:`c`: a number >= 0, an array `[G]`, a dict by group, or an Optax
        schedule.
      groups: See `clipfx.clip_by_norm`. Static.
      ord: p of the norm, None for 2. Static. See `clipfx.clip_by_norm`.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a target is concrete and negative or NaN, or does not fit the
        groups; if `ord` is below 1.

    Example:
      >>> tx = optax.chain(optax.trace(0.9), normalize_by_norm(), optax.sgd(1e-2))

    Reference: Cutkosky and Mehta, `Momentum improves normalized SGD
    <https://arxiv.org/abs/2002.03305>`_, 2020.
    """
    return clip_by_norm(
        target,
        groups=groups,
        response=responses.normalize,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


def per_stacked_layer(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Applies a transform to each slice of layers that are stacked for `scan`.

    Where L equal layers are one leaf `[L, ...]`, a norm "per layer" or "per leaf" is
    the norm of all of them. This maps `tx` over the leading axis of every leaf, so
    each layer has a norm, and statistics, of its own. For a model with other leaves
    too, wrap it in `optax.masked` or `optax.partition`.

    Args:
      tx: Any transform; its updates, params and state are mapped, extra arguments are
        given to every slice whole.

    Returns:
      A transform whose state is that of `tx` with a leading axis, `[L, ...]`.

    Raises:
      TypeError: If `tx` is not a gradient transformation.
      ValueError: If the leaves do not share the size of their leading axis.

    Example:
      >>> tx = per_stacked_layer(clip_by_global_norm(1.0))
      >>> layers = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
      >>> clipped, _ = tx.update(layers, tx.init(layers))
      >>> clipped["w"]
      Array([[0.6, 0.8],
             [0.3, 0.4]], dtype=float32)

    Reference: none; Levanter and axlearn each carry a clip of their own for this.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be an optax.GradientTransformation, got {tx!r}; pass the "
            "transform itself, as in per_stacked_layer(clip_by_global_norm(1.0))."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params):
        size = _stack_size(params)
        if not any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)
        ):
            return jax.vmap(tx.init)(params)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        repeat = lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x)))
        return jax.tree.map(repeat, tx.init(jax.tree.map(one, params)))

    def update(updates, state, params=None, **extra_args):
        _stack_size(updates)
        each = lambda u, s, p: inner.update(u, s, p, **extra_args)
        return jax.vmap(each)(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _stack_size(tree: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "per_stacked_layer expects leaves that share the size of a leading axis, "
            f"got shapes {shapes}; take the others out with optax.masked."
        )
    return sizes.pop()[0]
