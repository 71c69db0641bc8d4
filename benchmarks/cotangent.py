"""What `clip_cotangent` at every step of a recurrence costs.

    python -m benchmarks.cotangent
    python -m benchmarks.cotangent --topology=v5e:2x2   # compiled only, or h100

Every figure is a ratio within one run: gradients of a tanh recurrence with each clip of
its state take turns, and the median over the turns is compared with the one without.
Compiled for a device that is not there (see `_targets` for what that needs) they are
measured by the cycles that XLA's cost model expects of a TPU, or by what a GPU moves
through memory.
`by hand` is a `custom_vjp` with a square root and a division, which overflows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import clipfx
from benchmarks._programs import print_costs
from benchmarks._timing import in_turns

_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU to compile for, or h100.")
_TURNS = flags.DEFINE_integer("turns", 15, "Timed gradients of each variant.")
_SHAPES = flags.DEFINE_list(
    "shapes", ["32x256x100", "4x1024x100"], "Examples x hidden x steps."
)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of everything.")


@jax.custom_vjp
def by_hand(x):
    return x


def _bound(_, g):
    norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)), -1, keepdims=True))
    return ((g * jnp.minimum(1, 1e-3 / norm)).astype(g.dtype),)


by_hand.defvjp(lambda x: (x, None), _bound)

CLIPS = {
    "none": lambda h: h,
    "by hand": by_hand,
    "max_abs": functools.partial(clipfx.clip_cotangent, max_abs=1e-4),
    "max_norm": functools.partial(clipfx.clip_cotangent, max_norm=1e-3, axis=-1),
}


def step_of(clip):
    """One step of gradient descent."""

    def loss(w, xs):
        body = lambda h, x: (jnp.tanh(clip(h) @ w + x), None)
        return jnp.sum(jnp.square(jax.lax.scan(body, xs[0], xs)[0]))

    def step(w, xs):
        return ((w - 1e-6 * jax.grad(loss)(w, xs)).astype(w.dtype),)

    return jax.jit(step)


def measure(examples: int, hidden: int, length: int, dtype) -> None:
    """Prints one row per clip."""
    print(f"\n{examples} x {hidden:,} x {length} {dtype}")
    if _TOPOLOGY.value:
        shapes = (hidden, hidden), (length, examples, hidden)
        args = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        steps = {name: (step_of(clip), args) for name, clip in CLIPS.items()}
        print_costs(_TOPOLOGY.value, steps)
        return
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.orthogonal(keys[0], hidden).astype(dtype)
    xs = jax.random.normal(keys[1], (length, examples, hidden), dtype)
    steps, carries = {}, {}
    for name, clip in CLIPS.items():
        steps[name] = step_of(clip).lower(w, xs).compile()
        carries[name] = (w,)
    times = in_turns(steps, carries, xs, _TURNS.value, 1)
    for name, row in times.items():
        ratio = np.median(row / times["none"])
        print(f"{name:10}{1e3 * np.median(row):9.2f} ms{ratio:7.2f}", flush=True)


def main(argv) -> None:
    del argv
    print(f"jax {jax.__version__}, {_TOPOLOGY.value or jax.devices()[0]}")
    for dtype in _DTYPES.value:
        for shape in _SHAPES.value:
            examples, hidden, length = map(int, shape.split("x"))
            measure(examples, hidden, length, jnp.dtype(dtype))


if __name__ == "__main__":
    app.run(main)
