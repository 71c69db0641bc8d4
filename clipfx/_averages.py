"""Thresholds relative to what is usual: for a group, or between the groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import responses
from clipfx._checks import check_number, helpful
from clipfx._clip import clip_by_norm
from clipfx._export import exportable
from clipfx._statistics import (
    LARGEST,
    average,
    hypot,
    increment,
    is_before,
    multiple,
    shares,
    unbiased_weight,
)
from clipfx._tree import divide
from clipfx.thresholds import Threshold

_DECAY = "0.99 remembers about 100 steps"


@exportable("clipfx.adagc.Usual")
class _Usual(NamedTuple):
    """The norm `[G]` that is usual, and the steps seen."""

    count: jax.Array
    norm: jax.Array


@helpful
def adagc(
    max_ratio: Any = 1.04,
    *,
    decay: Any = 0.99,
    warmup_steps: Any = 100,
    max_norm: Any = 1.0,
    groups: Any = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Holds the norm of each tensor near what it was.

    .. math:: c_i = \begin{cases}
        n_i \, c_0 / \lVert g \rVert & \text{in the warm-up} \\
        \lambda \gamma_i & \text{afterwards} \end{cases} \qquad
        \hat n_i = \min(n_i, c_i)

    .. math:: \gamma_i \leftarrow \begin{cases}
        \min(\gamma_i, \hat n_i) & \text{in the warm-up, from infinity} \\
        \beta\gamma_i + (1-\beta)\hat n_i & \text{afterwards} \end{cases}

    so the warm-up clips by the norm of the whole update, and no step is ever longer
    than :math:`\lambda` times the usual one.

    Because :math:`\gamma` learns the clipped norm, noise ratchets it down, far below
    the mean norm. Measured with the defaults on lognormal norms of deviation 0.1, 0.3,
    0.6 and 1.0: 49, 75, 84 and 88% of the steps clipped, to 0.96, 0.75, 0.44 and 0.17
    of the mean norm. With `max_ratio=1.5` and `decay=0.98` it is 0, 7, 24 and 37%.
    Upwards it creeps by at most :math:`1 + (1-\beta)(\lambda-1)` per step, with the
    defaults 1,700 steps to double.

    Args:
      max_ratio: :math:`\lambda`, how far above the usual norm a step may go.
      decay: :math:`\beta`, in [0, 1).
      warmup_steps: Steps of the warm-up, >= 0.
      max_norm: :math:`c_0`, the threshold of the whole update in the warm-up.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: usual norms `[G]`, metrics `[G]`. Updates
      `[...]` keep structure, shapes and dtypes.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> tx = optax.chain(adagc(1.5), optax.adamw(3e-4))

    Differs from the source: a norm of zero teaches nothing, where there it freezes the
    tensor for good; a tensor first seen after the warm-up starts from its first norm.

    Reference: Wang et al., `AdaGC <https://arxiv.org/abs/2502.11034>`_, 2025.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "1.04 is what the paper takes")
    check_number("decay", decay, "[0, 1)", _DECAY)
    check_number("warmup_steps", warmup_steps, "[0, inf)", "100 is the usual number")
    check_number("max_norm", max_norm, "[0, inf]", "math.inf warms up unclipped")

    def init(groups, params):
        unseen = jnp.full(len(groups.names), -1, jnp.float32)  # as no norm is
        return _Usual(jnp.zeros([], jnp.int32), unseen)

    def update(norm, state, **_):
        warming = is_before(state.count, warmup_steps)
        share = multiple(max_norm, shares(jnp.where(jnp.isfinite(norm), norm, 0)))
        unseen = state.norm < 0
        usual = jnp.where(unseen, 0, state.norm)
        limit = jnp.where(unseen, LARGEST, multiple(max_ratio, usual))
        limit = jnp.where(warming, share, limit)
        became = jnp.minimum(norm, limit)
        mean = decay * usual + (1 - decay) * became
        learned = jnp.where(warming, jnp.minimum(usual, became), mean)
        learned = jnp.where(unseen, became, learned)
        learned = jnp.where(norm > 0, learned, state.norm)
        return limit, _Usual(increment(state.count), learned)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def band_by_history(
    low: Any = 0.5,
    high: Any = 2.0,
    *,
    decay: Any = 0.9,
    min_norm: Any = 0.0,
    groups: Any = "layer",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps each layer's norm within a band around its mean; lifts small ones too.

    .. math:: S \leftarrow \beta S + (1-\beta) n, \qquad
        n \leftarrow \begin{cases} U & n > U = high \cdot S \\
        L & n < L = \max(n_{\min}, low \cdot S) \\ n & \text{else} \end{cases}

    S begins at the first norm. It learns the raw norm: a single spike widens the band
    for some :math:`1/(1-\beta)` steps and passes with up to :math:`(1-\beta) high` of
    its length.

    Args:
      low: Lower edge in units of S, a number in [0, 1], or an Optax schedule.
      high: Upper edge in units of S, a number >= 1, or an Optax schedule.
      decay: :math:`\beta`, in [0, 1).
      min_norm: :math:`n_{\min}`, which shorter norms are lifted to.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: means `[G]`, metrics `[G]`, in which the
      threshold is what the norm became. Updates `[...]` keep structure, shapes and
      dtypes; a norm of zero stays zero.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a number is out of range.

    Example:
      >>> wide_then_narrow = optax.linear_schedule(4.0, 1.5, transition_steps=1000)
      >>> tx = optax.chain(band_by_history(high=wide_then_narrow), optax.adam(1e-3))

    Differs from the source: the edges are constants unless schedules are passed; they
    move linearly there. The values of the defaults are ours.

    Reference: `AGGC <https://arxiv.org/abs/2601.11864>`_, 2026.
    """
    if not callable(low):
        check_number("low", low, "[0, 1]", "0 lifts nothing")
    if not callable(high):
        check_number("high", high, "[1, inf]", "math.inf clips nothing")
    check_number("decay", decay, "[0, 1)", _DECAY)
    check_number("min_norm", min_norm, "[0, inf)", "0 sets no lower bound")

    def init(groups, params):
        mean = jnp.zeros(len(groups.names), jnp.float32)
        return _Usual(jnp.zeros([], jnp.int32), mean)

    def update(norm, state, **_):
        count, mean = state
        edge = lambda x: x(count) if callable(x) else x
        mean = jnp.where(mean > 0, average(1 - decay, mean, norm), norm)
        upper = multiple(edge(high), mean)
        lower = jnp.maximum(edge(low) * mean, min_norm)
        became = jnp.where(norm > upper, upper, jnp.maximum(norm, lower))
        return became, _Usual(increment(count), mean)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=responses.normalize,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@exportable("clipfx.norm_stabilizer.Spread")
