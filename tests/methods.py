"""THE TABLE: every public method, once. `test_laws.py` runs every law on every row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import clipfx
from clipfx import responses


class Method(NamedTuple):
    """One row.

    Attributes:
      make: From keyword arguments to the transform.
      args: The numeric arguments, which `optax.inject_hyperparams` can reach; the
        first is the threshold. With these the sample trees are clipped.
      hard: No group is longer than its threshold afterwards, shorter ones are left
        alone, and a second clip finds nothing to do.
      groups: Which leaves share a norm; None for a transform of single elements.
      static: Arguments that injection must leave alone.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    args: dict[str, float]
    hard: bool = True
    groups: Any = "global"
    ord: float = 2
    static: tuple[str, ...] = ()


LABELS = {"decoder": "second", "encoder": {"bias": "second", "kernel": "first"}}


def by_norm(**kwargs: Any) -> Callable:
    """`clip_by_norm` with everything but the threshold settled."""
    return lambda threshold: clipfx.clip_by_norm(threshold, **kwargs)


def by_value(response: Callable) -> Callable:
    return lambda max_abs: clipfx.clip_by_value(max_abs, response=response)


METHODS: dict[str, Method] = {
    "clip_by_global_norm": Method(clipfx.clip_by_global_norm, {"max_norm": 0.5}),
    "clip_per_layer": Method(clipfx.clip_per_layer, {"max_norm": 0.5}, groups="layer"),
    "clip_per_leaf": Method(
        lambda max_norm: clipfx.clip_per_layer(max_norm, groups="leaf"),
        {"max_norm": 0.5},
        groups="leaf",
    ),
    "clip_by_labels": Method(by_norm(groups=LABELS), {"threshold": 0.5}, groups=LABELS),
    "clip_by_block_rms": Method(
        clipfx.clip_by_block_rms, {"max_rms": 0.1}, groups="leaf"
    ),
    "normalize_by_norm": Method(clipfx.normalize_by_norm, {"target": 0.5}, hard=False),
    "ord_1": Method(by_norm(ord=1), {"threshold": 0.5}, ord=1),
    "ord_inf": Method(by_norm(ord=math.inf), {"threshold": 0.5}, ord=math.inf),
    "ord_3_per_layer": Method(
        by_norm(ord=3, groups="layer"), {"threshold": 0.5}, groups="layer", ord=3
    ),
    "drop_nonfinite": Method(by_norm(nonfinite="zero"), {"threshold": 0.5}),
    "reject": Method(by_norm(response=responses.reject), {"threshold": 0.5}),
    **{
        name: Method(by_norm(response=response), {"threshold": 0.5}, hard=False)
        for name, response in {
            "tanh": responses.tanh,
            "softsign": responses.softsign,
            "pseudo_huber": responses.pseudo_huber,
            "arctan": responses.arctan,
            "log": responses.log,
            "power": responses.power(0.5),
            "band": responses.band(0.9),
        }.items()
    },
    "clip_by_value": Method(clipfx.clip_by_value, {"max_abs": 0.1}, groups=None),
    "tanh_by_value": Method(
        by_value(responses.tanh), {"max_abs": 0.1}, hard=False, groups=None
    ),
}

# Public functions that are no transforms to be clipped with, and where they are tested.
ELSEWHERE = {"clip_by_norm", "per_stacked_layer", "tree_clip", "global_norm"}
