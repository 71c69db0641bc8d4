"""For what kind of device a program is traced."""

from collections.abc import Iterable

import jax

from clipfx import _compat
from clipfx._core import reductions

# Instead of JAX's default, for tests and for programs compiled ahead of time.
forced = ""


def is_cpu() -> bool:
    """Whether to assume that the program will run on CPUs."""
    return (forced or jax.default_backend()) == "cpu"


def is_one_cpu(arrays: Iterable[jax.Array]) -> bool:
    """Whether to assume that it will run on one, where copies need nobody else.

    Types of Explicit axes, even of a mesh of one, tell what may be joined and reshaped.
    """
    one = is_cpu() and reductions.device_of_programs() == "one"
    return one and not any(_compat.explicit_spec(x) for x in arrays)
