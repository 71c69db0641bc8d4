"""The methods that an example can be told to train with, by name."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import optax

import clipfx

# From a threshold, a learning rate and an optimizer to the two together: a method in
# front of the optimizer, or where else it belongs.
Clipper = Callable[
    [float, float, optax.GradientTransformation], optax.GradientTransformation
]


def before(clip: Callable[[float], optax.GradientTransformation]) -> Clipper:
    """The clip that a threshold makes, in front of the optimizer."""
    return lambda max_norm, rate, tx: optax.chain(clip(max_norm), tx)


def guarded(clip: Callable[[], optax.GradientTransformation]) -> Clipper:
    """An adaptive clip, with a fixed threshold behind it for 100 steps.

    In the first steps such a method has no statistics yet, and lets pass gradients that
    make the run diverge.
    """

    def make(max_norm, rate, tx):
        guard = lambda count: jnp.where(count < 100, max_norm, math.inf)
        return optax.chain(clip(), clipfx.clip_by_global_norm(guard), tx)

    return make


def bounded(clip: Callable[[], optax.GradientTransformation]) -> Clipper:
    """A method that changes the direction, and the threshold behind it."""
    return before(
        lambda max_norm: optax.chain(clip(), clipfx.clip_by_global_norm(max_norm))
    )


# `none` has an infinite threshold: it changes nothing, and still records metrics. Those
# that ignore the threshold adapt their own, with first settings as in docs/choose.md;
# where a run explodes from its first steps on, they have seen no others: a bound helps.
CLIPPERS: dict[str, Clipper] = {
    "none": before(lambda max_norm: clipfx.clip_by_global_norm(math.inf)),
    "global": before(clipfx.clip_by_global_norm),
    "layer": before(clipfx.clip_per_layer),
    # Of single elements: 300 is the root of some 100,000.
    "value": before(lambda max_norm: clipfx.clip_by_value(max_norm / 300)),
    "rms": before(lambda max_norm: clipfx.clip_by_block_rms(max_norm / 300)),
    "normalize": before(clipfx.normalize_by_norm),
    "smooth_norm": before(lambda max_norm: clipfx.smooth_norm(1.0, 1 / max_norm)),
    "error_feedback": before(
        lambda max_norm: clipfx.error_feedback(clipfx.clip_by_global_norm(max_norm))
    ),
    "autoclip": guarded(clipfx.autoclip),
    "quantile": guarded(lambda: clipfx.quantile_clip(0.9)),
    "zclip": before(lambda max_norm: clipfx.zclip(max_norm=max_norm)),
    "adagc": before(lambda max_norm: clipfx.adagc(1.5, max_norm=max_norm)),
    "band": guarded(clipfx.band_by_history),
    # Bounds groups by each other: where all of them explode it needs a threshold.
    "group_ratio": bounded(lambda: clipfx.clip_group_ratio(2.0, groups="layer")),
    "spamp": before(lambda _: clipfx.spamp()),
    "grad_power": bounded(clipfx.grad_power),
    "stabilizer": before(lambda _: clipfx.norm_stabilizer()),
    "spikes": before(
        lambda _: optax.chain(clipfx.clip_spikes(), clipfx.norm_stabilizer())
    ),
    "spam": bounded(clipfx.spam_clip),
    # A unit of the embedding is a row, that of the linear layers a column.
    "agc": before(lambda _: clipfx.agc(axis={"embed": {"embedding": 1}})),
    "curvature": lambda max_norm, rate, tx: optax.chain(
        clipfx.clip_by_curvature(rate), tx
    ),
    # Behind the optimizer, whose momentum would keep an exploded gradient.
    "params": lambda max_norm, rate, tx: optax.chain(
        clipfx.clip_by_global_norm(max_norm), tx, clipfx.clip_by_params()
    ),
    "skip_spikes": lambda max_norm, rate, tx: optax.chain(
        clipfx.skip_spikes(optax.chain(clipfx.clip_by_global_norm(max_norm), tx))
    ),
}


def check_clippers(
    names: Sequence[str], known: Mapping[str, Clipper] = CLIPPERS
) -> None:
    """A `ValueError` for a clipper that is not in the table, and for none at all."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        got = f"unknown clipper {unknown[0]!r}" if unknown else "no clipper given"
        raise ValueError(f"{got}: known are {', '.join(known)}.")
