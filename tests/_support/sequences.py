"""Rules over sequences of norms: clipfx in one scan, the paper in a float64 loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)  # a threshold that clips nothing


class Oracle(NamedTuple):
    """A rule of a paper in NumPy.

    Attributes:
      init: `init(G) -> state`.
      update: `update(norm [G], state) -> (new norm [G], threshold [G], state)`.
    """

    init: Callable[[int], Any]
    update: Callable[[np.ndarray, Any], tuple[np.ndarray, np.ndarray, Any]]


def norms(seed: int, steps: int = 200, groups: int = 2, bad: bool = True) -> np.ndarray:
    """Lognormal norms `[T, G]` with spikes, zeros, a shift of level, NaN and inf."""
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0.0, rng.uniform(0.1, 1.0), (steps, groups))
    values[steps // 2 :] *= 3.0
    at = lambda count: (rng.integers(1, steps, count), rng.integers(groups, size=count))
    values[at(5)] *= 1e3
    values[at(2)] *= 1e12
    values[at(4)] = 0.0
    if bad:
        values[at(2)] = np.nan
        values[at(2)] = np.inf
    return values.astype(np.float32).astype(np.float64)


@functools.cache
def scan_of(tx):
    """All steps in one program, compiled once for all sequences of a shape."""

    def steps(state, trees, extra):
        def step(state, tree):
            out, state = tx.update(tree, state, tree, **extra)
            m = state.metrics
            return state, (out, m.threshold, m.norm, m.nonfinite)

        return jax.lax.scan(step, state, trees)

    return jax.jit(steps)


def run(tx, values: np.ndarray, size: int = 3, **extra: Any):
    """Norms before, norms after and thresholds, `[T, G]` each, and the last state.

    One leaf per group, all of a norm in one direction.
    """
    rng = np.random.default_rng(0)
    units = rng.normal(size=(values.shape[1], size))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    trees = {
        f"leaf{k}": jnp.asarray(values[:, k, None] * units[k], jnp.float32)
        for k in range(values.shape[1])
    }

    first = jax.tree.map(lambda x: x[0], trees)
    scan = scan_of(tx)
    state, (out, limits, seen, nonfinite) = scan(tx.init(first), trees, extra)
    bad = np.diff(nonfinite, axis=0, prepend=0) > 0  # the metrics are finite there
    length = lambda x: np.linalg.norm(np.asarray(x, np.float64), axis=-1)
    after = np.stack([length(x) for x in jax.tree.leaves(out)], axis=-1)
    return (
        np.where(bad, np.nan, seen),
        after,
        np.asarray(limits, np.float64),
        state,
    )


def expect(oracle: Oracle, values: np.ndarray, per_group: bool = True):
    """What the paper gives: a step with a bad norm teaches nothing."""
    if not per_group:
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.linalg.norm(values, axis=1, keepdims=True)
    state, became, limits = oracle.init(values.shape[1]), [], []
    for norm in values:
        finite = np.isfinite(norm)
        with np.errstate(invalid="ignore", divide="ignore"):
            new, limit, learned = oracle.update(norm, state)
        became.append(np.where(finite, new, np.nan))
        limits.append(limit)
        state = learned if finite.all() else state
    return np.array(became), np.array(limits), state


def assert_follows(tx, oracle: Oracle, per_group: bool, rtol=2e-5, seeds=5, **kwargs):
    """Norms after, and thresholds of good steps, equal the paper's."""
    for seed in range(seeds):
        values = norms(seed, **kwargs)
        before, after, limits, _ = run(tx, values)
        want, want_limits, _ = expect(oracle, values, per_group)
        if not per_group:  # the whole is as long as its parts
            after = np.linalg.norm(after, axis=1, keepdims=True)
        np.testing.assert_allclose(after, want, rtol, atol=1e-12)
        good = np.isfinite(before).all(axis=1)
        np.testing.assert_allclose(limits[good], want_limits[good], rtol)
