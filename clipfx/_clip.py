"""`clip_by_norm`: measures, asks the threshold, responds, scales."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._checks import helpful
from clipfx._export import exportable
from clipfx._norms import Norms, check_ord, group_norms
from clipfx._paths import ordered, structure_of
from clipfx._range import far
from clipfx._statistics import LARGEST
from clipfx._tree import Groups, divide, group_leaves, scale_groups
from clipfx.thresholds import Threshold, as_threshold

# A factor this close to 1 is 1. It is wider than the rounding of a norm and of what
# was scaled by it, so that a clipped group is left alone when it is clipped again.
SLACK = 2.0**-21


@exportable("clipfx.ClipMetrics")
class ClipMetrics(NamedTuple):
    """What a person may want to see; nothing reads it but people. Always finite.

    Attributes:
      norm: float32 `[G]`, of the last step before clipping, at most the largest
        float32, as where it is not finite. What it became is `norm * factor`.
      threshold: float32 `[G]`, of the last step; the largest float32 for none, as
        before the first step.
      factor: float32 `[G]`, what the updates of the last step were multiplied by, 0
        where the norm was not finite.
      steps: int32 `[G]`, steps seen, all groups alike.
      clipped: int32 `[G]`, steps whose norm was finite and, by more than rounding,
        above its threshold.
      nonfinite: int32 `[G]`, steps whose norm was infinite or NaN.
      groups: The names of the groups, the keys of a dict of nothing: names are part
        of the structure, not of the data. `[G]` is in alphabetical order, with numbers
        as numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> _, metrics = tree_clip({"w": jnp.array([3.0, 4.0])}, 1.0)
      >>> tuple(metrics.groups), metrics.norm, metrics.factor
      (('global',), Array([5.], dtype=float32), Array([0.2], dtype=float32))

    Reference: none.
    """

    norm: jax.Array
    threshold: jax.Array
    factor: jax.Array
    steps: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    groups: dict[str, tuple[()]]


@exportable("clipfx.ClipState")
class ClipState(NamedTuple):
    """State of every clip by norm: fixed structure, shapes and dtypes from `init` on.

    Attributes:
      threshold: What the threshold's rule needs for the next step.
      metrics: `ClipMetrics`, `[G]` each; read them with `clipfx.metrics.read`.

    Reference: none.
    """

    threshold: Any
    metrics: ClipMetrics


@helpful
def clip_by_norm(
    threshold: Any,
    *,
    groups: Any = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: Any = None,
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
        same parent (`{"dense": {"kernel", "bias"}}` is one group, `"dense"`);
        `"leaf"`: each alone; or a tree prefix of labels, or a function from the tree
        to one, as in `optax.partition`. A leaf that stacks layers for `scan` is one
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
    rule = as_threshold(threshold)
    p = check_ord(ord)
    shape = responses.check_response(response)
    check_nonfinite(nonfinite)

    def init(params: Any) -> ClipState:
        members = group_leaves(groups, params)
        return ClipState(rule.init(members, params), fresh_metrics(params, members))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        members = group_leaves(groups, updates)
        check_same_groups(state, members)
        norms = group_norms(updates, members, p, axis_name)
        norm = reported(norms)
        limit, learned = rule.update(
            norm,
            state.threshold,
            groups=members,
            updates=updates,
            params=params,
            **extra_args,
        )
        return respond(updates, state, members, norms, limit, learned, shape, nonfinite)

    return optax.GradientTransformationExtraArgs(init, update)


@helpful
def tree_clip(
    tree: Any,
    max_norm: Any,
    *,
    groups: Any = "global",
    response: responses.Response | None = None,
    ord: float | None = None,
    axis_name: Any = None,
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
    if callable(max_norm) or isinstance(max_norm, Threshold):
        raise TypeError(
            "max_norm must be a number, an array [G] or a dict by group name, got "
            f"{max_norm!r}, which needs state; use clipfx.clip_by_norm in a chain."
        )
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
def global_norm(
    tree: Any, *, ord: float | None = None, axis_name: Any = None
) -> jax.Array:
    r"""Measures a tree as one long vector, :math:`(\sum_i |x_i|^p)^{1/p}`.

    Args:
      tree: Leaves `[...]`; integers and other uncounted leaves are left out.
      ord: See `clip_by_norm`. Static.
      axis_name: See `clip_by_norm`. Static.

    Returns:
      A scalar, float32, or float64 if a leaf is. At most the largest finite number
      unless an element is infinite or NaN; 0 for a tree without counted leaves.

    Raises:
      TypeError: If `ord` is not a static number.
      ValueError: If `ord` is below 1.

    Example:
      >>> global_norm({"w": jnp.full(4096, 1.0, jnp.bfloat16)})
      Array(64., dtype=float32)

    Reference: none.
    """
    norms = group_norms(tree, group_leaves("global", tree), check_ord(ord), axis_name)
    return reported(norms, norms.value.dtype)[0]


def reported(norms: Norms, dtype: Any = jnp.float32) -> jax.Array:
    """The norms as plain numbers, at most the largest of `dtype`."""
    largest = jnp.asarray(jnp.finfo(dtype).max, norms.value.dtype)
    # Capped before the division, which then does not overflow.
    capped = jnp.minimum(norms.value, largest * jnp.minimum(norms.scale, 1))
    value = jnp.where(jnp.isfinite(norms.value), capped, norms.value)
    return (value / norms.scale).astype(dtype)


def respond(
    updates: Any,
    state: ClipState,
    members: Groups,
    norms: Norms,
    limit: Any,
    learned: Any,
    response: responses.Response,
    nonfinite: str,
) -> tuple[Any, ClipState]:
    """The second half of a step: scales the updates, counts, learns."""
    norm = reported(norms)
    limit = jnp.maximum(jnp.asarray(limit).astype(norms.value.dtype), 0)
    limit = jnp.broadcast_to(limit, norm.shape)
    before, factor = factors(norms, limit, response, nonfinite)
    drop = ~jnp.isfinite(norms.value) if nonfinite == "zero" else None
    clipped = scale_groups(updates, members, before, factor, drop=drop)
    both = jnp.minimum(factor, LARGEST * jnp.minimum(1, 1 / before)) * before
    return clipped, next_state(state, learned, norm, limit, both)


def factors(
    norms: Norms, limit: jax.Array, response: responses.Response, nonfinite: str
) -> tuple[jax.Array, jax.Array]:
    """Two factors `[G]` to apply in turn: their product may be no normal number."""
    dtype = norms.value.dtype
    info = jnp.finfo(dtype)
    norm, limit = reported(norms, dtype), limit.astype(dtype)
    target = response(norm, limit)
    beyond = norm >= info.max  # the true norm may be larger
    same = (jnp.abs(target - norm) <= SLACK * norm) & ~beyond
    same |= (target == norm) & (limit == jnp.inf)
    same |= limit == LARGEST  # no threshold, in a finite number
    # A quotient beyond these powers of two may be no normal number: divide twice.
    up = far(dtype)
    near = (target >= norm / up) & (target / up <= norm) & ~beyond
    once = same | near | ((target == 0) & ~beyond)
    # Quotients come last: XLA computes a division once, and anything cheaper again in
    # the loop over every leaf, which takes it twice as long to compile.
    divisor = jnp.where(once, 1, jnp.where(target <= norm, up, 1 / up))
    measured = norms.value * (1 / divisor / norms.scale)
    finite = jnp.isfinite(norms.value)
    instead = 0.0 if nonfinite == "zero" else jnp.nan
    target = jnp.where(finite, jnp.where(same, 1, target), instead)
    measured = jnp.where(same | ~finite | (norms.value == 0), 1, measured)
    return 1 / divisor, divide(target, measured)


def exceeds(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Whether a norm is above its threshold by more than rounding."""
    return norm * (1 - SLACK) > limit


