"""Gradient clipping for JAX: Optax transforms, correct under every dtype and sharding.

>>> import clipfx, optax
>>> tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.adamw(3e-4))

`clip_by_norm` is the builder; four words carry it. *groups* say which leaves share a
norm, a *threshold* what is too large, a *response* what to do about it. The named
methods are choices of these three. `per_example` bounds each example's gradient, for
any loss, at about the cost of one gradient; `privacy` adds noise to such sums.
`metrics.read` shows norms and clip rates from any optimizer state, `plots` draws them;
`tree_clip` and `global_norm` serve those who use no chain.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from clipfx import (
    metrics,
    per_example,
    privacy,
    responses,
    snr,
    states,
    thresholds,
)
from clipfx._core.state import ClipMetrics, ClipState
from clipfx.methods.adagc import adagc
from clipfx.methods.agc import agc
from clipfx.methods.autoclip import autoclip
from clipfx.methods.band_by_history import band_by_history
from clipfx.methods.clip_by_block_rms import clip_by_block_rms
from clipfx.methods.clip_by_curvature import clip_by_curvature
from clipfx.methods.clip_by_global_norm import clip_by_global_norm
from clipfx.methods.clip_by_norm import (
    clip_by_norm,
    clip_with_norm,
    global_norm,
    tree_clip,
)
from clipfx.methods.clip_by_params import clip_by_params
from clipfx.methods.clip_by_snr import clip_by_snr
from clipfx.methods.clip_by_value import clip_by_value
from clipfx.methods.clip_cotangent import clip_cotangent
from clipfx.methods.clip_fair_groups import clip_fair_groups
from clipfx.methods.clip_group_ratio import clip_group_ratio
from clipfx.methods.clip_per_layer import clip_per_layer
from clipfx.methods.clip_spectrum import clip_spectrum
from clipfx.methods.clip_spikes import clip_spikes
from clipfx.methods.clip_update_rms import clip_update_rms
from clipfx.methods.grad_power import grad_power
from clipfx.methods.limit_norm_growth import limit_norm_growth
from clipfx.methods.max_attention_logits import max_attention_logits
from clipfx.methods.norm_stabilizer import norm_stabilizer
from clipfx.methods.normalize_by_norm import normalize_by_norm
from clipfx.methods.qk_clip import qk_clip
from clipfx.methods.quantile_clip import quantile_clip
from clipfx.methods.record_norms import record_norms
from clipfx.methods.smooth_norm import smooth_norm
from clipfx.methods.spam_clip import spam_clip
from clipfx.methods.spamp import spamp
from clipfx.methods.weight_decay_balance import WeightDecayBalance, weight_decay_balance
from clipfx.methods.zclip import zclip
from clipfx.wrappers.dual_norm_gate import dual_norm_gate
from clipfx.wrappers.error_feedback import ErrorFeedbackState, error_feedback
from clipfx.wrappers.per_stacked_layer import per_stacked_layer
from clipfx.wrappers.skip_spikes import SkipState, skip_spikes

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
    "calibrate",
    "clip_by_block_rms",
    "clip_by_curvature",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_params",
    "clip_by_snr",
    "clip_by_value",
    "clip_cotangent",
    "clip_fair_groups",
    "clip_group_ratio",
    "clip_per_layer",
    "clip_spectrum",
    "clip_spikes",
    "clip_update_rms",
    "clip_with_norm",
    "diagnose",
    "dual_norm_gate",
    "error_feedback",
    "global_norm",
    "grad_power",
    "limit_norm_growth",
    "max_attention_logits",
    "metrics",
    "norm_stabilizer",
    "normalize_by_norm",
    "per_example",
    "per_stacked_layer",
    "plots",
    "privacy",
    "qk_clip",
    "quantile_clip",
    "record_norms",
    "responses",
    "skip_spikes",
    "smooth_norm",
    "snr",
    "spam_clip",
    "spamp",
    "states",
    "thresholds",
    "tree_clip",
    "weight_decay_balance",
    "zclip",
]

if _TYPE_CHECKING:
    from clipfx import calibrate, diagnose, plots


def __getattr__(name: str) -> _Any:
    """Tools beside training are imported when they are asked for."""
    if name in ("calibrate", "diagnose", "plots"):
        return _importlib.import_module(f"clipfx.{name}")
    raise AttributeError(f"module 'clipfx' has no attribute {name!r}")
