"""For what kind of device a program is traced."""

import jax

from clipfx._core import reductions

# Instead of JAX's default, for tests and for programs compiled ahead of time.
forced = ""


def is_cpu() -> bool:
    """Whether to assume that the program will run on CPUs."""
    return (forced or jax.default_backend()) == "cpu"


def is_one_cpu() -> bool:
    """Whether to assume that it will run on one, where copies need nobody else."""
    return is_cpu() and reductions.device_of_programs() == "one"
