"""What gradients do on their way: sizes, growth, directions, noise. Nothing is changed.

=================== ==========================================================
function            question
=================== ==========================================================
`update_ratios`     How far does a step move each layer, relative to its size?
`clip_effect`       How much did a clip shorten, and did it turn the direction?
`recurrent_flow`    Do gradients grow or vanish through time, and how fast?
`time_flow`         The same, of gradients by step that are known already.
`jacobian_norm`     By how much can one layer lengthen a gradient at most?
`second_moment_lag` How far is a gradient above what Adam is used to?
`noise_scale`       How large a batch is worth its price?
=================== ==========================================================

Where clipped steps and weight decay hold each other: `clipfx.weight_decay_balance`.
All are pure functions that can be jitted, and `by_group` names their numbers. What goes
in non-finite comes out so, in its group.

>>> import clipfx, jax.numpy as jnp
>>> steps = {"dense": {"kernel": jnp.full((2, 2), 0.01)}}
>>> params = {"dense": {"kernel": jnp.full((2, 2), 2.0)}}
>>> clipfx.diagnose.update_ratios(steps, params).ratio
Array([0.005], dtype=float32)
"""

from clipfx.diagnose.layers import (
    ClipEffect,
    UpdateRatios,
    by_group,
    clip_effect,
    update_ratios,
)
from clipfx.diagnose.paths import (
    JacobianNorm,
    TimeFlow,
    jacobian_norm,
    recurrent_flow,
    time_flow,
)
from clipfx.diagnose.spread import (
    MomentLag,
    NoiseScale,
    noise_scale,
    second_moment_lag,
)

__all__ = [
    "ClipEffect",
    "JacobianNorm",
    "MomentLag",
    "NoiseScale",
    "TimeFlow",
    "UpdateRatios",
    "by_group",
    "clip_effect",
    "jacobian_norm",
    "noise_scale",
    "recurrent_flow",
    "second_moment_lag",
    "time_flow",
    "update_ratios",
]
