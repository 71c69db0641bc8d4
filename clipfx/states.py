"""The classes of all states, for `isinstance`, tests, and what reads checkpoints.

Each is a NamedTuple of arrays whose structure, shapes and dtypes never change from
`init` on, registered for `jax.export` under its name here.
"""

from clipfx._core.running_stats import UsualNorm, Window
from clipfx._core.state import ClipAroundState, ClipMetrics, ClipState
from clipfx.methods.clip_by_curvature import CurvatureState
from clipfx.methods.clip_fair_groups import FairGroupsState
from clipfx.methods.clip_spectrum import SpectrumState
from clipfx.methods.clip_spikes import ClipSpikesState
from clipfx.methods.norm_stabilizer import NormStabilizerState
from clipfx.methods.spam_clip import SpamClipState
from clipfx.methods.spamp import SpampState
from clipfx.methods.zclip import ZClipState
from clipfx.privacy.noise import NoiseState
from clipfx.privacy.scales import SecondMomentState
from clipfx.privacy.step import DPState
from clipfx.wrappers.error_feedback import ErrorFeedbackState
from clipfx.wrappers.skip_spikes import SkipState

__all__ = [
    "ClipAroundState",
    "ClipMetrics",
    "ClipSpikesState",
    "ClipState",
    "CurvatureState",
    "DPState",
    "ErrorFeedbackState",
    "FairGroupsState",
    "NoiseState",
    "NormStabilizerState",
    "SecondMomentState",
    "SkipState",
    "SpamClipState",
    "SpampState",
    "SpectrumState",
    "UsualNorm",
    "Window",
    "ZClipState",
]
