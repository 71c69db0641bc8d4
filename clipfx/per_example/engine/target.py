"""For what kind of device a program is traced."""

import jax

# Instead of JAX's default, for tests and for programs compiled ahead of time.
forced = ""


def is_cpu() -> bool:
    """Whether to assume that the program will run on CPUs."""
    return (forced or jax.default_backend()) == "cpu"
