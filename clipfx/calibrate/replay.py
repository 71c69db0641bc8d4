"""What a clip would have done on norms that were recorded."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import metrics
from clipfx._core.checks import check_transform, helpful


class Replay(NamedTuple):
    """What a clip did, step by step; G is 1 where it has one norm for all groups.

    Attributes:
      clipped: bool `[T, G]`, where the norm was above the threshold; of `skip_spikes`
        where the step was skipped.
      factor: float32 `[T, G]`, what the norm was multiplied by.
      threshold: float32 `[T, G]`.

    Reference: none.
    """

    clipped: np.ndarray
    factor: np.ndarray
    threshold: np.ndarray


@helpful
def replay(
    transform: optax.GradientTransformation, norms: np.ndarray | Mapping[str, Any]
) -> Replay:
    """Runs a clip over recorded norms.

    The transform itself runs, on gradients of one element for each group, whose norms
    are those recorded. It answers for the first step of a change only: a clipped run
    has other parameters, and other norms, from then on.

    Args:
      transform: A clip by norm of this library, of which one group is a leaf or the
        whole. Such as `clipfx.zclip(2.0)`, `clipfx.adagc(1.5)`.
      norms: As of `suggest`: `[T]`, `[T, G]`, or a dict from groups to `[T]`.

    Returns:
      `Replay`, of NumPy's arrays.

    Raises:
      TypeError: If `transform` is no transform, or has no `clipfx.ClipState`.
      ValueError: If `norms` are of another shape, negative, or none.

    Example:
      >>> done = replay(clipfx.clip_by_global_norm(2.0), np.array([1.0, 4.0]))
      >>> done.clipped[:, 0].tolist(), done.factor[:, 0].tolist()
      ([False, True], [1.0, 0.5])

    Reference: none.
    """
    check_transform("transform", transform)
    rows = np.stack([*as_groups(norms).values()], axis=1)
    if not metrics.states_of(jax.eval_shape(transform.init, leaves_of(rows[0]))):
        raise TypeError(
            "transform must have a clipfx.ClipState, got one without; pass a clip of "
            "clipfx, such as clipfx.clip_by_global_norm(1.0)."
        )
    done = jax.jit(lambda rows: replay_all({"": transform}, rows))(rows)[""]
    return jax.tree.map(np.asarray, done)


def as_groups(norms: Any) -> dict[str, np.ndarray]:
    """Norms as float32 `[T]` by group, in the order of `G`.

    Raises:
      TypeError: If they are no numbers.
      ValueError: If they are of another shape, negative, or none.
    """
    if isinstance(norms, Mapping):
        columns = {str(name): _numbers(column) for name, column in norms.items()}
    else:
        table = _numbers(norms)
        if table.ndim not in (1, 2):
            raise ValueError(
                f"norms must be [T], [T, G] or a dict by group, got {table.shape}; T "
                "is the number of steps."
            )
        names = ["global"] if table.ndim == 1 else [*map(str, range(table.shape[1]))]
        pairs = zip(names, table.reshape(len(table), -1).T, strict=True)
        columns = dict(pairs)
    shapes = {column.shape for column in columns.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or shapes == {(0,)}:
        raise ValueError(
            f"norms must hold one number for each step and group, got {sorted(shapes)};"
            " pass the norms of one run, groups over the same steps."
        )
    for name, column in columns.items():
        if (column < 0).any():
            raise ValueError(
                f"norms must be >= 0, got {column.min():.3g} in {name!r}; logarithms "
                "and losses are no norms."
            )
    return columns


def _numbers(norms: Any) -> np.ndarray:
    try:
        table = np.asarray(norms, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"norms must be an array of numbers, got {type(norms).__name__}; pass "
            "[T], [T, G] or a dict by group."
        ) from None
    with np.errstate(over="ignore"):
        table = table.astype(np.float32)
    # In metrics the largest number stands for a norm that was not finite.
    return np.where(table >= np.finfo(np.float32).max, np.float32(np.inf), table)


def leaves_of(row: Any) -> dict[str, jax.Array]:
    """Gradients of one element, in the order of the row `[G]`."""
    return {f"group{at}": jnp.asarray(x)[None] for at, x in enumerate(row)}


def replay_all(
    transforms: Mapping[str, optax.GradientTransformation], rows: Any
) -> dict[str, Replay]:
    """Of many at once, in one scan over rows `[T, G]`."""

    def step(states: Any, row: jax.Array) -> tuple[Any, dict[str, Replay]]:
        after, done = {}, {}
        for name, tx in transforms.items():
            before = metrics.states_of(states[name])[0][1].metrics
            # As params too: they have the shape of the leaves, and nothing reads them.
            _, after[name] = tx.update(leaves_of(row), states[name], leaves_of(row))
            seen = metrics.states_of(after[name])[0][1].metrics
            clipped = seen.clipped > before.clipped
            factor, limit = seen.factor, seen.threshold
            if tuple(seen.groups) == ("global", "loss"):  # of `skip_spikes`
                factor, limit = factor[:1], limit[:1]
                clipped = factor == 0
            done[name] = Replay(clipped, factor, limit)
        return after, done

    first = leaves_of(jnp.asarray(rows)[0])
    states = {name: tx.init(first) for name, tx in transforms.items()}
    return jax.lax.scan(step, states, jnp.asarray(rows))[1]
