r"""Draws: 63 random bits for each, mapped to the distribution by its inverse.

Everything is elementwise, in the place and the sharding of what noise is for, so that a
compiler can draw within the addition and nothing random is ever written to memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Words: TypeAlias = tuple[jax.Array, jax.Array]  # uint32, the higher first
TURNS = (13, 15, 26, 6), (17, 29, 16, 24)
# z / (1 - t) for a normal variable that is beyond z, in either direction, with chance
# t: polynomials in w - 3 for w = -log(t (2 - t)) below CUT, and in sqrt(w) - 4.5 from
# there to 44.5. Least squares at Chebyshev nodes; the relative error is 1e-7.
CUT = 6.25
MIDDLE = (
    -7.20238739e-09, -4.16201822e-09, 6.25294298e-07, -2.69982561e-06, -1.7929707e-05,
    0.000276620762, -0.00118261319, -0.00811586448, 0.341716997, 2.2960353,
)  # fmt: skip
OUTER = (
    7.6002942e-07, -3.92698717e-06, 4.75809575e-06, 2.57647717e-06, 7.06508958e-06,
    -6.81752151e-05, 0.000219783116, -0.000602665498, 0.000458743205, 1.42868393,
    6.14441004,
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def draws(
    inverse: Callable,
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any,
    sharding: Any = None,
) -> jax.Array:
    """Draws from a distribution that is symmetric about 0.

    Args:
      inverse: `gaussian` or `laplace`.
      key: Two random words for this alone, uint32 `[2]`.
      shape: Of the result.
      dtype: float32 or float64.
      sharding: Of the result, on a mesh with Explicit axes; elsewhere None.
    """
    return of_words(inverse, *threefry(key, *_counters(shape, sharding)), dtype)


def of_words(
    inverse: Callable, high: jax.Array, low: jax.Array, dtype: Any
) -> jax.Array:
    """What a sign, 31 bits and 31 below them stand for; `low` has one to spare."""
    # Signed: machines convert these to floating numbers at once.
    number = lambda x: lax.bitcast_convert_type(x, jnp.int32).astype(dtype)
    ones = jnp.uint32(2**31 - 1)
    share = lambda a, b: number(a) * 2.0**-31 + (number(b) + 0.5) * 2.0**-62
    a, b = high & ones, low >> 1
    size = inverse(share(a, b), share(ones - a, ones - b))
    return jnp.where(high > ones, -size, size)


def gaussian(tail: jax.Array, rest: jax.Array) -> jax.Array:
    """How far out a normal variable of variance 1 is, from the chance t to be farther.

    Args:
      tail: t in (0, 1).
      rest: 1 - t, by itself, or small ones would have few bits.
    """
    w = -jnp.log(tail * (1 + rest))
    root = jnp.sqrt(jnp.maximum(w, CUT))
    z = rest * jnp.where(w < CUT, _sum(MIDDLE, w - 3), _sum(OUTER, root - 4.5))
    if tail.dtype == jnp.float64:  # a step of Halley's, which cubes the error
        slope = -math.sqrt(2 / math.pi) * jnp.exp(-z * z / 2)
        step = (lax.erfc(z * math.sqrt(0.5)) - tail) / slope
        z -= step / (1 + step * z / 2)
    return z


def laplace(tail: jax.Array, rest: jax.Array) -> jax.Array:
    """The same for the Laplace distribution of scale 1."""
    return -jnp.where(rest < 0.25, jnp.log1p(-rest), jnp.log(tail))


def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> Words:
    """Enciphers pairs of 32-bit words by Threefry-2x32 with 20 rounds.

    The primitive of `jax.random` has the same values; but on CPUs it is a loop over
    arrays, and on GPUs a kernel of its own, where nothing can be fused with it.

    Args:
      key: uint32 `[2]`.
      high: uint32 `[...]`.
      low: uint32 `[...]`.

    Reference: Salmon et al., `Parallel random numbers: as easy as 1, 2, 3
    <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    keys = [key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)]
    a, b = high + keys[0], low + keys[1]
    for group in range(1, 6):
        for turn in TURNS[(group - 1) % 2]:
            a = a + b
            b = ((b << turn) | (b >> (32 - turn))) ^ a
        a, b = a + keys[group % 3], b + keys[(group + 1) % 3] + jnp.uint32(group)
    return a, b


def _counters(shape: Sequence[int], sharding: Any) -> Words:
    """A pair of words for each element, no two of them equal, whatever the mesh."""
    words = [jnp.zeros(shape, jnp.uint32, out_sharding=sharding)] * 2
    stride, word = 1, 1  # the lower word first
    for axis in reversed(range(len(shape))):
        if _is_long(stride * shape[axis]):
            stride, word = 1, word - 1
        if word < 0 or _is_long(shape[axis]):
            raise ValueError(
                "dimensions of a leaf that gets noise must multiply to at most 2^32 in "
                f"at most two groups of neighbours, got {tuple(shape)}; split the leaf."
            )
        place = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        # A stride of 2^32 is that of dimensions of size 1, where it does not matter.
        step = 0 if _is_long(stride + 1) else stride
        words[word] += place * jnp.asarray(step, jnp.uint32)
        stride *= shape[axis]
    return words[0], words[1]


def _is_long(size: Any) -> bool:
    return isinstance(size, int) and size > 2**32  # not a symbolic one


def _sum(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    total = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        total = (total + coefficient) * x
    return total + coefficients[-1]
