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
magnitudes, meshes, metrics, bad steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core.clip_factors import check_nonfinite, factors, finite_norms
from clipfx._core.groups import Groups, group_leaves
from clipfx._core.leaves import scale_groups
from clipfx._core.norms import Norms, group_norms
from clipfx._core.running_stats import LARGEST
from clipfx._core.state import ClipState, check_same_groups, fresh_metrics, next_state


class Step(NamedTuple):
    """What is known when updates are changed.

    Attributes:
      groups: Which leaf belongs to which group.
      norm: `[G]`, as measured, at most the largest float32.
      threshold: `[G]`, >= 0.
      factors: Two `[G]`, to apply in turn: their product may be no normal number. NaN,
        or 0 for `nonfinite="zero"`, where the norm is not finite.
      drop: bool `[G]`, which groups become zero whatever they hold; None for none.
      facts: What `measure` found besides norms.
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


def scale(updates: Any, step: Step) -> tuple[Any, jax.Array]:
    """Scales each group as a whole: the usual `apply`."""
    clipped = scale_groups(updates, step.groups, *step.factors, drop=step.drop)
    return clipped, step.factor()


def by_norm(
    rule: Any,
    response: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    groups: Any = "global",
    ord: float = 2.0,
    axis_name: Any = None,
    nonfinite: str = "propagate",
    measure: Callable | None = None,
    apply: Callable = scale,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method that measures norms and changes updates by them.

    Args:
      rule: A `clipfx.thresholds.Threshold`. Its `update` sees the norms `[G]`, its
        state, and by name `groups`, `updates`, `params`, the facts of `measure` and the
        extra arguments of the step.
      response: From norms and thresholds `[G]` to new norms `[G]`.
      groups: As of `clipfx.clip_by_norm`, or `Groups`.
      ord: p of the usual norm.
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

    def usual(updates: Any, members: Groups, params: Any, state: Any) -> tuple:
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
        norms: Norms
        norms, facts = (measure or usual)(updates, members, params, state.rule_state)
        norm = finite_norms(norms)
        limit, learned = rule.update(
            norm,
            state.rule_state,
            groups=members,
            updates=updates,
            params=params,
            **facts,
            **extra_args,
        )
        limit = jnp.maximum(jnp.asarray(limit).astype(norms.value.dtype), 0)
        limit = jnp.broadcast_to(limit, norm.shape)
        both = factors(norms, limit, response, nonfinite)
        drop = ~jnp.isfinite(norms.value) if nonfinite == "zero" else None
        step = Step(members, norm, limit, both, drop, facts)
        changed, factor = apply(updates, step)
        return changed, next_state(state, learned, norm, limit, factor)

    return optax.GradientTransformationExtraArgs(init, update)


def respond(
    updates: Any,
    state: ClipState,
    members: Groups,
    norms: Norms,
    limit: Any,
    learned: Any,
    response: Any,
    nonfinite: str,
) -> tuple[Any, ClipState]:
    """The second half of a step: scales the updates, counts, learns."""
    norm = finite_norms(norms)
    limit = jnp.maximum(jnp.asarray(limit).astype(norms.value.dtype), 0)
    limit = jnp.broadcast_to(limit, norm.shape)
    before, factor = factors(norms, limit, response, nonfinite)
    drop = ~jnp.isfinite(norms.value) if nonfinite == "zero" else None
    clipped = scale_groups(updates, members, before, factor, drop=drop)
    both = jnp.minimum(factor, LARGEST * jnp.minimum(1, 1 / before)) * before
    return clipped, next_state(state, learned, norm, limit, both)
