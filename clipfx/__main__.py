"""`python -m clipfx`: says which programs there are."""

PROGRAMS = """\
clipfx is a library of gradient clips for JAX and Optax. Its programs:

  python -m clipfx.calibrate RUN   first settings of a clip, from the norms of a run
"""


def main() -> None:
    """Prints them."""
    print(PROGRAMS, end="")


if __name__ == "__main__":
    main()
