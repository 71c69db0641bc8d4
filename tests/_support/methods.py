"""THE TABLE: every public method, once. `test_laws.py` runs every law on every row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

import clipfx
from clipfx import responses


class Method(NamedTuple):
    """One row.

    Attributes:
      make: From keyword arguments to the transform.
      args: The numeric arguments, which `optax.inject_hyperparams` can reach. With
        these the sample trees are clipped.
      hard: No group is longer than its threshold afterwards, shorter ones are left
        alone, and a second clip finds nothing to do.
      groups: Which leaves share a norm; None where the metrics are of no norms of them.
      ord: Of the norm.
      static: Arguments that injection must leave alone.
      threshold: The first argument is one: 0 gives zeros, infinity the identity.
      by_norm: Each group is scaled as a whole; the norm in the metrics is its norm.
      adaptive: The threshold is computed from norms, in float32.
      extra: What `update` needs besides params.
      unit_axis: Of every leaf, that units run along: which mesh axes that is split over
        has to be said in `shard_map`.
      elements: The state has numbers for every element.
      drops: What exceeds the threshold becomes zero, not as long as the threshold.
      stateless: It keeps nothing, and so has no metrics.
      heads: Two leaves are those of an attention, whose sizes count; a tree without
        them is refused.
      meshes: The file that tests what it takes on meshes, where that is no matter of
        one sum over each leaf.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    args: dict[str, float]
    hard: bool = True
    groups: Any = "global"
    ord: float = 2
    static: tuple[str, ...] = ()
    threshold: bool = True
    by_norm: bool = True
    adaptive: bool = False
    extra: dict[str, Any] = {}  # noqa: RUF012
    unit_axis: int | None = None
    elements: bool = False
    drops: bool = False
    stateless: bool = False
    heads: bool = False
    meshes: str = ""


LABELS = {"decoder": "second", "encoder": {"bias": "second", "kernel": "first"}}


def by_norm(**kwargs: Any) -> Callable:
    """`clip_by_norm` with everything but the threshold settled."""
    return lambda threshold, axis_name=None: clipfx.clip_by_norm(
        threshold, axis_name=axis_name, **kwargs
    )


def by_value(response: Callable) -> Callable:
    return lambda max_abs, axis_name=None: clipfx.clip_by_value(
        max_abs, response=response, axis_name=axis_name
    )


