"""The mesh of eight devices that tests are on, and what collectives to expect."""

import functools

import jax
import numpy as np

AXES = ("data", "model")
OTHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# One for the norm of the updates, but where that is not all to be measured.
NUMBER = {
    "spamp": 2,  # then of what the power made of the updates, which depends on the norm
    "spamp_rms": 2,
    "dual_norm_gate": 2,  # its own, after that of the direction inside
    "error_feedback": 2,  # its own, after that of the clip inside
    "skip_spikes": 2,  # its own, before that of the clip inside
    **dict.fromkeys(  # the largest, and how many exceed their bound
        ["agc", "clip_by_params_element", "clip_by_value", "spam_clip",
         "tanh_by_value"],
        2,
    ),
}  # fmt: skip


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((4, 2), AXES, axis_types=(kind,) * 2)


def assert_all_alike(rows):
    """Every device holds the same bits."""
    assert len(rows) == 8
    assert len({np.asarray(row).tobytes() for row in rows}) == 1
