"""Gradient clipping for JAX: Optax transforms, right in every dtype and on every mesh.

>>> import clipfx, optax
>>> tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.adamw(3e-4))

`clip_by_norm` is the builder; four words carry it. *groups* say which leaves share a
norm, a *threshold* what is too large, a *response* what to do about it. The named
methods are choices of these three. `per_example` bounds each example's gradient, for
any loss, at the price of an ordinary one; `privacy` adds noise to such sums.
`metrics.read` shows norms and clip rates from any optimizer state; `tree_clip` and
`global_norm` serve those who use no chain.
"""

from clipfx import metrics, per_example, privacy, responses, snr, thresholds
from clipfx._adaptive import autoclip, quantile_clip, zclip
from clipfx._averages import (
    adagc,
    band_by_history,
    clip_group_ratio,
    norm_stabilizer,
)
from clipfx._clip import ClipMetrics, ClipState, clip_by_norm, global_norm, tree_clip
from clipfx._elementwise import clip_by_value
from clipfx._fair import clip_fair_groups
from clipfx._methods import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_snr,
    clip_per_layer,
    normalize_by_norm,
    smooth_norm,
)
from clipfx._power import grad_power, spamp
from clipfx._relative import agc, clip_by_params
from clipfx._spikes import clip_spikes, spam_clip
from clipfx._steps import WeightDecayBalance, clip_by_curvature, weight_decay_balance
from clipfx._wrappers import (
    ErrorFeedbackState,
    SkipState,
    error_feedback,
    per_stacked_layer,
    skip_spikes,
)

__version__ = "0.1.0"

__all__ = [
    "ClipMetrics",
    "ClipState",
    "ErrorFeedbackState",
    "SkipState",
    "WeightDecayBalance",
    "adagc",
    "agc",
    "autoclip",
    "band_by_history",
    "clip_by_block_rms",
    "clip_by_curvature",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_params",
    "clip_by_snr",
    "clip_by_value",
    "clip_fair_groups",
    "clip_group_ratio",
    "clip_per_layer",
    "clip_spikes",
    "error_feedback",
    "global_norm",
    "grad_power",
    "metrics",
    "norm_stabilizer",
    "normalize_by_norm",
    "per_example",
    "per_stacked_layer",
    "privacy",
    "quantile_clip",
    "responses",
    "skip_spikes",
    "smooth_norm",
    "snr",
    "spam_clip",
    "spamp",
    "thresholds",
    "tree_clip",
    "weight_decay_balance",
    "zclip",
]
