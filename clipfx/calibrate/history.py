"""The norms that states remember."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipfx import metrics
from clipfx._core.checks import helpful
from clipfx._core.paths import ordered
from clipfx._core.running_stats import Window


@helpful
def history(opt_state: Any) -> dict[str, np.ndarray]:
    """Reads the norms that an optimizer state remembers, oldest first.

    Of `clipfx.record_norms`, and of `clipfx.autoclip` and `clipfx.skip_spikes`, which
    keep the norms of unclipped gradients too. It looks where `clipfx.metrics.read`
    looks, also into the dict that Orbax restores without a target.

    Args:
      opt_state: The state of an optimizer, or anything that holds one.

    Returns:
      From `clip0/global`, the name of the clip and of the group as in
      `clipfx.metrics.read`, to float32 `[T]`, T at most the size of the ring. A state
      of `clipfx.per_stacked_layer` has `clip0/global/11` for each layer. Empty where
      nothing remembers norms.

    Raises:
      TypeError: If `opt_state` is no state but a transform, a function or a number.

    Example:
      >>> tx = clipfx.record_norms(2)
      >>> state = tx.init({"w": jnp.zeros(1)})
      >>> for norm in (3.0, 4.0, 5.0):
      ...     _, state = tx.update({"w": jnp.array([norm])}, state)
      >>> history(state)["clip0/global"].tolist()
      [4.0, 5.0]

    Reference: none.
    """
    found = {}
    for name, state in metrics.states_of(opt_state):
        window = _window(state)
        if window is None:
            continue
        count, rows = np.asarray(window.count), np.asarray(window.rows)
        for layer in np.ndindex(count.shape):
            seen, size = int(count[layer]), rows.shape[-2]
            # The oldest row is the next to be replaced.
            ring = np.roll(rows[layer], -(seen % size) if seen > size else 0, axis=0)
            names = _groups(state, rows.shape[-1])
            for column, group in enumerate(names):
                if not (group == "loss" and names == ("global", "loss")):
                    key = "/".join(map(str, (name, group, *layer)))
                    found[key] = ring[: min(seen, size), column]
    return found


def _window(state: Any) -> Window | None:
    rule = state["rule_state"] if isinstance(state, Mapping) else state.rule_state
    if isinstance(rule, Mapping) and {*rule} == {*Window._fields}:
        return Window(**rule)
    return rule if isinstance(rule, Window) else None


def _groups(state: Any, number: int) -> tuple[str, ...]:
    """Names of the columns; those of `skip_spikes` are `global` and `loss`."""
    seen = state["metrics"] if isinstance(state, Mapping) else state.metrics._asdict()
    names = ordered(seen.get("groups") or ())
    # Checkpoints may have lost them.
    return names if len(names) == number else tuple(map(str, range(number)))
