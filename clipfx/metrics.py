"""Reads the metrics of every clip out of any optimizer state."""

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import helpful
from clipfx._core.paths import ordered
from clipfx._core.running_stats import LARGEST
from clipfx._core.state import ClipMetrics, ClipState

__all__ = ["read"]

# Fields that hold states in Optax, Flax and here: they name no clip.
_PASSED_OVER = {"clip", "inner", "inner_opt_state", "inner_state", "inner_states",
                "opt_state", "raw_value", "value"}  # fmt: skip


@helpful
def read(opt_state: Any, prefix: str = "clip", *, plain: bool = True) -> dict[str, Any]:
    """Finds every `ClipState` and names its numbers.

    Looks through `optax.chain`, `named_chain`, `masked`, `partition`, `MultiSteps`,
    `apply_if_finite`, `inject_hyperparams`, the `opt_state` of a Linen `TrainState` or
    an `nnx.Optimizer`, and the dict that Orbax restores without a target.

    Args:
      opt_state: The state of an optimizer, or anything that holds one.
      prefix: What the keys of clips without a name begin with; they are numbered in the
        order they are found.
      plain: Whether to return Python's numbers, fit for JSON and for loggers; else
        NumPy's scalars. Traced values stay what they are.

    Returns:
      A flat dict: `clip0/norm/decoder/layer_3`. The first word is the name of the clip,
      from `named_chain`, keys of dicts and attributes, as in `guard/norm/global`, and
      `clip0` only where there is none. The second is one of

      - `norm`, `target_norm`: before and after the clip, of the last step,
      - `threshold`, `factor`, and `share`, how much of what was measured was clipped,
      - `steps`, `clipped`, `lifted`, `nonfinite`, and `clip_rate`, clipped over steps,
      - `total_norm` of all groups together, where there are several; without a group.

      The rest is the group, and the number of the layer of a state of
      `clipfx.per_stacked_layer`: `clip0/norm/global/11`. All are finite. A state
      without a clip gives an empty dict.

    Raises:
      TypeError: If `opt_state` is no state but a transform, a function or a number.
      ValueError: If a restored dict has lost the names of its groups.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> tx = clipfx.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> read(state)["clip0/norm/global"], read(state)["clip0/target_norm/global"]
      (5.0, 1.0)

    Reference: none.
    """
    found = {}
    for start, state in states_of(opt_state, prefix):
        for key, value in _numbers(_metrics(state)).items():
            traced = isinstance(value, jax.core.Tracer)
            found[f"{start}/{key}"] = value.item() if plain and not traced else value
    return found


def states_of(opt_state: Any, prefix: str = "clip") -> list[tuple[str, Any]]:
    """Every `ClipState`, or what Orbax restores of one, by the name of its clip."""
    if callable(opt_state) or any(map(callable, jax.tree.leaves(opt_state))):
        raise TypeError(
            f"opt_state must be the state of an optimizer, got {opt_state!r}; pass "
            "what tx.init(params) or the last tx.update returned."
        )
    if isinstance(opt_state, int | float | complex | str | np.ndarray | jax.Array):
        raise TypeError(
            "opt_state must be the state of an optimizer, got a "
            f"{type(opt_state).__name__}; pass what tx.init(params) returned."
        )
    is_clip = lambda node: isinstance(node, ClipState) or _is_restored(node)
    flat = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_clip)[0]
    named = [(_name(opt_state, path), node) for path, node in flat if is_clip(node)]
    number = collections.Counter(name for name, _ in named)
    seen = collections.Counter[str]()
    found = []
    for name, state in named:
        start = name
        if not name or number[name] > 1:
            start = "/".join(filter(None, (name, f"{prefix}{seen[name]}")))
            seen[name] += 1
        found.append((start, state))
    return found


def _name(tree: Any, path: tuple) -> str:
    """Keys of dicts and attributes, without fields that hold any state.

    Flax and Orbax make keys of fields. A `clip` among them is one if another stands
    beside it, else what somebody has called a clip.
    """
    words = []
    for key in path:
        word = getattr(key, "name", getattr(key, "key", None))
        beside = {*tree} - {"clip"} if isinstance(tree, Mapping) else _PASSED_OVER
        is_field = word != "clip" or bool(_PASSED_OVER & beside)
        if isinstance(word, str) and not (is_field and word in _PASSED_OVER):
            words.append(word)
        tree = _child(tree, key)
    return _as_tag("/".join(words)) if words else ""


def _child(tree: Any, key: Any) -> Any:
    """What lies below a key; an empty dict where keys do not tell."""
    if hasattr(key, "name"):
        return getattr(tree, key.name)
    within = isinstance(tree, Mapping) or hasattr(key, "idx")
    return tree[key.idx if hasattr(key, "idx") else key.key] if within else {}


def _as_tag(name: str) -> str:
    """A name that loggers take: letters, digits and a few signs."""
    return re.sub(r"[^\w/.\-]+", "_", name).strip("_") or "root"


def _is_restored(node: Any) -> bool:
    """Whether it is what Orbax makes of a `ClipState`, without being told of one."""
    metrics = node.get("metrics") if isinstance(node, Mapping) else None
    return isinstance(metrics, Mapping) and {"norm", "clipped"} <= {*metrics}


def _metrics(state: Any) -> ClipMetrics:
    if isinstance(state, ClipState):
        return state.metrics
    fields = {name: state["metrics"].get(name) for name in ClipMetrics._fields}
    names = fields["groups"]
    if not isinstance(names, Mapping) or len(names) != np.shape(fields["norm"])[-1]:
        raise ValueError(
            "opt_state must have the names of its groups, got a restored dict without "
            "them; restore it into a state, as in "
            "orbax.checkpoint.StandardCheckpointer().restore(path, tx.init(params))."
        )
    return ClipMetrics(**fields)


def _numbers(metrics: ClipMetrics) -> dict[str, Any]:
    fields = metrics._asdict()
    names = [_as_tag(name) for name in ordered(fields.pop("groups"))]
    if len({*names}) < len(names):
        names = list(ordered(metrics.groups))
    bare = {k: jax.tree.leaves(v)[0] if _compat.is_boxed(v) else v
            for k, v in fields.items()}  # fmt: skip
    traced = any(isinstance(v, jax.core.Tracer) for v in bare.values())
    lib = jnp if traced else np
    bare = {k: lib.asarray(v) for k, v in bare.items()}
    total = bare.pop("total")
    steps = lib.maximum(bare["steps"], 1)
    bare["clip_rate"] = (bare["clipped"] / steps).astype(np.float32)
    # Cut first, then lifted as far as there is room: norm times factor may overflow.
    half = lib.minimum(bare["factor"], 1) * bare["norm"]
    lift = lib.minimum(lib.maximum(bare["factor"], 1), LARGEST / lib.maximum(half, 1))
    bare["target_norm"] = (half * lift).astype(np.float32)
    found = {}
    for field, values in bare.items():
        for index in np.ndindex(values.shape[:-1]):
            for group, value in zip(names, values[index], strict=True):
                found["/".join(map(str, (field, group, *index)))] = value
    if len(names) > 1:
        for index in np.ndindex(total.shape):
            found["/".join(map(str, ("total_norm", *index)))] = total[index]
    return found