def check_nonfinite(nonfinite: Any) -> None:
    """Checks the policy for norms that are not finite."""
    if nonfinite not in ("propagate", "zero"):
        raise ValueError(
            f'nonfinite must be "propagate" or "zero", got {nonfinite!r}; to skip the '
            "whole step wrap the optimizer in optax.apply_if_finite."
        )


def fresh_metrics(params: Any, members: Groups) -> ClipMetrics:
    """Metrics before the first step, each an array of its own: states are donated."""
    shape = (len(members.names),)
    return ClipMetrics(
        norm=jnp.zeros(shape, jnp.float32),
        threshold=jnp.full(shape, LARGEST, jnp.float32),
        factor=jnp.ones(shape, jnp.float32),
        steps=jnp.zeros(shape, jnp.int32),
        clipped=jnp.zeros(shape, jnp.int32),
        nonfinite=jnp.zeros(shape, jnp.int32),
        groups=structure_of(params, members.names),
    )


def next_state(
    state: ClipState, learned: Any, norm: Any, limit: Any, factor: Any
) -> ClipState:
    """Counts the step; keeps what was learned, if every norm `[G]` is finite."""
    finite, seen = jnp.isfinite(norm), state.metrics
    limit = jnp.fmin(limit, LARGEST).astype(jnp.float32)
    usable = finite & ~jnp.isnan(factor)
    metrics = ClipMetrics(
        norm=jnp.where(finite, norm, LARGEST),
        threshold=limit,
        factor=jnp.minimum(jnp.where(usable, factor, 0), LARGEST).astype(jnp.float32),
        steps=seen.steps + 1,
        clipped=seen.clipped + (finite & exceeds(norm, limit)).astype(jnp.int32),
        nonfinite=seen.nonfinite + (~finite).astype(jnp.int32),
        groups=seen.groups,
    )
    keep = lambda new, old: jnp.where(finite.all(), new, old)
    return ClipState(jax.tree.map(keep, learned, state.threshold), metrics)


def check_same_groups(state: ClipState, members: Groups) -> None:
    if not isinstance(state, ClipState):
        raise TypeError(
            f"the state of a clip by norm must be a ClipState, got {type(state)}; pass "
            "what init or the last update returned, or use clipfx.tree_clip, which "
            "needs none."
        )
    before = ordered(state.metrics.groups)
    if before != members.names:
        raise ValueError(
            f"groups changed between init and update: init saw {before}, update saw "
            f"{members.names}; pass the same tree to both."
        )
