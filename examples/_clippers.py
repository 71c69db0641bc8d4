"""The methods that an example can be told to train with, by name."""

import math
from collections.abc import Callable, Sequence

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


# `none` has an infinite threshold: it changes nothing, and counts all the same. Those
# that ignore the threshold find their own.
CLIPPERS: dict[str, Clipper] = {
    "none": before(lambda max_norm: clipfx.clip_by_global_norm(math.inf)),
    "global": before(clipfx.clip_by_global_norm),
    "layer": before(clipfx.clip_per_layer),
    "value": before(clipfx.clip_by_value),
    "rms": before(clipfx.clip_by_block_rms),
    "normalize": before(clipfx.normalize_by_norm),
    "smooth_norm": before(lambda max_norm: clipfx.smooth_norm(1.0, 1 / max_norm)),
    "error_feedback": before(
        lambda max_norm: clipfx.error_feedback(clipfx.clip_by_global_norm(max_norm))
    ),
    "autoclip": before(lambda _: clipfx.autoclip()),
    "quantile": before(lambda _: clipfx.quantile_clip()),
    "zclip": before(lambda _: clipfx.zclip()),
    "adagc": before(lambda max_norm: clipfx.adagc(max_norm=max_norm)),
    "band": before(lambda _: clipfx.band_by_history()),
    "group_ratio": before(lambda _: clipfx.clip_group_ratio(2.0, groups="layer")),
    "spamp": before(lambda _: clipfx.spamp()),
    "grad_power": before(lambda _: clipfx.grad_power()),
    "stabilizer": before(lambda _: clipfx.norm_stabilizer()),
    "spikes": before(lambda _: clipfx.clip_spikes()),
    "spam": before(lambda _: clipfx.spam_clip()),
    # A unit of the embedding is a row, that of the linear layers a column.
    "agc": before(lambda _: clipfx.agc(axis={"embed": {"embedding": 1}})),
    "curvature": lambda max_norm, rate, tx: optax.chain(
        clipfx.clip_by_curvature(rate), tx
    ),
    "params": lambda max_norm, rate, tx: optax.chain(tx, clipfx.clip_by_params()),
    "skip_spikes": lambda max_norm, rate, tx: optax.chain(clipfx.skip_spikes(tx)),
}


def check_clippers(names: Sequence[str]) -> None:
    """A `ValueError` for a clipper that is not in the table, and for none at all."""
    unknown = [name for name in names if name not in CLIPPERS]
    if unknown or not names:
        got = f"unknown clipper {unknown[0]!r}" if unknown else "no clipper given"
        raise ValueError(f"{got}: known are {', '.join(CLIPPERS)}.")