class _Spread(NamedTuple):
    """Mean and root mean square `[G]` of the norms, bias corrected."""

    count: jax.Array
    mean: jax.Array
    rms: jax.Array


@helpful
def norm_stabilizer(
    mean_decay: Any = 0.7,
    square_decay: Any = 0.9,
    *,
    groups: Any = "leaf",
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each tensor a norm near 1, longer where the norms have been steady.

    .. math:: a \leftarrow \gamma_1 a + (1-\gamma_1) n, \qquad
        b \leftarrow \gamma_2 b + (1-\gamma_2) n^2, \qquad
        g \leftarrow \frac{g}{n} \cdot
        \frac{a/(1-\gamma_1^t)}{\sqrt{b/(1-\gamma_2^t)}}

    The result does not depend on the scale of the gradient: the learning rate carries
    all of it. One half of Stable-SPAM; the other is `clipfx.clip_spikes`, in front.

    Args:
      mean_decay: :math:`\gamma_1`, in [0, 1).
      square_decay: :math:`\gamma_2`, in [0, 1).
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`: two statistics `[G]`, metrics `[G]`, in which
      the threshold is what the norm became. Updates `[...]` keep structure, shapes and
      dtypes; a norm of zero stays zero.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a decay is outside [0, 1).

    Example:
      >>> import clipfx
      >>> tx = optax.chain(clipfx.clip_spikes(), norm_stabilizer(), optax.adam(1e-3))

    Differs from the source: the count of the bias correction is its own, and never
    restarts with the moments of Adam; nothing is added to the denominator.

    Reference: Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025.
    """
    check_number("mean_decay", mean_decay, "[0, 1)", "0.7 is what the paper takes")
    check_number("square_decay", square_decay, "[0, 1)", "0.9 is what the paper takes")

    def init(groups, params):
        zeros = [jnp.zeros(len(groups.names), jnp.float32) for _ in range(2)]
        return _Spread(jnp.zeros([], jnp.int32), *zeros)

    def update(norm, state, **_):
        count = increment(state.count)
        weight = unbiased_weight(mean_decay, count)
        mean = average(weight, state.mean, norm)
        weight = unbiased_weight(square_decay, count)
        rms = hypot(jnp.sqrt(1 - weight) * state.rms, jnp.sqrt(weight) * norm)
        became = divide(mean, jnp.where(rms > 0, rms, 1))
        return became, _Spread(count, mean, rms)

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        response=responses.normalize,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )


@helpful
def clip_group_ratio(
    max_ratio: Any,
    *,
    groups: Any,
    reference: str | None = None,
    axis_name: Any = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps every group's norm within a multiple of the median group's.

    .. math:: g_k \leftarrow g_k \min\Bigl(1, \rho\,
        \frac{\operatorname{median}_j \lVert g_j \rVert}{\lVert g_k \rVert}\Bigr)

    or of one named group's norm. Groups whose norm is zero or not finite have no say
    in the median. A gradient multiplied by a constant is clipped alike.

    Args:
      max_ratio: :math:`\rho` >= 0.
      groups: Between which groups to balance: `"layer"`, `"leaf"` or a tree prefix of
        labels. See `clipfx.clip_by_norm`. Static.
      reference: Name of a group to measure the others by, which is never clipped
        itself; None for the median. If its norm is zero or not finite, nothing is
        clipped. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.
      nonfinite: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `clipfx.ClipState`; its metrics are `[G]`. Updates `[...]` keep
      structure, shapes and dtypes.

    Raises:
      TypeError: If `max_ratio` is not a number.
      ValueError: If it is negative, or `reference` is not a group.

    Example:
      >>> tx = clip_group_ratio(2.0, groups="leaf", reference="decoder")
      >>> grads = {"encoder": jnp.array([3.0, 4.0]), "decoder": jnp.ones(1)}
      >>> clipped, _ = tx.update(grads, tx.init(grads))
      >>> clipped["encoder"]
      Array([1.2, 1.6], dtype=float32)

    Reference: none.
    """
    check_number("max_ratio", max_ratio, "[0, inf]", "math.inf clips nothing")

    def init(groups, params):
        if reference is not None and groups.names and reference not in groups.names:
            raise ValueError(
                f"reference must be the name of a group, got {reference!r}; the groups "
                f"are {groups.names}."
            )
        return ()

    def update(norm, state, *, groups, **_):
        if not groups.names:
            return norm, state
        usable = jnp.isfinite(norm) & (norm > 0)
        if reference is None:
            ordered = jnp.sort(jnp.where(usable, norm, LARGEST))
            number = jnp.sum(usable, dtype=jnp.int32)
            middle = ordered[jnp.maximum(number - 1, 0) // 2], ordered[number // 2]
            usual = middle[0] / 2 + middle[1] / 2
            limit = jnp.where(number > 0, multiple(max_ratio, usual), LARGEST)
            return limit, state
        at = groups.names.index(reference)
        usual = jnp.where(usable[at], norm[at], 0)
        limit = jnp.where(usable[at], multiple(max_ratio, usual), LARGEST)
        return jnp.where(jnp.arange(norm.size) == at, LARGEST, limit), state

    return clip_by_norm(
        Threshold(init, update),
        groups=groups,
        axis_name=axis_name,
        nonfinite=nonfinite,
    )
