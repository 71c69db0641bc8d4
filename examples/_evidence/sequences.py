"""Clients of a server, and tasks one after the other."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipfx
from examples._evidence.claims import Row, at_most, judge, near, single

TITLE = "Many clients, and one task after another"
NOTE = """\
What error feedback keeps of a message is sent later only if a client asks for less than
the threshold on the average: it undoes the clipping of seldom messages, not that of a
client who differs in every round. A clip by the global norm changes how far a step goes
and not where to: at the same loss of the second task it has forgotten as much of the
first as a training without a clip, only later."""

UCLIP = "[Elesedy and Hutter, 2023](https://arxiv.org/abs/2302.02971)"


def averaged(max_norm: float, every: int, feedback: bool) -> float:
    """Where federated averaging ends, on the mean over its last rounds.

    Nine clients want 0 and ask for it in each round, one wants 1 and asks for it in one
    round of `every`, for that many times as much: without a clip the mean is 0.1.
    """
    clip = clipfx.clip_by_global_norm(max_norm)
    tx = clipfx.error_feedback(clip, max_ratio=math.inf) if feedback else clip
    goals = single([0.0] * 9 + [1.0])

    @jax.jit
    def run():
        def step(carry, turn):
            w, states = carry
            asked = goals - w
            seldom = jnp.where(turn % every == 0, every * asked[-1], 0.0)
            sent, states = jax.vmap(tx.update)(asked.at[-1].set(seldom), states)
            return (w + 0.05 * jnp.mean(jnp.asarray(sent)), states), w

        start = (jnp.zeros(()), jax.vmap(tx.init)(goals))
        return jax.lax.scan(step, start, jnp.arange(4000))[1]

    return float(np.mean(run()[-1000:]))


def feedback() -> Row:
    """One client in ten differs, now and then, or always."""
    return judge(
        "Error feedback removes the bias of clipping what clients send.",
        "Nine clients want w = 0, one wants 1, the mean is 0.1; where averaging ends: "
        "the one asks in one round of ten, for ten times as much, c = 1, clipped, and "
        "with feedback; and with it where the one asks in every round, c = ½.",
        [at_most(averaged(1.0, 10, False), 0.05, label="clip"),
         near(averaged(1.0, 10, True), 0.1, 0.05, label="feedback")],
        [near(averaged(0.5, 1, True), 0.1, 0.05, label="every round")],
        source=UCLIP,
    )  # fmt: skip


class Path(NamedTuple):
    """Losses `[seeds, steps]` along the way to a second task."""

    first: np.ndarray
    second: np.ndarray


@functools.cache
def path(max_norm: float, seeds: int = 3, steps: int = 4000) -> Path:
    """Linear regression on a task, from the solution of another."""

    def run(key):
        a, b, draw = jax.random.split(key, 3)
        goals = jax.random.normal(a, (16,)), jax.random.normal(b, (16,))
        tx = optax.chain(clipfx.clip_by_global_norm(max_norm), optax.sgd(0.01))
        distance = lambda w, goal: jnp.mean((w - goal) ** 2) / 2

        def step(carry, key):
            w, state = carry
            x = jax.random.normal(key, (64, 16))
            loss = lambda w: jnp.mean((x @ (w - goals[1])) ** 2) / 2
            update, state = tx.update(jax.grad(loss)(w), state)
            losses = distance(w, goals[0]), distance(w, goals[1])
            return (w + update, state), losses

        start = goals[0], tx.init(goals[0])
        return jax.lax.scan(step, start, jax.random.split(draw, steps))[1]

    keys = jax.vmap(jax.random.key)(np.arange(seeds))
    return Path(*map(np.asarray, jax.jit(jax.vmap(run))(keys)))


def forgetting() -> Row:
    """After as many steps, and at the same loss of the second task."""
    free, clipped = path(math.inf), path(1.0)

    def forgotten(way: Path) -> np.ndarray:
        """Loss of the first task where that of the second is a tenth of its start."""
        at = (way.second < 0.1 * way.second[:, :1]).argmax(1)
        return way.first[np.arange(len(at)), at]

    return judge(
        "A clip keeps what was learned before.",
        "Linear regression in 16 dimensions, from the solution of one task to another, "
        "c = 1: loss of the first over that without a clip, after 100 steps; and "
        "where the loss of the second is a tenth of what it was.",
        [at_most(clipped.first[:, 100] / free.first[:, 100], 0.5, label="100 steps")],
        [at_most(forgotten(clipped) / forgotten(free), 0.8, label="a tenth")],
    )


CLAIMS = [feedback, forgetting]
