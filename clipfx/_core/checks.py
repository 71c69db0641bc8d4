"""One sentence for every argument that is wrong, while its value is known."""

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

_P = ParamSpec("_P")
_R = TypeVar("_R")

# What Optax, PyTorch, jax_privacy, Opacus and others call it, and what it is here.
_NAMES_ELSEWHERE = {
    "alpha": ("decay", "max_ratio"),
    "axes": ("axis", "axis_name"),
    "axis": ("axis_name",),
    "batch_axis_size": ("expected_batch_size",),
    "batch_size": ("expected_batch_size", "microbatch_size"),
    "beta": ("decay",),
    "clip": ("max_norm",),
    "clip_factor": ("max_ratio",),
    "clip_norm": ("max_norm",),
    "clip_threshold": ("max_norm", "threshold"),
    "clip_to_norm": ("max_norm",),
    "clip_value": ("max_abs",),
    "clipnorm": ("max_norm",),
    "clipping": ("max_ratio", "max_norm"),
    "clipping_norm": ("max_norm",),
    "clipping_threshold": ("max_norm", "threshold"),
    "clipvalue": ("max_abs",),
    "coefficient": ("max_ratio",),
    "eps": ("stability", "epsilon"),
    "epsilon": ("stability",),
    "error_if_nonfinite": ("nonfinite",),
    "gamma": ("stability", "max_ratio"),
    "global_clipnorm": ("max_norm",),
    "group": ("groups",),
    "history": ("window",),
    "l2_clip_norm": ("max_norm",),
    "l2_clipping_norm": ("max_norm",),
    "l2_norm_clip": ("max_norm",),
    "labels": ("groups",),
    "mask": ("where",),
    "max_delta": ("max_abs", "max_norm"),
    "max_grad_norm": ("max_norm",),
    "max_gradient_norm": ("max_norm",),
    "max_value": ("max_abs",),
    "momentum": ("decay",),
    "norm": ("max_norm",),
    "norm_bound": ("max_norm",),
    "norm_type": ("ord",),
    "num_microbatches": ("microbatch_size",),
    "p": ("ord",),
    "param_labels": ("groups",),
    "per_layer": ("groups",),
    "percentile": ("quantile",),
    "physical_batch_size": ("microbatch_size",),
    "quantile": ("percentile",),
    "reduction": ("reduce",),
    "rescale_to_unit_norm": ("response",),
    "seed": ("key",),
    "threshold": ("max_norm", "max_abs", "max_rms", "tau"),
    "value": ("max_abs",),
    "warmup": ("warmup_steps",),
    "window_size": ("window",),
    "z_thresh": ("z_threshold",),
}


def is_known(x: Any) -> bool:
    """Whether the value can be looked at: no tracer, no array of other processes."""
    return not isinstance(x, jax.core.Tracer) and (
        not isinstance(x, jax.Array) or x.is_fully_addressable
    )


def is_number(x: Any) -> bool:
    """Whether it is a real number or an array of such, of Python, NumPy or JAX."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return any(
            jnp.issubdtype(x.dtype, kind) for kind in (jnp.integer, jnp.floating)
        )
    return isinstance(x, int | float) and not isinstance(x, bool)


def check_keywords(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Checks the names of keyword arguments, and says which may have been meant.

    Args:
      name: Of the function.
      given: Names that came.
      known: Names that there are.

    Raises:
      TypeError: If one is not known.
    """
    known = [*known]
    for word in given:
        if word in known:
            continue
        elsewhere = [x for x in _NAMES_ELSEWHERE.get(word, ()) if x in known]
        near = elsewhere or difflib.get_close_matches(word, known, 1)
        advice = f"did you mean {near[0]}" if near else f"it has {', '.join(known)}"
        raise TypeError(
            f"{name} must be given arguments that it has, got {word!r}; {advice}"
            f"{'?' if near else '.'}"
        )


def helpful(fun: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function name the argument that may have been meant by an unknown one."""
    parameters = inspect.signature(fun).parameters.values()
    known = [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]

    @functools.wraps(fun)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_keywords(fun.__name__, kwargs, known)
        return fun(*args, **kwargs)

    return checked


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
    if static:
        check_static(name, value)
    if not is_number(value) or np.ndim(value):
        kind = "a static number" if static else "a number"
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


def check_static(name: str, value: Any) -> None:
    """Checks that an argument is no array, which injection makes of numbers."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a static Python number, got an array; under "
            f'optax.inject_hyperparams pass static_args="{name}".'
        )


def check_count(name: str, value: Any, least: int, advice: str) -> int:
    """Checks a static whole number of Python or NumPy.

    Args:
      name: Of the argument.
      value: What came.
      least: The smallest that there may be.
      advice: What to pass, the second half of the sentence.

    Returns:
      The number as an `int`.

    Raises:
      TypeError: If it is no whole number, or an array of JAX.
      ValueError: If it is less than `least`.
    """
    check_static(name, value)
    wrong = f"{name} must be an int >= {least}, got {value!r}; {advice}."
    if isinstance(value, bool | np.bool_):
        raise TypeError(wrong)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(wrong) from None
    if number < least:
        raise ValueError(wrong)
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks a string that names one of a few ways."""
    if value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise ValueError(
            f"{name} must be {', '.join(most)} or {last}, got {value!r}; the first is "
            "the default."
        )


def check_function(name: str, value: Any, advice: str) -> None:
    """Checks that an argument can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function, got a {type(value).__name__}; {advice}."
        )


def check_params(params: Any, method: str) -> None:
    """Checks that `params` came with the updates."""
    if params is None:
        raise TypeError(
            f"params must be passed to {method}, got None; call "
            "tx.update(updates, state, params)."
        )


def check_transform(name: str, tx: Any) -> None:
    """Checks that an argument is a transform, and not, say, its class."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {tx!r}; pass the "
            "transform itself, such as optax.adam(1e-3) or "
            "clipfx.clip_by_global_norm(1.0)."
        )
