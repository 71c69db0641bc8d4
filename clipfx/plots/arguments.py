"""What arguments of pictures may be: arrays, dicts of arrays, numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_NONE = float(np.finfo(np.float32).max)  # and above: no number, no threshold


def as_array(name: str, x: Any, fits: bool = True) -> np.ndarray:
    """Float64, with NaN for what is no number."""
    try:
        array = np.asarray(x, np.float64)
    except (TypeError, ValueError):
        fits, array = False, np.empty(0)
    if not fits:
        what = f"shape {x.shape}" if hasattr(x, "shape") else f"{x!r:.60}"
        raise ValueError(
            f"{name} must be numbers [T] over the steps, got {what}; of several groups "
            "or methods [T, G] or a dict from names to [T]."
        )
    return np.where(np.abs(array) < _NONE, array, np.nan)


def as_curves(
    name: str,
    x: Any,
    like: Mapping[str, np.ndarray] | None = None,
    *,
    share_steps: bool = True,
) -> dict[str, np.ndarray]:
    """Numbers `[T]` by name, with the names and the length of others."""
    if not isinstance(x, Mapping):
        array = np.asarray(x)
        if array.ndim not in (1, 2):
            as_array(name, x, fits=False)
        given = [*like] if like is not None else None
        columns = array.T if array.ndim == 2 else array[None]
        given = given or ([name] if array.ndim == 1 else map(str, range(len(columns))))
        given = [*given]
        if len(given) != len(columns):
            raise ValueError(
                f"{name} must have {len(given)} columns as norm has, got shape "
                f"{array.shape}; a dict from names to [T] may leave some out."
            )
        x = dict(zip(given, columns, strict=True))
    curves = {str(key): as_array(name, y, np.ndim(y) == 1) for key, y in x.items()}
    if like is not None:
        _check(name, curves, like)
    elif share_steps:
        _check(name, curves, dict.fromkeys(curves, next(iter(curves.values()), ())))
    return curves


def _check(
    name: str, curves: Mapping[str, np.ndarray], like: Mapping[str, Any]
) -> None:
    for key, y in curves.items():
        if key not in like:
            raise ValueError(
                f"{name} must have names that norm has, got {key!r}; they are "
                f"{', '.join(map(repr, like))}."
            )
        if len(y) != len(like[key]):
            raise ValueError(
                f"{name} must have one number for each of {len(like[key])} steps, got "
                f"{len(y)} for {key!r}; all curves share their steps."
            )


def as_steps(step: Any, curves: Mapping[str, np.ndarray]) -> np.ndarray:
    """`[T]`, counted from 0 where none are given."""
    count = len(next(iter(curves.values()), ()))
    if step is None:
        return np.arange(count, dtype=float)
    step = as_array("step", step, np.ndim(step) == 1)
    _check("step", {"step": step}, {"step": np.empty(count)})
    return step


def as_limits(
    threshold: Any, curves: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], bool]:
    """Thresholds `[T, K]` by name, and whether they are the same for all."""
    if threshold is None or not curves:
        return {}, False
    several = isinstance(threshold, Mapping) or np.ndim(threshold) == 2
    if several and not isinstance(threshold, Mapping):
        threshold = as_curves("threshold", threshold, curves)
    given = threshold if several else dict.fromkeys(curves, threshold)
    limits = {}
    for name, x in given.items():
        limit = as_array("threshold", x, np.ndim(x) < 3)
        if limit.ndim == 0:
            limit = np.full(len(curves.get(str(name), ())), limit)
        limits[str(name)] = limit if limit.ndim == 2 else limit[:, None]
    _check("threshold", limits, curves)
    return limits, not several and len(curves) > 1


def as_dots(
    clipped: Any, curves: Mapping[str, np.ndarray], limits: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Which steps have a dot."""
    if clipped is None:  # more than by rounding, as `ClipMetrics` count them
        single = {n: x[:, 0] for n, x in limits.items() if x.shape[1] == 1}
        return {name: curves[name] > x * (1 + 1e-6) for name, x in single.items()}
    counts = as_curves("clipped", clipped, curves)
    given = clipped.values() if isinstance(clipped, Mapping) else [clipped]
    if all(np.asarray(x).dtype == bool for x in given):
        return {name: x == 1 for name, x in counts.items()}
    return {name: np.diff(x, prepend=0) > 0 for name, x in counts.items()}
