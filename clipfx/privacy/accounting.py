"""The hand-off to dp-accounting: what a run is, and what it costs."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from clipfx._core.checks import check_choice, check_count, check_number, helpful

ACCOUNTANTS = ("pld", "rdp")
MECHANISMS = ("gaussian", "laplace")
ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)  # a few
RELATIONS = ("add_or_remove_one", "replace_one", "replace_special")


@helpful
def event(
    noise_multiplier: float,
    steps: int,
    *,
    sampling_probability: float = 1.0,
    mechanism: str = "gaussian",
) -> Any:
    r"""Describes a run as dp-accounting's event.

    .. math:: \mathrm{steps} \times \mathrm{Poisson}_q(\mathrm{mechanism}(z))

    The multiplier of `clipfx.privacy.dp_grad` is joint: it stands for all that a step
    releases, noised counts of adaptive thresholds included. So the same call describes
    runs with fixed thresholds and runs with adaptive ones.

    Args:
      noise_multiplier: z >= 0, the standard deviation of the noise (its scale, for
        Laplace) over the bound on one example's contribution; 0 is not private.
      steps: How many, >= 1.
      sampling_probability: q in [0, 1]: each example is in each batch with this
        probability, independently of all others. Shuffled batches are not that. 1:
        every step takes all.
      mechanism: `"gaussian"`, or `"laplace"` for `ord=1`.

    Returns:
      A `dp_accounting.DpEvent`, for `epsilon` or any accountant there.

    Raises:
      ImportError: If dp-accounting is not installed.
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range.

    Example:
      >>> run = event(1.1, 1000, sampling_probability=0.01)
      >>> run.count, run.event.event
      (1000, GaussianDpEvent(noise_multiplier=1.1))

    Reference: Mironov et al., `Rényi differential privacy of the sampled Gaussian
    mechanism <https://arxiv.org/abs/1908.10530>`_, 2019.
    """
    dp = _library()
    check_number(
        "noise_multiplier",
        noise_multiplier,
        "[0, inf)",
        "0 is not private",
        static=True,
    )
    steps = check_count("steps", steps, 1, "it is the number of updates")
    check_number(
        "sampling_probability", sampling_probability, "[0, 1]",
        "it is the expected batch size over the number of examples", static=True,
    )  # fmt: skip
    check_choice("mechanism", mechanism, MECHANISMS)
    kinds = {"gaussian": dp.GaussianDpEvent, "laplace": dp.LaplaceDpEvent}
    one = kinds[mechanism](float(noise_multiplier))
    if sampling_probability < 1:
        one = dp.PoissonSampledDpEvent(float(sampling_probability), one)
    return dp.SelfComposedDpEvent(one, steps)


@helpful
def epsilon(
    event: Any,
    delta: float,
    *,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> float:
    r"""Computes what a run costs, the smallest known :math:`\epsilon` for a delta.

    Args:
      event: From `event`, or any `dp_accounting.DpEvent`.
      delta: In (0, 1); well below one over the number of examples.
      accountant: `"pld"`, privacy loss distributions, tight; or `"rdp"`, Rényi
        divergences, an upper bound that most papers report.
      relation: Between neighbouring datasets: `"add_or_remove_one"` example,
        `"replace_one"` by any other, or `"replace_special"`, by one that contributes
        nothing.

    Returns:
      :math:`\epsilon`, `math.inf` without noise.

    Raises:
      ImportError: If dp-accounting is not installed.
      TypeError: If `delta` is no number, or `event` no event.
      ValueError: If an argument is out of range, or the accountant does not know the
        event under the relation.

    Example:
      >>> run = event(1.5, 2250, sampling_probability=0.04)
      >>> f"{epsilon(run, 1e-5):.2f} {epsilon(run, 1e-5, accountant='rdp'):.2f}"
      '6.77 7.33'

    Reference: Koskela et al., `Computing tight differential privacy guarantees using
    FFT <https://arxiv.org/abs/1906.03049>`_, 2020; Mironov, `Rényi differential privacy
    <https://arxiv.org/abs/1702.07476>`_, 2017.
    """
    dp = _library()
    _check_delta(delta)
    make = _accountant(accountant, relation)
    if not isinstance(event, dp.DpEvent):
        raise TypeError(
            f"event must be what a run releases, got {event!r}; make it with "
            "clipfx.privacy.event(noise_multiplier, steps)."
        )
    try:
        return float(make().compose(event).get_epsilon(delta))
    except dp.UnsupportedEventError as error:
        raise ValueError(
            f"event must be known to accountant={accountant!r} under "
            f"relation={relation!r}, got {event!r}; pass another of the two."
        ) from error


@helpful
def noise_multiplier_for(
    epsilon: float,
    delta: float,
    steps: int,
    *,
    sampling_probability: float = 1.0,
    mechanism: str = "gaussian",
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> float:
    r"""Finds the least noise with which a run costs at most :math:`\epsilon`.

    Args:
      epsilon: > 0.
      delta: See `clipfx.privacy.epsilon`.
      steps: See `event`.
      sampling_probability: See `event`, > 0.
      mechanism: See `event`.
      accountant: See `clipfx.privacy.epsilon`.
      relation: See `clipfx.privacy.epsilon`.

    Returns:
      The noise multiplier, enough, and within a ten-thousandth of the least.

    Raises:
      ImportError: If dp-accounting is not installed.
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range, or no multiplier up to a million is
        enough, or the accountant does not know the mechanism under the relation.

    Example:
      >>> z = noise_multiplier_for(8.0, 1e-5, 2250, sampling_probability=0.04)
      >>> f"{z:.4f}"
      '1.3460'

    Reference: see `clipfx.privacy.epsilon`.
    """
    dp = _library()
    check_number("epsilon", epsilon, "(0, inf)", "1 to 10 is usual", static=True)
    _check_delta(delta)
    some = lambda z: event(
        z, steps, sampling_probability=sampling_probability, mechanism=mechanism
    )
    some(1.0)  # checks the rest
    if not sampling_probability:
        raise ValueError(
            "sampling_probability must be > 0 to need noise, got 0; nothing would be "
            "released."
        )
    epsilon, delta, steps = float(epsilon), float(delta), int(steps)
    # Coarse where epsilon is large, still an upper bound: fine grids take minutes.
    interval = 1e-4 * max(1.0, epsilon / 10)
    make, coarse = (_accountant(accountant, relation, k * interval) for k in (1, 10))
    # Each search is ten times as dear as the one before, and begins where that ended.
    searches = [(make, 0.9e-4)]
    if accountant == "pld":
        searches.insert(0, (coarse, 0.9e-4))
    if mechanism == "gaussian":
        searches.insert(0, (lambda: dp.rdp.RdpAccountant(ORDERS), 0.05))
    sure = _surely(epsilon, delta, steps, sampling_probability, mechanism)
    x, slope, most = math.log(sure), None, math.log(2 * sure)
    if 2 * sure > 1e6:
        x, most, searches = math.inf, math.log(1e6), []
    try:
        for make, tol in searches:

            def gap(x: float, make: Any = make) -> float:
                spent = make().compose(some(math.exp(x))).get_epsilon(delta)
                return math.log(spent / epsilon) if spent > 0 else -math.inf

            x, slope = _least(gap, x, slope, tol, most)
    except dp.UnsupportedEventError as error:
        raise ValueError(
            f"mechanism={mechanism!r} must be known to accountant={accountant!r} under "
            f"relation={relation!r}, got one that is not; pass another of these."
        ) from error
    if x > most:
        raise ValueError(
            f"epsilon must be within reach, got {epsilon!r} with delta={delta!r}, "
            f"which a noise multiplier of {math.exp(most):.3g} does not meet; take "
            "fewer steps, a smaller sampling_probability or a larger epsilon."
        )
    return math.exp(x)


def _least(
    gap: Callable[[float], float], x: float, slope: float | None, tol: float,
    most: float,
) -> tuple[float, float | None]:  # fmt: skip
    """Where a falling function of log z has come down to 0, and its slope there.

    Log epsilon is nearly a line in log z: two or three secants are enough. A step goes
    a little beyond the place that the last one points to, and is the last if the slope
    says that it has gone less than `tol` too far.

    Args:
      gap: log(spent / allowed).
      x: Where to begin.
      slope: What it is near there, None if that is not known.
      tol: How far from the least x at most; the result is never below it.
      most: The largest x to look at; if even that is not enough it is infinity.
    """
    low, high, last, near = -math.inf, math.inf, (math.inf, math.inf), slope is not None
    for turn in itertools.count():
        x = min(x, most)
        y = gap(x)
        low, high = (low, x) if y <= 0 else (x, high)
        if math.isfinite(y) and math.isfinite(last[1]):
            slope = min((y - last[1]) / (x - last[0]), -0.5)
            near = abs(x - last[0]) < 0.1
        ahead = -y / (slope or -1.5)  # how far the root is
        if high - low <= tol or low == most or (near and -0.7 * tol <= ahead <= 0):
            return high, slope
        last, root = (x, y), x + max(-1.0, min(ahead, 1.0))
        if high <= root + tol:
            x = high - 0.99 * tol
        elif low >= root - tol:
            x = low + 0.99 * tol
        else:
            x = root + tol / 3
        if not low < x < high or (turn % 4 == 3 and high - low < math.inf):
            x = (low + high) / 2
    raise AssertionError


def _surely(
    epsilon: float, delta: float, steps: int, probability: float, mechanism: str
) -> float:
    """A multiplier that is enough, to start from, for one added or removed example."""
    if mechanism == "laplace":  # pure, each step amplified by its sampling
        return 1 / math.log1p(math.expm1(min(epsilon / steps, 700)) / probability)
    # Zero-concentrated: epsilon = rho + 2 (rho log(1/delta))^(1/2), rho = T / (2 z^2).
    log = -math.log(delta)
    return math.sqrt(steps / 2) / (math.sqrt(log + epsilon) - math.sqrt(log))


def _check_delta(delta: Any) -> None:
    check_number(
        "delta", delta, "(0, 1)", "well below one over the number of examples",
        static=True,
    )  # fmt: skip


def _accountant(accountant: str, relation: str, interval: float = 1e-4) -> Any:
    """Makes fresh accountants; the interval is that of privacy losses."""
    dp = _library()
    check_choice("accountant", accountant, ACCOUNTANTS)
    check_choice("relation", relation, RELATIONS)
    if (accountant, relation) == ("rdp", "replace_one"):
        raise ValueError(
            'accountant must be "pld" for relation="replace_one", got "rdp", which '
            "takes the noise multiplier for that of the doubled sensitivity; or double "
            "the noise yourself."
        )
    known = getattr(dp.NeighboringRelation, relation.upper())
    if accountant == "pld":
        return lambda: dp.pld.PLDAccountant(known, interval)
    return lambda: dp.rdp.RdpAccountant(neighboring_relation=known)


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "clipfx.privacy needs dp-accounting for this, which is not installed; "
            'install it with python -m pip install "clipfx-jax[privacy]".'
        ) from error
    return dp_accounting
