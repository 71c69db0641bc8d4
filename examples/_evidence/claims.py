"""What a claim is, what is measured of it, and how the two are compared."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import diagnose

AGREES, LIMITS, FALSE = "agrees", "holds with limits", "false as stated"


class Check(NamedTuple):
    """Numbers that were measured, one of each seed, and where a claim puts them.

    Attributes:
      label: Which number it is; empty if the row has one alone.
      expected: What the claim says, as text.
      values: What was measured.
      low: The claim is refuted by any value below.
      high: Or above.
    """

    label: str
    expected: str
    values: tuple[float, ...]
    low: float
    high: float

    def holds(self) -> bool:
        """Whether every value, of every seed, is where the claim puts it."""
        return all(self.low <= value <= self.high for value in self.values)


class Row(NamedTuple):
    """A claim, and what was found.

    Attributes:
      claim: A sentence.
      source: The paper that makes it, as a link; empty for common knowledge.
      experiment: What was done.
      expected: By number, what the claim says.
      measured: By number, the mean over seeds; bold where the claim is refuted.
      spread: By number, from the least to the largest of the seeds; empty for one.
      verdict: See `judge`.
    """

    claim: str
    source: str
    experiment: str
    expected: tuple[str, ...]
    measured: tuple[str, ...]
    spread: tuple[str, ...]
    verdict: str


def judge(
    claim: str,
    experiment: str,
    claimed: Sequence[Check],
    beyond: Sequence[Check] = (),
    *,
    source: str = "",
) -> Row:
    """Compares a claim with what was measured.

    It is false as stated if one number of the case that it speaks of is elsewhere than
    it says. It holds with limits if those are right, and one of a case `beyond` is not:
    one that its words leave out, but where it is often used. Else it agrees.
    """
    checks = [*claimed, *beyond]
    verdict = AGREES if all(check.holds() for check in checks) else LIMITS
    if not all(check.holds() for check in claimed):
        verdict = FALSE
    label = lambda check: f"{check.label}: " if check.label else ""
    bold = lambda check: "{}" if check.holds() else "**{}**"
    return Row(
        claim,
        source,
        experiment,
        tuple(label(c) + c.expected for c in checks),
        tuple(bold(c).format(show(float(np.mean(c.values)))) for c in checks),
        tuple(_spread(c.values) for c in checks),
        verdict,
    )


def near(
    values: Any, want: float, tolerance: float = 1e-3, *, label: str = ""
) -> Check:
    """Expects a number, within a relative tolerance (absolute about 0)."""
    room = tolerance * (abs(want) or 1.0)
    return Check(label, show(want), _numbers(values), want - room, want + room)


def at_most(values: Any, bound: float, *, label: str = "") -> Check:
    """Expects no more than a bound, but for rounding in float32."""
    high = bound + 1e-5 * abs(bound)
    return Check(label, f"≤ {show(bound)}", _numbers(values), -math.inf, high)


def at_least(values: Any, bound: float, *, label: str = "") -> Check:
    """Expects no less than a bound, but for rounding in float32."""
    low = bound - 1e-5 * abs(bound)
    return Check(label, f"≥ {show(bound)}", _numbers(values), low, math.inf)


def single(values: Any) -> np.ndarray:
    """A float32 array."""
    return np.asarray(values, np.float32)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, of arrays with one more axis in front."""
    return jax.tree.map(lambda *x: jnp.stack([*map(jnp.asarray, x)]), *trees)


class Clipped(NamedTuple):
    """What a transform made of updates, and `diagnose.clip_effect` of it."""

    updates: Any
    effect: diagnose.ClipEffect


def clipped(
    tx: optax.GradientTransformation, tree: Any, groups: str = "global"
) -> Clipped:
    """Applies the first step of a transform, in one compiled program."""

    @jax.jit
    def apply(tree: Any) -> Clipped:
        new = tx.update(tree, tx.init(tree), tree)[0]
        return Clipped(new, diagnose.clip_effect(tree, new, groups=groups))

    return apply(tree)


def show(value: float) -> str:
    """A number with three digits or so: 9,100, 0.798, 3.2e-15."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else f"{value:+g}".replace("inf", "∞")
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.1e}"


def _spread(values: tuple[float, ...]) -> str:
    if len(values) == 1:
        return ""
    return f"{show(min(values))} to {show(max(values))}, {len(values)} seeds"


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(x) for x in np.asarray(values, np.float64).reshape(-1))
