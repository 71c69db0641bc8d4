"""From the norms of a run to a clip: record, look, choose.

>>> tx = optax.chain(clipfx.record_norms(1000), optax.adamw(3e-4))  # and train a while

`history(opt_state)` gives the norms in order, `suggest(norms)` what they are like and
what each method would have done on them, `replay(transform, norms)` the same for a
setting of your own. `python -m clipfx.calibrate RUN` prints it for the files of a run.
"""

from clipfx.calibrate.history import history
from clipfx.calibrate.replay import Replay, replay
from clipfx.calibrate.statistics import NormStats
from clipfx.calibrate.suggest import Setting, Suggestion, suggest

__all__ = [
    "NormStats",
    "Replay",
    "Setting",
    "Suggestion",
    "history",
    "replay",
    "suggest",
]
