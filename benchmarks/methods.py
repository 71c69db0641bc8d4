"""What every method costs in front of AdamW: time, traffic and state per parameter.

    python -m benchmarks.methods

Every figure is a ratio within one run: a method, `clip_by_global_norm` and `adamw`
alone take turns, step by step, and the median over the turns is compared with the
others of the same turn. `1k` methods have a norm for each of 1,000 leaves there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import clipfx
from benchmarks._timing import compiled, gradients, in_turns, words

_TURNS = flags.DEFINE_integer("turns", 15, "Timed steps of each variant.")
_CHAIN = flags.DEFINE_integer("steps", 1, "Steps in each timed turn.")
_TREES = flags.DEFINE_list("trees", ["25x1000000", "1000x25000"], "LxN.")
_METHODS = flags.DEFINE_list("methods", None, "Names; by default all.")

Make = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(
    make: Callable[..., optax.GradientTransformation], *args: Any, **kwargs: Any
):
    """The method in front of an optimizer."""
    return lambda tx: optax.chain(make(*args, **kwargs), tx)


METHODS: dict[str, Make] = {
    # Statistics of norms: a vector [G] of state, one reduction.
    "clip_by_global_norm": before(clipfx.clip_by_global_norm, 1.0),
    "global_norm_ord_3": before(clipfx.clip_by_global_norm, 1.0, ord=3),
    "clip_by_snr": before(clipfx.clip_by_snr, 1.0),
    "smooth_norm": before(clipfx.smooth_norm, 1.0, 1.0),
    "record_norms": before(clipfx.record_norms),
    "autoclip": before(clipfx.autoclip),
    "quantile_clip": before(clipfx.quantile_clip),
    "zclip": before(clipfx.zclip),
    "skip_spikes": lambda tx: clipfx.skip_spikes(tx),
    # The same with a norm for every leaf.
    "clip_per_layer": before(clipfx.clip_per_layer, 1.0),
    "adagc": before(clipfx.adagc),
    "limit_norm_growth": before(clipfx.limit_norm_growth),
    "band_by_history": before(clipfx.band_by_history),
    "norm_stabilizer": before(clipfx.norm_stabilizer),
    "clip_group_ratio": before(clipfx.clip_group_ratio, 2.0, groups="leaf"),
    "spamp norm": before(clipfx.spamp, power_of="norm"),
    # Elements.
    "clip_by_value": before(clipfx.clip_by_value, 1.0),
    "grad_power": before(clipfx.grad_power),
    "spamp": before(clipfx.spamp),
    "clip_spikes": before(clipfx.clip_spikes),
    "agc": before(clipfx.agc),
    "clip_by_params": lambda tx: optax.chain(tx, clipfx.clip_by_params()),
    "clip_update_rms": lambda tx: clipfx.clip_update_rms(tx, b2=0.999),
    "dual_norm_gate": lambda tx: clipfx.dual_norm_gate(tx, 1.0),
    # State for every element.
    "spam_clip": before(clipfx.spam_clip),
    "error_feedback": before(clipfx.error_feedback, clipfx.clip_by_global_norm(1.0)),
    "clip_by_curvature": before(clipfx.clip_by_curvature, 3e-4),
}


def bytes_of(tree: Any) -> int:
    """The size of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(leaves: int, size: int, names: list[str]) -> None:
    """Prints one row per method for one tree."""
    total, grads = leaves * size, gradients(leaves, size, jnp.float32)
    adamw = lambda: optax.adamw(3e-4)
    make = lambda tx: compiled(tx, leaves, size, jnp.float32, snr=7.0, value=1.0)
    steps, carries = {}, {}
    steps["adamw"], carries["adamw"], _ = make(adamw())
    plain = bytes_of(carries["adamw"]), *words(steps["adamw"], total, jnp.float32)
    steps["global"], carries["global"], _ = make(
        METHODS["clip_by_global_norm"](adamw())
    )
    print(f"\n{leaves:,} x {size:,} float32; adamw alone: {plain[1]:.1f} words")
    print(f"{'':20}{'/adamw':>8}{'/global':>8}{'words':>8}{'temp':>8}{'state':>8}"
          f"{'compile s':>11}")  # fmt: skip
    for name in names:
        steps["it"], carries["it"], seconds = make(METHODS[name](adamw()))
        times = in_turns(steps, carries, grads, _TURNS.value, _CHAIN.value)
        ratio = {n: np.median(times["it"] / times[n]) for n in ("adamw", "global")}
        traffic, temp = words(steps["it"], total, jnp.float32)
        state = (bytes_of(carries["it"]) - plain[0]) / total
        print(
            f"{name:20}{ratio['adamw']:8.2f}{ratio['global']:8.2f}"
            f"{traffic - plain[1]:8.2f}{temp - plain[2]:8.2f}{state:8.3f}"
            f"{sum(seconds):11.1f}",
            flush=True,
        )
        del steps["it"], carries["it"]


def main(argv: list[str]) -> None:
    """Prints a table for each tree."""
    del argv
    names = _METHODS.value or list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(
            f"methods: unknown method {unknown[0]!r}: known are {', '.join(METHODS)}."
        )
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    print(
        "/adamw, /global: time, a multiple of that of adamw alone, and of a clip by the"
    )
    print(
        "global norm in front of it. words, temp: XLA's bytes accessed and temporaries"
    )
    print("in words per parameter, beyond adamw's; state: bytes per parameter.")
    for tree in _TREES.value:
        leaves, size = map(int, tree.split("x"))
        measure(leaves, size, names)


if __name__ == "__main__":
    app.run(main)