def rescale_spectrum(
    max_sv: float, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    return clipfx.clip_spectrum(max_sv, response="rescale", axis_name=axis_name)


def rule(make: Callable, args: dict[str, float], **fields: Any) -> Method:
    """A row whose threshold is not an argument."""
    return Method(make, args, **{"threshold": False, "adaptive": True, **fields})


def spamp_of(power_of: str) -> Callable:
    return lambda decay, axis_name=None: clipfx.spamp(
        decay, power_of=power_of, axis_name=axis_name
    )


def skip_spikes(
    num_std: float, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    clip = clipfx.clip_by_global_norm(0.5, axis_name=axis_name)
    return clipfx.skip_spikes(
        clip, num_std=num_std, window=8, min_steps=2, axis_name=axis_name
    )


def error_feedback(
    max_ratio: float, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    clip = clipfx.clip_by_global_norm(0.5, axis_name=axis_name)
    return clipfx.error_feedback(clip, max_ratio=max_ratio, axis_name=axis_name)


class Moment(NamedTuple):
    """State of what keeps a second moment."""

    nu: Any


export.register_namedtuple_serialization(Moment, serialized_name="methods.Moment")


def clip_update_rms(
    max_rms: Any, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Of updates against a moment of 1."""
    ones = lambda params: Moment(optax.tree.ones_like(params))
    inner = optax.GradientTransformation(ones, lambda u, state, params: (u, state))
    return clipfx.clip_update_rms(inner, max_rms, axis_name=axis_name)


def dual_norm_gate(
    rho: float, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    unit = clipfx.normalize_by_norm(1.0, axis_name=axis_name)
    return clipfx.dual_norm_gate(unit, rho, axis_name=axis_name)


def clip_group_ratio(
    max_ratio: float, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    return clipfx.clip_group_ratio(max_ratio, groups="layer", axis_name=axis_name)


def clip_cotangent(
    max_norm: Any = None, max_abs: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Of updates as the gradient that flows back through a place of the same shapes."""

    def update(updates, state, params=None, **extra):
        leaves, treedef = jax.tree.flatten(updates)
        inexact = [k for k, x in enumerate(leaves)
                   if jnp.issubdtype(x.dtype, jnp.inexact)]  # fmt: skip
        place = lambda x: clipfx.clip_cotangent(x, max_norm, max_abs, axis=None)
        gradient = [leaves[k] for k in inexact]
        (clipped,) = jax.vjp(place, gradient)[1](gradient)
        for k, x in zip(inexact, clipped, strict=True):
            leaves[k] = x
        return treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def cotangent_by_value(max_abs: Any) -> optax.GradientTransformationExtraArgs:
    return clip_cotangent(max_abs=max_abs)


# Of the sample, and of the same leaves in `mixed`: [D, 4 heads of 2 features] and
# [D, 2 heads, and a column that is none].
QUERY = {("encoder", "kernel"), ("f16", "w")}
KEY = {("decoder", "kernel"), ("bf16",)}


def qk_clip(tau: Any) -> optax.GradientTransformationExtraArgs:
    """Of which two leaves are an attention, with logits beyond tau and below."""
    clip = clipfx.qk_clip(
        tau,
        query=lambda path: "layer" if path in QUERY else None,
        key=(lambda path: "layer" if path in KEY else None, np.s_[..., :4]),
    )

    def update(updates, state, params=None, **extra):
        logits = jnp.array([1.0, 30.0, 4.0, 8.0])
        return clip.update(updates, state, params, max_logits=logits, **extra)

    return clip._replace(update=update)


METHODS: dict[str, Method] = {
    "clip_by_global_norm": Method(clipfx.clip_by_global_norm, {"max_norm": 0.5}),
    "clip_per_layer": Method(clipfx.clip_per_layer, {"max_norm": 0.5}, groups="layer"),
    "clip_per_leaf": Method(
        lambda max_norm, axis_name=None: clipfx.clip_per_layer(
            max_norm, groups="leaf", axis_name=axis_name
        ),
        {"max_norm": 0.5},
        groups="leaf",
    ),
    "clip_by_labels": Method(by_norm(groups=LABELS), {"threshold": 0.5}, groups=LABELS),
    "clip_by_block_rms": Method(
        clipfx.clip_by_block_rms, {"max_rms": 0.1}, groups="leaf"
    ),
    "normalize_by_norm": Method(
        clipfx.normalize_by_norm, {"target_norm": 0.5}, hard=False
    ),
    "ord_1": Method(by_norm(ord=1), {"threshold": 0.5}, ord=1),
    "ord_inf": Method(by_norm(ord=math.inf), {"threshold": 0.5}, ord=math.inf),
    "ord_3_per_layer": Method(
        by_norm(ord=3, groups="layer"), {"threshold": 0.5}, groups="layer", ord=3
    ),
    "drop_nonfinite": Method(by_norm(nonfinite="zero"), {"threshold": 0.5}),
    "reject": Method(
        by_norm(response=responses.reject), {"threshold": 0.5}, drops=True
    ),
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
    "clip_cotangent": Method(
        clip_cotangent, {"max_norm": 0.5}, stateless=True, meshes="test_cotangent.py"
    ),
    "clip_cotangent_by_value": Method(
        cotangent_by_value,
        {"max_abs": 0.1},
        groups=None,
        stateless=True,
        meshes="test_cotangent.py",
    ),
    **{
        name: Method(
            make,
            {"max_sv": 0.5},
            hard=False,
            groups="leaf",
            by_norm=False,
            meshes="test_spectrum_on_meshes.py",
        )
        for name, make in {
            "clip_spectrum": clipfx.clip_spectrum,
            "clip_spectrum_rescale": rescale_spectrum,
        }.items()
    },
    "tanh_by_value": Method(
        by_value(responses.tanh), {"max_abs": 0.1}, hard=False, groups=None
    ),
    "smooth_norm": Method(
        clipfx.smooth_norm, {"l0": 1.0, "l1": 0.5}, hard=False, threshold=False
    ),
    "clip_by_snr": Method(clipfx.clip_by_snr, {"max_norm": 0.5}, extra={"snr": 7.0}),
    "autoclip": rule(clipfx.autoclip, {"percentile": 50.0}, static=("window",)),
    "quantile_clip": rule(clipfx.quantile_clip, {"quantile": 0.5, "step_size": 0.2}),
    "zclip": rule(clipfx.zclip, {"z_threshold": 2.5, "max_norm": 0.5}),
    "zclip_after_warm_up": rule(
        clipfx.zclip, {"z_threshold": 2.5, "warmup_steps": 1, "decay": 0.9}
    ),
    "adagc": rule(clipfx.adagc, {"max_ratio": 1.04, "max_norm": 0.5}, groups="leaf"),
    "adagc_after_warm_up": rule(
        clipfx.adagc, {"max_ratio": 1.5, "warmup_steps": 0}, groups="leaf"
    ),
    "limit_norm_growth": rule(
        clipfx.limit_norm_growth, {"max_ratio": 1.01}, groups="leaf"
    ),
    "band_by_history": rule(
        clipfx.band_by_history, {"low": 0.9, "high": 1.1}, groups="layer", hard=False
    ),
    "norm_stabilizer": rule(
        clipfx.norm_stabilizer, {"mean_decay": 0.7}, groups="leaf", hard=False
    ),
    "clip_group_ratio": Method(
        clip_group_ratio,
        {"max_ratio": 0.5},
        groups="layer",
        hard=False,
        adaptive=True,
    ),
    "clip_by_curvature": rule(
        clipfx.clip_by_curvature,
        {"learning_rate": 1.5, "max_factor": 2.0},
        hard=False,
        elements=True,
    ),
    "spamp": rule(
        clipfx.spamp, {"decay": 0.9}, groups="leaf", hard=False, by_norm=False
    ),
    "spamp_rms": rule(
        spamp_of("rms"), {"decay": 0.9}, groups="leaf", hard=False, by_norm=False
    ),
    "spamp_norm": rule(spamp_of("norm"), {"decay": 0.9}, groups="leaf", hard=False),
    "clip_spikes": rule(
        clipfx.clip_spikes, {"decay": 0.9}, groups="leaf", hard=False, by_norm=False
    ),
    "clip_by_params": rule(
        clipfx.clip_by_params,
        {"max_ratio": 0.1, "min_step": 0.01},
        groups="leaf",
        hard=False,
        by_norm=False,
    ),
    "clip_by_params_element": rule(
        lambda max_ratio, axis_name=None: clipfx.clip_by_params(
            max_ratio, per="element", axis_name=axis_name
        ),
        {"max_ratio": 0.1},
        groups=None,
        hard=False,
    ),
    "clip_update_rms": Method(
        clip_update_rms, {"max_rms": 0.1}, hard=False, groups=None, elements=True
    ),
    "agc": Method(
        clipfx.agc,
        {"max_ratio": 0.1, "eps": 1e-3},
        groups=None,
        hard=False,
        unit_axis=0,
    ),
    "grad_power": rule(clipfx.grad_power, {"power": 1.2}, groups=None, hard=False),
    "spam_clip": rule(
        clipfx.spam_clip,
        {"threshold": 0.5, "warmup_steps": 1},
        groups=None,
        hard=False,
        elements=True,
    ),
    "skip_spikes": rule(skip_spikes, {"num_std": 2.0}, groups=None, hard=False),
    "qk_clip": Method(
        qk_clip,
        {"tau": 5.0},
        groups=None,
        hard=False,
        threshold=False,
        heads=True,
        meshes="test_qk_clip.py",
    ),
    "dual_norm_gate": rule(dual_norm_gate, {"rho": 10.0}, groups=None, hard=False),
    "error_feedback": rule(
        error_feedback, {"max_ratio": 0.5}, groups=None, hard=False, elements=True
    ),
}

# What a mesh costs at most one all-reduce, and nothing is gathered.
BY_REDUCTIONS = {name: row for name, row in METHODS.items() if not row.meshes}

# Public functions that are no transforms to be clipped with, and where they are tested.
ELSEWHERE = {
    "clip_fair_groups",  # of stacked contributions, see test_fair.py
    "clip_by_norm",
    "global_norm",
    "max_attention_logits",  # of attention, see test_qk_clip.py
    "per_stacked_layer",
    "record_norms",  # which clips nothing, see test_calibrate.py
    "clip_with_norm",
    "tree_clip",
    "weight_decay_balance",
}

# The most different rows, for what runs op by op or is compiled for many devices.
FEWEST = {"agc", "autoclip", "error_feedback", "ord_3_per_layer"}
# One row for each way in which a transform is written, for what compiles much.
FEW = FEWEST | {
    "clip_by_labels",
    "drop_nonfinite",
    "clip_by_value",
    "smooth_norm",
    "adagc_after_warm_up",
    "clip_by_curvature",
    "clip_cotangent",
    "qk_clip",
    "spamp",
}
# And what is most used, or has a bound of another kind.
UNLIKE = FEW | {"clip_by_global_norm", "clip_by_block_rms", "ord_inf", "reject"}
