"""Coordinates to clip and noise in, from what was released before."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.leaves import times, widen
from clipfx.per_example.clipped_grad import ClippedGrad
from clipfx.per_example.engine import trace
from clipfx.privacy.thresholds import plain


class PrivateScale(NamedTuple):
    r"""A rule from released gradients to scales, for `clipfx.privacy.dp_grad`.

    Attributes:
      init: `init(params) -> state`, a tree of arrays.
      scale: `scale(state, params) -> scales`, in place of each parameter a tuple of
        arrays > 0 of its rank, broadcast to it and multiplied.
      update: `update(state, released) -> state`, from the noised mean, float32 or
        wider, in the parameters' own coordinates. It must not see anything else.

    Reference: none; the shape is that of `clipfx.privacy.PrivateThreshold`.
    """

    init: Callable[[Any], Any]
    scale: Callable[[Any, Any], Any]
    update: Callable[[Any, Any], Any]


@exportable("clipfx.privacy.SecondMomentState")
class SecondMomentState(NamedTuple):
    """State of `second_moment`, computed from what was released.

    Attributes:
      step: int32 scalar, how many gradients there were.
      moments: In place of each parameter a tuple of averages of squares: for each of
        its dimensions one over all others, or one of the parameter's shape.

    Reference: none.
    """

    step: jax.Array
    moments: Any


@helpful
def second_moment(
    decay: float = 0.999, *, eps_root: float, factored: bool = True
) -> PrivateScale:
    r"""Scales by the second moment of released gradients: private Adam.

    With v the average of :math:`\tilde g^2` over steps, corrected as in Adam, and 0
    before the first step,

    .. math:: s = (v + \epsilon)^{-1/2} .

    `factored` keeps averages :math:`v^{(a)}` over all dimensions but a, for every
    dimension a of a parameter, and takes, with :math:`\bar v` their mean,

    .. math:: s = (\bar v + \epsilon)^{-1/2}
        \prod_a \Bigl(\frac{v^{(a)} + \epsilon}{\bar v + \epsilon}\Bigr)^{-1/2} ,

    for matrices the second moment of Adafactor. Norms of gradients that are scaled by a
    product of vectors cost what unscaled ones do, and the state is as small as biases.
    With `factored=False` the gradient of a matrix that is used at several positions is
    materialised.

    Args:
      decay: In [0, 1), Adam's :math:`\beta_2`.
      eps_root: :math:`\epsilon > 0`. The first step has scale
        :math:`\epsilon^{-1/2}`: it is that of `dp_grad` with a threshold of
        :math:`C \epsilon^{1/2}`, and so are later ones where gradients stay below
        :math:`\epsilon^{1/2}`.
      factored: Static.

    Returns:
      A rule for `dp_grad(scale=...)`. Its state is a `SecondMomentState`; a gradient
      that is not finite leaves it as it is.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Example:
      >>> import clipfx, jax, jax.numpy as jnp, optax
      >>> grad = clipfx.privacy.dp_grad(
      ...     lambda w, x: (jnp.vdot(w, x) - 1) ** 2, max_norm=10.0,
      ...     noise_multiplier=1.1, expected_batch_size=2, key=jax.random.key(0),
      ...     scale=clipfx.privacy.second_moment(eps_root=1e-3))
      >>> params, optimizer = jnp.zeros(2), optax.adam(1e-2)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> grads, state, _ = grad(grad.init(params), params, batch, where=None)
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)

    Differs from the source: no second constant outside of the root; :math:`\epsilon` is
    never 0, with which scales of the first step are infinite; factored by default.

    Reference: `On design principles for private adaptive optimizers
    <https://arxiv.org/abs/2507.01129>`_, 2025, scale-then-privatize; Shazeer and Stern,
    `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
    """
    check_number("decay", decay, "[0, 1)", "0.999 is usual")
    check_number("eps_root", eps_root, "(0, inf)", "no scale is above eps_root ** -0.5")

    def averages(x: Any) -> tuple[jax.Array, ...]:
        square = jnp.square(jnp.abs(widen(jnp.asarray(x))))
        if not factored or square.ndim < 2:
            return (square,)
        every = range(square.ndim)
        return tuple(square.mean([d for d in every if d != a]) for a in every)

    def init(params: Any) -> SecondMomentState:
        nothing = lambda x: tuple(jnp.zeros_like(m) for m in averages(x))
        return SecondMomentState(
            jnp.zeros([], jnp.int32), jax.tree.map(nothing, params)
        )

    def scale(state: SecondMomentState, params: Any) -> Any:
        seen = 1 - jnp.power(plain(decay), state.step.astype(jnp.float32))
        seen = jnp.where(state.step > 0, seen, 1)

        def of_leaf(_: Any, moments: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            first, *others = (
                m / seen.astype(m.dtype) + plain(eps_root) for m in moments
            )
            if not others:
                return (first**-0.5,)
            parts = [first, *(m / first.mean() for m in others)]
            along = lambda a: [-1 if d == a else 1 for d in range(len(parts))]
            return tuple(m.reshape(along(a)) ** -0.5 for a, m in enumerate(parts))

        return jax.tree.map(of_leaf, params, state.moments)

    def update(state: SecondMomentState, released: Any) -> SecondMomentState:
        squares = jax.tree.map(averages, released)
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(squares)]
        good = jnp.array(finite).all()
        follow = lambda m, x: jnp.where(good, m + (1 - plain(decay)) * (x - m), m)
        return SecondMomentState(
            jnp.where(good, optax.safe_increment(state.step), state.step),
            jax.tree.map(follow, state.moments, squares),
        )

    return PrivateScale(init, scale, update)


def check_scale(scale: Any) -> None:
    """Checks that it is a rule, or None."""
    if scale is not None and not isinstance(scale, PrivateScale):
        raise TypeError(
            f"scale must be a rule of clipfx.privacy or None, got {scale!r}; "
            "clipfx.privacy.second_moment(...) is one."
        )


def scaled(x: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """An array times real factors that broadcast to it, in its own dtype."""
    for factor in factors:
        x = times(x, jnp.asarray(factor))
    return x


def in_scale(
    clip: ClippedGrad, args: tuple[Any, ...], params: Any, factors: Sequence[Any]
) -> tuple[ClippedGrad, tuple[Any, ...]]:
    """The loss as a function of q where parameters are p + s q, and arguments of q = 0.

    Gradients are those with respect to p times s. The engine sees parameters times
    constants.
    """
    signature = clip.signature
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(p) for p in leaves]
    places = trace.numbers(signature, "argnums", len(args))
    several = not isinstance(signature.argnums, int)

    def put(args: tuple[Any, ...], tree: Any) -> tuple[Any, ...]:
        moved = dict(zip(places, tree if several else [tree], strict=True))
        return tuple(moved.get(k, x) for k, x in enumerate(args))

    def fun(*args: Any, **kwargs: Any) -> Any:
        steps = jax.tree.leaves([args[k] for k in places])
        moved = [
            p + scaled(q, f).astype(p.dtype)
            for p, q, f in zip(leaves, steps, factors, strict=True)
        ]
        return signature.fun(*put(args, treedef.unflatten(moved)), **kwargs)

    zeros = [jnp.zeros_like(widen(p)) for p in leaves]
    moving = dataclasses.replace(clip, signature=signature._replace(fun=fun))
    return moving, put(args, treedef.unflatten(zeros))
