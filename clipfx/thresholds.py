"""What is too large: rules from norms to thresholds, the only part with statistics.

A rule is a `Threshold`, a pair of functions shaped like a gradient transformation:

>>> import clipfx, jax.numpy as jnp
>>> def largest_so_far(factor):
...     '''Clips to `factor` times the largest norm seen before, [G].'''
...     def init(groups, params):
...         return jnp.full(len(groups.names), jnp.inf)
...     def update(norm, state, **_):
...         seen = jnp.where(jnp.isinf(state), norm, jnp.maximum(state, norm))
...         return factor * state, seen
...     return clipfx.thresholds.Threshold(init, update)
>>> tx = clipfx.clip_by_norm(largest_so_far(2.0), groups="layer")

It reads the past, answers, then learns the present. `clipfx.clip_by_norm` throws away
what it learned on a step where any norm is not finite, so no rule has to guard itself.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx._core.checks import helpful, is_known, is_number
from clipfx._core.groups import Groups
from clipfx._core.leaves import widest

__all__ = ["Threshold", "as_threshold", "constant", "schedule"]


class Threshold(NamedTuple):
    """A rule from norms to thresholds.

    Attributes:
      init: `init(groups, params) -> state`. `groups.names` has one name per group;
        `params` may be `ShapeDtypeStruct`. The state is any tree of arrays whose
        structure, shapes and dtypes never change.
      update: `update(norm, state, *, groups, updates, params, **extra) -> (threshold,
        state)` with `norm` float32 `[G]`, capped at the largest float32 and not finite
        where a gradient is not, and a threshold `[G]` or scalar, infinity or the
        largest float32 for none. `extra` are the keyword arguments of the optimizer's
        `update`; ignore what is not needed.

    Reference: none; the shape is that of `optax.GradientTransformationExtraArgs`.
    """

    init: Callable[[Groups, Any], Any]
    update: Callable[..., tuple[Any, Any]]


@helpful
def constant(limit: Any) -> Threshold:
    """Makes a rule that always answers the same.

    Args:
      limit: A number >= 0 (infinity clips nothing), an array `[G]` in the order of the
        names, 2 before 10, or a dict by group name; traced arrays too. In float64 it
        stays so for trees of that dtype.

    Returns:
      A rule without state.

    Raises:
      TypeError: If `limit` is of another kind.
      ValueError: If a concrete entry is negative or NaN, or, once the groups are
        known, if it does not fit them.

    Example:
      >>> rule = constant({"encoder": 1.0, "decoder": 0.5})

    Reference: none.
    """
    check_values(limit)

    def init(groups: Groups, params: Any) -> tuple[()]:
        if groups.names:
            _fit(limit, groups)
        return ()

    def update(norm, state, *, groups, **_):
        return _fit(limit, groups), state

    return Threshold(init, update)


@helpful
def schedule(fn: optax.Schedule) -> Threshold:
    """Makes a rule from an Optax schedule.

    Args:
      fn: From a step count, int32 scalar starting at 0, to what `constant` takes.

    Returns:
      A rule whose state is the count. Like all state it stands still on a step whose
      norm is not finite.

    Example:
      >>> import optax
      >>> rule = schedule(optax.linear_schedule(10.0, 1.0, transition_steps=1000))

    Reference: none.
    """

    def init(groups: Groups, params: Any) -> jax.Array:
        return jnp.zeros([], jnp.int32)

    def update(norm, count, *, groups, **_):
        return _fit(fn(count), groups), optax.safe_increment(count)

    return Threshold(init, update)


@helpful
def as_threshold(threshold: Any) -> Threshold:
    """Makes a rule from whatever a user may pass as a threshold.

    Args:
      threshold: A `Threshold`, an Optax schedule, what `constant` takes, or a clip by
        norm of this library, such as `clipfx.quantile_clip(0.9)`, of which the rule is
        taken, and not its groups and response.

    Returns:
      A rule.

    Raises:
      TypeError: If it is none of these.
      ValueError: See `constant`.

    Example:
      >>> isinstance(as_threshold(1.0), Threshold)
      True

    Reference: none.
    """
    if isinstance(threshold, Threshold):
        return threshold
    if isinstance(threshold, optax.GradientTransformation):
        rule = getattr(threshold.update, "rule", None)
        if rule is None:
            raise TypeError(
                "a threshold must be a rule, such as that of a clip by norm of clipfx, "
                f"got the transform {threshold!r}; pass a number, or chain the two."
            )
        return rule
    return schedule(threshold) if callable(threshold) else constant(threshold)


def check_values(limit: Any) -> None:
    """Checks the kind, and the sign where the values are known."""
    for x in limit.values() if isinstance(limit, Mapping) else [limit]:
        if not is_number(x):
            raise TypeError(
                "a threshold must be a number, an array [G], a dict by group name, an "
                f"Optax schedule or a clipfx.thresholds.Threshold, got {x!r}; to clip "
                "nothing pass math.inf."
            )
        if is_known(x) and not np.all(np.asarray(x, np.float64) >= 0):
            raise ValueError(
                f"a threshold must be >= 0, got {x!r}; to clip nothing pass math.inf."
            )


def _fit(limit: Any, groups: Groups) -> jax.Array:
    """The threshold as float32, or float64 if it comes so, scalar or `[G]`."""
    names = groups.names
    if isinstance(limit, Mapping) and names:
        check_names("a dict of thresholds", limit, names)
        limits = [_wide(limit[name]) for name in names]
        dtype = widest(x.dtype for x in limits)
        return jnp.stack([x.astype(dtype) for x in limits])
    limit = _wide(0.0 if isinstance(limit, Mapping) else limit)
    if limit.shape not in ((), (len(names),)):
        raise ValueError(
            f"a threshold must be a scalar or have shape ({len(names)},), one entry "
            f"for each of the groups {names}, got shape {limit.shape}; pass a dict by "
            "group name to be sure of the order."
        )
    return limit


def check_names(what: str, limits: Mapping, names: Sequence[str]) -> None:
    """Checks that a dict names every group, and nothing else."""
    missing = [name for name in names if name not in limits]
    if missing:
        raise ValueError(
            f"{what} must name every group, got {sorted(limits, key=str)} without "
            f"{missing}; add them, with math.inf for no clipping."
        )
    for name in limits:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {names}."
            raise ValueError(f"{what} must name groups that there are, got {name!r}; "
                             f"{advice}")  # fmt: skip


def _wide(limit: Any) -> jax.Array:
    limit = jnp.asarray(limit)
    return limit.astype(jnp.float64 if limit.dtype.itemsize == 8 else jnp.float32)
