"""One sentence for every argument that is wrong, while its value is known."""

import math
from typing import Any

import jax
import numpy as np


def is_known(x: Any) -> bool:
    """Whether the value can be looked at: no tracer, no array of other processes."""
    return not isinstance(x, jax.core.Tracer) and (
        not isinstance(x, jax.Array) or x.is_fully_addressable
    )


def check_number(
    name: str, value: Any, range: str, advice: str, *, static: bool = False
) -> None:
    """Checks a scalar argument against an interval written as in mathematics.

    Args:
      name: Of the argument.
      value: A Python number, or a scalar array, traced or not. NaN is in no range.
      range: Like `"[0, 1)"`, `"(0, inf)"`.
      advice: What to pass, the second half of the sentence.
      static: Whether arrays are errors.

    Raises:
      TypeError: If it is no such number.
      ValueError: If it is known and out of range.
    """
    array = isinstance(value, jax.Array | np.ndarray | np.generic) and not static
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number and not (array and np.ndim(value) == 0):
        kind = "a static Python number" if static else "a number"
        raise TypeError(f"{name} must be {kind} in {range}, got {value!r}; {advice}.")
    if not is_known(value):
        return
    low, high = (math.inf if end == "inf" else float(end)
                 for end in range[1:-1].split(", "))  # fmt: skip
    x = float(value)
    above = x >= low if range[0] == "[" else x > low
    below = x <= high if range[-1] == "]" else x < high
    if not (above and below):
        raise ValueError(
            f"{name} must be a number in {range}, got {value!r}; {advice}."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks a string that names one of a few ways."""
    if value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise ValueError(
            f"{name} must be {', '.join(most)} or {last}, got {value!r}; the first is "
            "the default."
        )


def check_params(params: Any, method: str) -> None:
    """Checks that `params` came with the updates."""
    if params is None:
        raise TypeError(
            f"params must be passed to {method}, got None; call "
            "tx.update(updates, state, params)."
        )
