"""Gradient clipping for JAX: Optax transforms, right in every dtype and on every mesh.

>>> import clipfx, optax
>>> tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.adamw(3e-4))

`clip_by_norm` is the builder; four words carry it. *groups* say which leaves share a
norm, a *threshold* what is too large, a *response* what to do about it. The named
methods are choices of these three. `metrics.read` shows norms and clip rates from any
optimizer state; `tree_clip` and `global_norm` serve those who use no chain.
"""

from clipfx import metrics, responses, thresholds
from clipfx._clip import ClipMetrics, ClipState, clip_by_norm, global_norm, tree_clip
from clipfx._elementwise import clip_by_value
from clipfx._methods import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_per_layer,
    normalize_by_norm,
    per_stacked_layer,
)

__version__ = "0.1.0"

__all__ = [
    "ClipMetrics",
    "ClipState",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clip_per_layer",
    "global_norm",
    "metrics",
    "normalize_by_norm",
    "per_stacked_layer",
    "responses",
    "thresholds",
    "tree_clip",
]
