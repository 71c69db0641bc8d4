"""What every clip keeps: its rule's state, and metrics for people."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.clip_factors import SLACK, exceeds
from clipfx._core.export import exportable
from clipfx._core.groups import Groups
from clipfx._core.paths import ordered, structure_of
from clipfx._core.running_stats import LARGEST
from clipfx._core.safe_sums import reciprocal_power_of_two


@exportable("clipfx.ClipMetrics")
class ClipMetrics(NamedTuple):
    """What a person may want to see; nothing reads it but people. Always finite.

    Attributes:
      norm: float32 `[G]`, of the last step before clipping, at most the largest
        float32, as where it is not finite. What it became is `norm * factor`.
      total: float32, the norm of all groups together, like `norm`.
      threshold: float32 `[G]`, of the last step; the largest float32 for none, as
        before the first step.
      factor: float32 `[G]`, what the norm of the last step was multiplied by, 0 where
        it was not finite.
      share: float32 `[G]`, of the last step: how much of what was measured exceeded
        its bound: 1 or 0 of a norm, else the share of elements, units or examples.
      steps: int32 `[G]`, steps seen, all groups alike.
      clipped: int32 `[G]`, steps whose norm was finite and, by more than rounding,
        above its threshold.
      lifted: int32 `[G]`, steps whose norm became longer, by more than rounding, as
        `normalize` and `band` do.
      nonfinite: int32 `[G]`, steps whose norm was infinite or NaN.
      groups: The names of the groups, the keys of a dict whose values are empty: names
        are part of the structure, not of the data. `[G]` is in alphabetical order, with
        numbers as numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> _, metrics = clipfx.tree_clip({"w": jnp.array([3.0, 4.0])}, 1.0)
      >>> tuple(metrics.groups), metrics.norm, metrics.factor
      (('global',), Array([5.], dtype=float32), Array([0.2], dtype=float32))

    Reference: none.
    """

    norm: jax.Array
    total: jax.Array
    threshold: jax.Array
    factor: jax.Array
    share: jax.Array
    steps: jax.Array
    clipped: jax.Array
    lifted: jax.Array
    nonfinite: jax.Array
    groups: dict[str, tuple[()]]


@exportable("clipfx.ClipState")
class ClipState(NamedTuple):
    """State of every clip: fixed structure, shapes and dtypes from `init` on.

    Attributes:
      rule_state: What the threshold's rule needs for the next step.
      metrics: `ClipMetrics`, `[G]` each; read them with `clipfx.metrics.read`.

    Reference: none.
    """

    rule_state: Any
    metrics: ClipMetrics


@exportable("clipfx.ClipAroundState")
class ClipAroundState(NamedTuple):
    """State of a clip around a transform.

    Attributes:
      clip: `ClipState`.
      inner: State of the transform inside.

    Reference: none.
    """

    clip: ClipState
    inner: Any


def fresh_metrics(params: Any, members: Groups) -> ClipMetrics:
    """Metrics before the first step, each an array of its own: states are donated."""
    shape = (len(members.names),)
    zeros: Callable[[Any], jax.Array] = lambda dtype: jnp.zeros(shape, dtype)
    return ClipMetrics(
        norm=zeros(jnp.float32),
        total=jnp.zeros([], jnp.float32),
        threshold=jnp.full(shape, LARGEST, jnp.float32),
        factor=jnp.ones(shape, jnp.float32),
        share=zeros(jnp.float32),
        steps=zeros(jnp.int32),
        clipped=zeros(jnp.int32),
        lifted=zeros(jnp.int32),
        nonfinite=zeros(jnp.int32),
        groups=structure_of(params, members.names),
    )


def joint_norm(norm: jax.Array, ord: float = 2.0) -> jax.Array:
    """The p-norm `[...]` of all groups from the norms `[..., G]` of each, float32."""
    norm = jax.lax.stop_gradient(norm)
    top = jnp.max(norm, -1, initial=0)
    if ord == math.inf:
        return top
    usable = jnp.isfinite(top)
    scale = reciprocal_power_of_two(jnp.where(usable, top, 1))
    near = jnp.where(usable[..., None], norm, 0) * scale[..., None]
    total = jnp.sum(near**ord, -1) ** (1 / ord) / scale  # powers stay in range
    return jnp.where(usable, jnp.minimum(total, LARGEST), top)


def next_state(
    state: ClipState,
    learned: Any,
    norm: jax.Array,
    limit: jax.Array,
    factor: jax.Array,
    total: jax.Array,
    share: jax.Array | None = None,
) -> ClipState:
    """Counts the step; keeps what was learned, if every norm `[G]` is finite.

    Args:
      state: Of the last step.
      learned: By the rule.
      norm: float32 `[G]`.
      limit: `[G]`, the thresholds.
      factor: `[G]`.
      total: The norm of all groups together.
      share: float32 `[G]`, None for all or nothing.
    """
    finite, seen = jnp.isfinite(norm), state.metrics
    limit = jnp.fmin(limit, LARGEST).astype(jnp.float32)
    factor = jnp.where(finite & ~jnp.isnan(factor), factor, 0)
    total = total.astype(jnp.float32)
    above = finite & exceeds(norm, limit)

    def count(old: jax.Array, now: jax.Array) -> jax.Array:
        return old + now.astype(jnp.int32)

    metrics = ClipMetrics(
        norm=jnp.where(finite, norm, LARGEST),
        total=jnp.where(jnp.isfinite(total), total, LARGEST),
        threshold=limit,
        factor=jnp.minimum(factor, LARGEST).astype(jnp.float32),
        share=above.astype(jnp.float32) if share is None else share,
        steps=seen.steps + 1,
        clipped=count(seen.clipped, above),
        lifted=count(seen.lifted, factor > 1 + SLACK),
        nonfinite=count(seen.nonfinite, ~finite),
        groups=seen.groups,
    )

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite.all(), new, old)

    return ClipState(jax.tree.map(keep, learned, state.rule_state), metrics)


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
