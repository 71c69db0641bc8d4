"""Ways to sum the squares of leaves so that none leaves the range, on the device here.

    python -m benchmarks.reductions

Microseconds for all leaves of a tree, which no other operation makes or uses. `one` is
the sum that overflows and vanishes; the others are sums at three scales.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from clipfx._core import safe_sums

_TREES = flags.DEFINE_list(
    "trees", ["25x1000000", "8x4000000", "1x25000000", "200x1000"], "Leaves x elements."
)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of leaves.")
_TURNS = flags.DEFINE_integer("turns", 10, "Timed turns of each way.")
_CHAIN = flags.DEFINE_integer("steps", 20, "Calls in each turn.")


def one(leaves: Sequence[jax.Array]) -> list[Any]:
    """The sum of squares, as it is."""
    return [[jnp.sum(jnp.square(x.astype(jnp.float32)))] for x in leaves]


def each(parts: Callable[..., Any]) -> Callable[[Sequence[jax.Array]], list[Any]]:
    """Sums of a leaf at three scales, of every leaf."""
    return lambda leaves: [parts(x, jnp.float32, 2) for x in leaves]


def largest_first(leaves: Sequence[jax.Array]) -> list[Any]:
    """Two passes: the largest element, then the sum at its scale."""
    wide = [x.astype(jnp.float32) for x in leaves]
    top = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in wide])
    scale = jnp.exp2(-jnp.floor(jnp.log2(jnp.maximum(top, 1e-38))))
    return [[jnp.sum(jnp.square(x * scale))] for x in wide]


def in_float64(leaves: Sequence[jax.Array]) -> list[Any]:
    """One sum, in a range that squares of float32 do not leave."""
    with jax.enable_x64(True):
        wide = [lax.convert_element_type(x, jnp.float64) for x in leaves]
        return [[jnp.sum(x * x)] for x in wide]


WAYS = {
    "one": one,
    "together": each(safe_sums._together),
    "separate": each(safe_sums._separate),
    "largest first": largest_first,
    "float64": in_float64,
}


def main(argv: Any) -> None:
    del argv
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':24}" + "".join(f"{name:>15}" for name in WAYS))
    for tree in _TREES.value:
        count, size = map(int, tree.split("x"))
        for dtype in _DTYPES.value:
            draw = np.random.default_rng(0).normal
            leaves = [jnp.asarray(draw(size=size), dtype) for _ in range(count)]
            runs = {name: jax.jit(way) for name, way in WAYS.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(_TURNS.value + 2):
                for name, run in runs.items():
                    start = time.perf_counter()
                    outs = [run(leaves) for _ in range(_CHAIN.value if turn else 1)]
                    jax.block_until_ready(outs)
                    times[name].append((time.perf_counter() - start) / _CHAIN.value)
            spent = [1e6 * np.median(row[2:]) for row in times.values()]
            cells = "".join(f"{x:15.0f}" for x in spent)
            print(f"{tree + ' ' + dtype:24}{cells}", flush=True)


if __name__ == "__main__":
    app.run(main)
