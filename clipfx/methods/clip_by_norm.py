"""`clip_by_norm`: measures, asks the threshold, responds, scales."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import responses
from clipfx._core import builder
from clipfx._core.checks import helpful, is_known, is_number
from clipfx._core.clip_factors import finite_norms
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import widest
from clipfx._core.norms import Norms, check_ord, group_norms
from clipfx._core.state import ClipMetrics, ClipState
from clipfx._types import AxisName, GroupSpec, Limit, Scalar, Tree
from clipfx.thresholds import Threshold, as_threshold


@helpful
def clip_by_norm(
    threshold: Limit,
    *,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Changes the norm of each group of leaves, and keeps its direction.

    With :math:`n_k = \lVert g_k \rVert_p` the norm of group k, :math:`c_k` its
    threshold and :math:`\psi` the response,

    .. math:: g_k \leftarrow g_k \, \psi_{c_k}(n_k) / n_k .

    All norm-based methods of the library are this function with a name. Promises, each
    with a test of the same name:

    ========================= =======================================================
    identity_below_threshold  a norm up to the threshold: unchanged, bit for bit
    bound_of_what_is_stored   `hard`: the norm of the result, in float64, is at most
                              threshold (1 + 1e-6), in float32, bfloat16 and float16
    direction_is_kept         of each group, at every finite magnitude
    clipping_twice            equals clipping once, bit for bit (`hard`)
    wide_accumulation         sums in float32 or wider over elements and leaves
    extreme_magnitudes        1e38, 1e-30 and float16 of 300 give a correct factor
    same_type_out             dtype, shape, structure and sharding equal the input's
    uncounted_leaves          integers, bools, float0, None, MaskedNode pass through
    zero_threshold            gives zeros, never NaN
    infinite_threshold        gives the identity, also when differentiated
    negative_threshold        `ValueError` when concrete, acts as 0 when traced
    derivative_at_zero        finite
    nonfinite_norm            the whole group becomes NaN, or zero, by `nonfinite`
    nothing_is_learned        from a step with a norm that is not finite
    fixed_state               structure, shapes, dtypes from `init` on; scans
    one_all_reduce            per step, however many groups (under jit with Auto axes
                              one more for each further way that leaves are split)
    sharded_equals_whole      to 1e-6, under jit and in `shard_map`
    unknown_extra_args        are ignored
    ========================= =======================================================

    Args:
      threshold: :math:`c`: a number >= 0, an array `[G]`, a dict by group name, an
        Optax schedule, or a `clipfx.thresholds.Threshold`.
      groups: Which leaves share a norm. `"global"`: all; `"layer"`: those with the
        same parent (`{"dense": {"kernel", "bias"}}` is one group, `"dense"`; so are
        `dense/kernel` and `dense/bias` as keys of a flat dict); `"leaf"`: each alone; a
        tree prefix of labels; a function from the tree to one, as in `optax.partition`;
        or a function of a leaf's path, whose parameter is called `path`: a tuple of
        strings, `lambda path: path[0]`. A leaf that stacks layers for `scan` is one
        leaf: see `clipfx.per_stacked_layer`. Static.
      response: From norms and thresholds `[G]` to new norms `[G]`, one of
        `clipfx.responses` or your own; None means `hard`.
      ord: p of the norm: a number >= 1 or `math.inf`; None means 2. Static. Scaling
        to a p-norm is a projection for p = 2 only.
      axis_name: Mesh axes that *all* updates are split over, for `pmap` and for
        `shard_map(check_vma=False)`. Nowhere else needed: under `jit` arrays are
        whole, and `shard_map` knows which leaf varies over what. Do not pass the axis
        of a data-parallel average: after the average, updates are not split over it.
      nonfinite: What becomes of a group whose norm is infinite or NaN: `"propagate"`
        makes all of it NaN, for `optax.apply_if_finite` or a person to see; `"zero"`
        drops it. Counted either way.

    Returns:
      A transform with `ClipState`, for `optax.chain`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a concrete threshold is negative or NaN, or has not one entry per
        group; if `ord` is below 1, `groups` an unknown string, a leaf without a label,
        `nonfinite` unknown; if the groups at `update` are not those at `init`.

    Example:
      >>> import math, optax
      >>> tx = optax.chain(
      ...     clip_by_norm(1.0, groups="layer", response=responses.tanh, ord=math.inf),
      ...     optax.adamw(3e-4))

    Differs from the source: the factor is exactly 1 up to the threshold, without the
    small constant that some libraries add to the norm, and within 2^-21 of 1.

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    return builder.by_norm(
        as_threshold(threshold),
        responses.check_response(response),
        groups=groups,
        ord=check_ord(ord),
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def tree_clip(
    tree: Tree,
    max_norm: Limit,
    *,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> tuple[Any, ClipMetrics]:
    r"""Clips one tree, for those who use no chain.

    .. math:: g_k \leftarrow g_k \, \psi_{c_k}(n_k) / n_k

    Args:
      tree: Leaves `[...]`.
      max_norm: A number >= 0, an array `[G]`, or a dict by group name.
      groups: See `clip_by_norm`. Static.
      response: See `clip_by_norm`.
      ord: See `clip_by_norm`. Static.
      axis_name: See `clip_by_norm`. Static.
      nonfinite: See `clip_by_norm`. Static.

    Returns:
      The clipped tree, and `ClipMetrics` `[G]` of this one step.

    Raises:
      TypeError: If `max_norm` has state, as a schedule has; besides, see
        `clip_by_norm`.
      ValueError: See `clip_by_norm`.

    Example:
      >>> clipped, metrics = tree_clip({"w": jnp.array([3.0, 4.0])}, 1.0)
      >>> clipped["w"]
      Array([0.6, 0.8], dtype=float32)

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    _check_stateless(max_norm)
    tx = clip_by_norm(
        max_norm,
        groups=groups,
        response=response,
        ord=ord,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
    clipped, state = tx.update(tree, tx.init(tree))
    return clipped, cast(ClipState, state).metrics


@helpful
def clip_with_norm(
    updates: Tree,
    norm: Scalar,
    max_norm: Limit,
    *,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    nonfinite: str = "propagate",
) -> tuple[Any, ClipMetrics]:
    r"""Clips one tree by a norm that was measured elsewhere.

    .. math:: g_k \leftarrow g_k \, \psi_{c_k}(n_k) / n_k

    For pipelines whose stages hold a part of the parameters each, and loops that clip
    several trees by the norm of all of them: `clipfx.global_norm` takes several.

    Args:
      updates: Leaves `[...]`.
      norm: :math:`n_k` >= 0: a number, or an array `[G]`. What is not finite makes the
        group NaN or zero, by `nonfinite`.
      max_norm: See `clipfx.tree_clip`.
      groups: See `clipfx.clip_by_norm`. Static.
      response: See `clipfx.clip_by_norm`.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      The clipped tree, and `ClipMetrics` `[G]` of this one step.

    Raises:
      TypeError: If `max_norm` has state, as a schedule has, or `norm` is no number.
      ValueError: If `norm` is concrete and negative, or neither a number nor of shape
        `[G]`; besides, see `clipfx.clip_by_norm`.

    Example:
      >>> stages = [{"w": jnp.array([3.0])}, {"w": jnp.array([4.0])}]
      >>> norm = global_norm(*stages)
      >>> [f"{clip_with_norm(x, norm, 1.0)[0]['w'][0]:.3f}" for x in stages]
      ['0.600', '0.800']

    Reference: none.
    """
    _check_stateless(max_norm)
    advice = "clipfx.global_norm measures one tree or several"
    if not is_number(norm):
        raise TypeError(f"norm must be a number or an array, got {norm!r}; {advice}.")
    if is_known(norm) and (np.asarray(norm) < 0).any():
        raise ValueError(f"norm must be >= 0, got {norm!r}; {advice}.")

    def given(updates: Any, members: Any, params: Any, state: Any) -> tuple:
        number = jnp.asarray(norm)
        number = number.astype(widest([jnp.result_type(number, jnp.float32)]))
        if number.ndim and number.shape != (len(members.names),):
            raise ValueError(
                f"norm must be a number or have shape ({len(members.names)},), one "
                f"entry for each group of {members.names}, got {number.shape}; "
                f"{advice}."
            )
        number = jnp.broadcast_to(number, (len(members.names),))
        return Norms(number, jnp.ones_like(number)), {}

    tx = builder.by_norm(
        as_threshold(max_norm),
        responses.check_response(response),
        groups=groups,
        nonfinite=nonfinite,
        measure=given,
    )
    clipped, state = tx.update(updates, tx.init(updates))
    return clipped, cast(ClipState, state).metrics


def _check_stateless(max_norm: Any) -> None:
    if callable(max_norm) or isinstance(max_norm, Threshold):
        raise TypeError(
            "max_norm must be a number, an array [G] or a dict by group name, got "
            f"{max_norm!r}, which needs state; use clipfx.clip_by_norm in a chain."
        )


@helpful
def global_norm(
    *trees: Any, ord: float | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    r"""Measures one tree or several as one long vector, :math:`(\sum_i |x_i|^p)^{1/p}`.

    Args:
      trees: Leaves `[...]`; integers and other uncounted leaves are left out.
      ord: See `clip_by_norm`. Static.
      axis_name: See `clip_by_norm`. Static.

    Returns:
      A scalar, float32, or float64 if a leaf is. At most the largest finite number
      unless an element is infinite or NaN; 0 where no leaf is counted.

    Raises:
      TypeError: If `ord` is not a static number.
      ValueError: If `ord` is below 1.

    Example:
      >>> global_norm({"w": jnp.full(4096, 1.0, jnp.bfloat16)})
      Array(64., dtype=float32)

    Reference: none.
    """
    groups = group_leaves("global", trees)
    norms = group_norms(trees, groups, check_ord(ord), axis_name)
    return finite_norms(norms, norms.value.dtype)[0]
