"""Thresholds by group, by example, by both."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.checks import is_known
from clipfx._core.groups import EACH, Groups


def check_limit(max_norm: Any) -> None:
    """Checks the kind of thresholds, and the sign where values are known."""
    if callable(max_norm):
        try:
            inspect.signature(max_norm).bind(None, None)
        except TypeError:
            raise TypeError(
                "max_norm must be a function of two arguments, norms [B, G] and a mask "
                f"[B], if it is one, got {max_norm!r}; a schedule is evaluated by you, "
                "and passed at each call."
            ) from None
        return
    for x in max_norm.values() if isinstance(max_norm, Mapping) else [max_norm]:
        array = isinstance(x, jax.Array | np.ndarray | np.generic)
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if not number and not (array and jnp.issubdtype(x.dtype, jnp.number)):
            raise TypeError(
                "max_norm must be a number, an array, a dict by group name or a "
                f"function of norms, got {x!r}; what changes is passed at each call."
            )
        if is_known(x) and not np.all(np.asarray(x, np.float64) >= 0):
            raise ValueError(
                f"max_norm must be >= 0, got {x!r}; to clip nothing pass math.inf."
            )


def _each_slice(max_norm: Mapping, names: Sequence[str]) -> dict:
    """With an entry for each of `blocks/0`, `blocks/1`... in place of `blocks/*`."""
    found = dict(max_norm)
    for key in [key for key in max_norm if str(key).endswith(EACH)]:
        start = str(key).removesuffix("*")
        own = [x for x in names if x.startswith(start) and x[len(start) :].isdecimal()]
        if own:
            limit = found.pop(key)
            found = dict.fromkeys(own, limit) | found
    return found


def limits(max_norm: Any, members: Groups, size: int) -> jax.Array:
    """Thresholds as `[B, G]`, or with 1 for B."""
    check_limit(max_norm)
    names = members.names
    if isinstance(max_norm, Mapping):
        max_norm = _each_slice(max_norm, names)
        missing = [name for name in names if name not in max_norm]
        if missing:
            raise ValueError(
                f"max_norm must name every group, got {sorted(max_norm)} without "
                f"{missing}; add them, with math.inf for no clipping."
            )
        unknown = [name for name in max_norm if name not in names]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), names, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {names}."
            raise ValueError(
                f"max_norm must name groups that there are, got {unknown}; {advice}"
            )
        max_norm = jnp.stack([jnp.asarray(max_norm[name]) for name in names])
        max_norm = max_norm[None]
    limit = jnp.maximum(jnp.asarray(max_norm), 0)
    if not jnp.issubdtype(limit.dtype, jnp.floating):
        limit = limit.astype(jnp.float32)
    count, shape = len(names), limit.shape
    if shape == (count,):
        limit = limit[None]
    elif shape and not (
        len(shape) == 2 and shape[0] in (1, size) and shape[1] in (1, count)
    ):
        by_example = shape == (size,)
        raise ValueError(
            f"max_norm must be a number or have shape ({count},), one entry for each "
            f"group of {names}, or ({size}, 1) or ({size}, {count}) for each of {size} "
            f"examples, got {shape}; "
            + (
                "pass max_norm[:, None]."
                if by_example
                else "pass a dict by group name."
            )
        )
    rows = limit.shape[0] if limit.ndim else 1
    return jnp.broadcast_to(limit, (rows, count))
