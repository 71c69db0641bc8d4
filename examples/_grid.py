"""Small networks trained side by side, in one program: what differs are numbers."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples import _sweep


class Variant(NamedTuple):
    """What differs between runs.

    Attributes:
      clip: What is clipped, or how.
      bound: Its threshold; infinite for none.
      rate: The learning rate.
      seed: Of weights and batches.
    """

    clip: str
    bound: float
    rate: float
    seed: int


class History(NamedTuple):
    """A run.

    Attributes:
      variant: What it was.
      rows: A dict for each look at it.
      norms: Of the gradient, before any clip, `[steps]`.
      last: What it ended with.
    """

    variant: Variant
    rows: list[dict[str, Any]]
    norms: np.ndarray
    last: Any = None


def lines(
    histories: Sequence[History], scores: Sequence[_sweep.Row], score: str
) -> Iterator[_sweep.Row]:
    """Of `metrics.jsonl`: all looks, and norms as `_sweep.norms_by_step` has them."""
    for history in histories:
        yield from history.rows
    norms = [history.norms for history in histories]
    yield from _sweep.norms_by_step(scores, norms, ("clip",), score)


def variants(
    bounds: Mapping[str, Sequence[float]], rates: Sequence[float], seeds: Iterable[int]
) -> list[Variant]:
    """Every bound of every clip, at every rate, with every seed."""
    kinds = [(clip, bound) for clip, several in bounds.items() for bound in several]
    every = itertools.product(kinds, rates, [*seeds])
    return [Variant(*kind, rate, seed) for kind, rate, seed in every]


def stack(numbers: Sequence[Any]) -> Any:
    """Many `NamedTuple`s of numbers as one of arrays, in JAX's default dtypes.

    What is None in all stays None.
    """
    narrow = {"f": np.float32, "i": np.int32}
    column = lambda *x: np.array(x, narrow[np.array(x).dtype.kind])
    return jax.tree.map(column, *numbers)


def ms_per_step(
    programs: tuple[Any, Any], numbers: Mapping[str, Any], steps: int, *args: Any
) -> dict[str, float]:
    """Milliseconds of a step of one run alone, by name, taken in turns.

    Args:
      programs: From numbers to learners, and from numbers, learners and `args` to
        learners that are so many steps further, and what was measured.
      numbers: What differs; None for a clip that is not to be in the program.
      steps: How many.
      *args: For the second program.
    """
    init, advance = programs
    alone = jax.jit(lambda *args: advance(*args)[0])  # measures nothing
    one = {name: stack([each]) for name, each in numbers.items()}
    # Values change nothing of how long it takes, and `init` takes long to compile.
    value = lambda x: jnp.full(x.shape, 0.01, x.dtype)
    start = lambda each: jax.tree.map(value, jax.eval_shape(init, each))
    calls = {
        name: functools.partial(alone, each, start(each), *args)
        for name, each in one.items()
    }
    return {name: ms / steps for name, ms in _sweep.in_turns(calls).items()}


def title(clip: str, bound: float) -> str:
    """As in a legend."""
    return clip if bound == math.inf else f"{clip} {bound:g}"


def curve(
    rows: Iterable[dict[str, Any]], x: str, y: str
) -> tuple[list[float], list[np.ndarray]]:
    """The places there are of x, and at each y of all seeds."""
    points = sorted(_sweep.groups(rows, (x,)).items())
    values = [np.array([row[y] for row in runs], float) for _, runs in points]
    return [at for (at,), _ in points], values


# An MLP's layers, from the input on.
Params = list[dict[str, jax.Array]]


def make_mlp(key: jax.Array, sizes: Sequence[int]) -> Params:
    """Kernels `[in, out]`, as He et al. draw them, and biases of zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * math.sqrt(2 / a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Leaky ReLU between layers."""
    for layer in params[:-1]:
        x = jax.nn.leaky_relu(x @ layer["w"] + layer["b"], 0.2)
    return x @ params[-1]["w"] + params[-1]["b"]
