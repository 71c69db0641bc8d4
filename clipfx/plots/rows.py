"""Rows of metrics, as logged, to arrays."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_FIELDS = {"clip_rate", "clipped", "factor", "lifted", "nonfinite", "norm", "share",
           "steps", "target_norm", "threshold", "total_norm"}  # fmt: skip


def by_clip(
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Turns logged rows of `clipfx.metrics.read` into arrays.

    Args:
      rows: One dict for each step, with the keys of `clipfx.metrics.read` among
        others, as read from a file of JSON lines. Of one run: where a file holds
        several, choose.

    Returns:
      Float64 arrays `[T]` by clip, field and group:
      `by_clip(rows)["clip0"]["norm"]["global"]`. NaN where a row has no such number;
      `total_norm`, which has no group, is under `all`.

    Raises:
      TypeError: If a row is no dict.

    Example:
      >>> rows = [{"step": 0, "clip0/norm/a": 3.0}, {"step": 1, "clip0/norm/a": None}]
      >>> by_clip(rows)
      {'clip0': {'norm': {'a': array([ 3., nan])}}}

    Reference: none.
    """
    table: list[Any] = [rows] if isinstance(rows, str | Mapping) else list(rows)
    wrong = [row for row in table if not isinstance(row, Mapping)]
    wrong = [rows] if isinstance(rows, Mapping) else wrong
    if wrong:
        raise TypeError(
            "rows must be dicts with the keys of clipfx.metrics.read, got "
            f"{wrong[0]!r:.60}; a line of a file of JSON lines is one by json.loads."
        )
    keys = dict.fromkeys(key for row in table for key in row)
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for key in keys:
        words = str(key).split("/")
        places = [i for i in range(1, len(words)) if words[i] in _FIELDS]
        # A clip or a group may have the name of a field; every group has its steps.
        counted = [
            i
            for i in places
            if "/".join([*words[:i], "steps", *words[i + 1 :]]) in keys
        ]
        for i in [*counted, *places][:1]:
            clip, field, group = "/".join(words[:i]), words[i], "/".join(words[i + 1 :])
            if group or field == "total_norm":
                column = [row.get(key) for row in table]
                numbers = [math.nan if x is None else float(x) for x in column]
                fields = found.setdefault(clip, {})
                fields.setdefault(field, {})[group or "all"] = np.array(numbers)
    return found
