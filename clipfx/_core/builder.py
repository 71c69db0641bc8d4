"""The builder under all methods by norm: measure, ask, respond, apply, count.

One step, in order:

1. `members(updates)` says which leaves share a norm.
2. `measure` gives the norms `[G]`, with one reduction over leaves and mesh axes, and
   whatever else the rule wants to know.
3. The rule, a `Threshold`, gives the thresholds `[G]` and what it learned.
4. The response says what each norm becomes; `clip_factors` makes that two factors.
5. `apply` changes the updates by them, in float32 or wider; half precision is rounded
   towards zero.
6. `next_state` counts the step, and forgets what was learned where a norm is not
   finite.

A method that is groups, a threshold and a response calls `clipfx.clip_by_norm`. One
that measures something else, or does something else to the updates, calls `by_norm`
with a `measure` or an `apply` of its own; everything else stays as it is: dtypes,
magnitudes, meshes, metrics, bad steps. What bounds single elements, or units of a
leaf, calls `by_part`, for the metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from clipfx._core.clip_factors import check_nonfinite, factors, finite_norms
from clipfx._core.groups import Groups, group_leaves
from clipfx._core.leaves import scale_groups
from clipfx._core.norms import Norms, group_norms
from clipfx._core.part_sizes import peak_and_share
from clipfx._core.running_stats import LARGEST
from clipfx._core.state import (
    ClipState,
    check_same_groups,
    fresh_metrics,
    joint_norm,
    next_state,
)
from clipfx._types import AxisName, GroupSpec, Response, Tree

# From updates, groups, params and the rule's state to norms `[G]` and facts.
Measure: TypeAlias = Callable[[Tree, Groups, Tree, Any], tuple[Norms, dict[str, Any]]]


class Step(NamedTuple):
    """What is known when updates are changed.

    Attributes:
      groups: Which leaf belongs to which group.
      norm: `[G]`, as measured, at most the largest float32.
      threshold: `[G]`, >= 0.
      factors: Two `[G]`, to apply in turn: their product may be no normal number. NaN,
        or 0 for `nonfinite="zero"`, where the norm is not finite.
      drop: bool `[G]`, which groups become zero whatever they hold; None for none.
      facts: What `measure` found besides norms; `total`, the norm of all groups, goes
        into the metrics.
    """

    groups: Groups
    norm: jax.Array
    threshold: jax.Array
    factors: tuple[jax.Array, jax.Array]
    drop: jax.Array | None
    facts: dict[str, Any]

    def factor(self) -> jax.Array:
        """The two in one, `[G]`, at most the largest float32."""
        before, factor = self.factors
        return jnp.minimum(factor, LARGEST * jnp.minimum(1, 1 / before)) * before


def scale(updates: Tree, step: Step) -> tuple[Any, jax.Array]:
    """Scales each group as a whole: the usual `apply`."""
    clipped = scale_groups(updates, step.groups, *step.factors, drop=step.drop)
    return clipped, step.factor()


def by_norm(
    rule: Any,
    response: Response,
    *,
    groups: GroupSpec = "global",
    ord: float = 2.0,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
    measure: Measure | None = None,
    apply: Callable[[Tree, Step], tuple[Tree, jax.Array]] = scale,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method that measures norms and changes updates by them.

    Args:
      rule: A `clipfx.thresholds.Threshold`. Its `update` sees the norms `[G]`, its
        state, and by name `groups`, `updates`, `params`, the facts of `measure` and the
        extra arguments of the step.
      response: From norms and thresholds `[G]` to new norms `[G]`.
      groups: As of `clipfx.clip_by_norm`, or `Groups`.
      ord: p of the norm.
      axis_name: Of the usual norm.
      nonfinite: What becomes of a group whose norm is not finite.
      measure: `measure(updates, groups, params, rule_state) -> Norms [G], facts`; None
        for the p-norm of each group.
      apply: `apply(updates, step) -> updates, factor [G]` for the metrics.

    Returns:
      A transform with `ClipState`.
    """
    check_nonfinite(nonfinite)

    def members_of(tree: Any) -> Groups:
        return groups if isinstance(groups, Groups) else group_leaves(groups, tree)

    def usual(
        updates: Tree, members: Groups, params: Tree, state: Any
    ) -> tuple[Norms, dict[str, Any]]:
        del params, state
        return group_norms(updates, members, ord, axis_name), {}

    def init(params: Any) -> ClipState:
        members = members_of(params)
        return ClipState(rule.init(members, params), fresh_metrics(params, members))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        members = members_of(updates)
        check_same_groups(state, members)
        norms, facts = (measure or usual)(updates, members, params, state.rule_state)
        norm = finite_norms(norms)
        # An extra argument of another transform's may have any name: ours come last.
        ours = {"groups": members, "updates": updates, "params": params, **facts}
        limit, learned = rule.update(norm, state.rule_state, **{**extra_args, **ours})
        limit = jnp.maximum(jnp.asarray(limit).astype(norms.value.dtype), 0)
        limit = jnp.broadcast_to(limit, norm.shape)
        both = factors(norms, limit, response, nonfinite)
        drop = ~jnp.isfinite(norms.value) if nonfinite == "zero" else None
        step = Step(members, norm, limit, both, drop, facts)
        changed, factor = apply(updates, step)
        total = facts["total"] if "total" in facts else joint_norm(norm, ord)
        return changed, next_state(state, learned, norm, limit, factor, total)

    if measure is None:
        known: Any = update
        known.rule = rule  # for whom `clipfx.thresholds.as_threshold` is asked
    return optax.GradientTransformationExtraArgs(init, update)


class Parts(NamedTuple):
    """What a method by elements or units did in a step.

    Attributes:
      updates: As they became.
      learned: The state of its rule.
      sizes: One array >= 0 for each counted leaf: of elements or units.
      limit: Scalar: the bound of all of them; None if there is none.
      became: From the largest size to what it became.
    """

    updates: Any
    learned: Any
    sizes: list[jax.Array]
    limit: Any
    became: Callable[[jax.Array], jax.Array]


def by_part(
    change: Callable[[Tree, Groups, Any, Tree], Parts],
    *,
    init: Callable[[Tree], Any] = lambda params: (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method that bounds elements or units of leaves, each by itself.

    Its metrics are of one group, `global`: the norm is the largest size, the share that
    of the sizes above the bound. They take one pass, and two reductions of one number.

    Args:
      change: `change(updates, groups, rule_state, params) -> Parts`.
      init: From params to the state of the rule.
      axis_name: Mesh axes that parts are split over.

    Returns:
      A transform with `ClipState`.
    """

    def begin(params: Any) -> ClipState:
        members = group_leaves("global", params)
        return ClipState(init(params), fresh_metrics(params, members))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        members = group_leaves("global", updates)
        check_same_groups(state, members)
        done = change(updates, members, state.rule_state, params)
        sizes = jax.lax.stop_gradient(done.sizes)
        bound = None if done.limit is None else jnp.asarray(done.limit)
        norms, share = peak_and_share(sizes, bound, axis_name)
        peak = finite_norms(norms)
        known = jnp.isfinite(peak) & (peak > 0)
        some = jnp.where(known, peak, 1)
        factor = jnp.where(known, done.became(some) / some, 1)
        limit = jnp.asarray(LARGEST) if bound is None else bound.astype(jnp.float32)
        limit = jnp.broadcast_to(limit, peak.shape)
        state = next_state(state, state.rule_state, peak, limit, factor, peak[0], share)
        return done.updates, state._replace(rule_state=done.learned)

    return optax.GradientTransformationExtraArgs(begin, update)
