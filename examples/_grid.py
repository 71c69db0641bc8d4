"""Small networks trained side by side, in one program: what differs are numbers."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
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
    """A run: its variant, a dict for each look at it, and what it ended with."""

    variant: Variant
    rows: list[dict[str, Any]]
    last: Any = None


def variants(
    bounds: Mapping[str, Sequence[float]], rates: Sequence[float], seeds: Iterable[int]
) -> list[Variant]:
    """Every bound of every clip, at every rate, with every seed."""
    kinds = [(clip, bound) for clip, several in bounds.items() for bound in several]
    every = itertools.product(kinds, rates, [*seeds])
    return [Variant(*kind, rate, seed) for kind, rate, seed in every]


def stack(numbers: Sequence[Any]) -> Any:
    """Many `NamedTuple`s of numbers as one of arrays, in JAX's default dtypes."""
    columns = map(np.array, zip(*numbers, strict=True))
    narrow = {"f": np.float32, "i": np.int32}
    return type(numbers[0])(*(x.astype(narrow[x.dtype.kind]) for x in columns))


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
