"""What every clip by norm keeps: its rule's state, and metrics for people."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.clip_factors import exceeds
from clipfx._core.export import exportable
from clipfx._core.groups import Groups
from clipfx._core.paths import ordered, structure_of
from clipfx._core.running_stats import LARGEST


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
      >>> _, metrics = clipfx.tree_clip({"w": jnp.array([3.0, 4.0])}, 1.0)
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
      rule_state: What the threshold's rule needs for the next step.
      metrics: `ClipMetrics`, `[G]` each; read them with `clipfx.metrics.read`.

    Reference: none.
    """

    rule_state: Any
    metrics: ClipMetrics


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


def no_state(params: Any) -> tuple[()]:
    """Not Optax's, which `jax.export` cannot write."""
    return ()
