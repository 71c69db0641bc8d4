"""How gradients grow along a path: through time, and through one layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.checks import check_count, check_function, helpful
from clipfx._core.clip_factors import finite_norms
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, is_counted
from clipfx._core.norms import Norms, group_norms, units
from clipfx._types import Tree


@exportable("clipfx.TimeFlow")
class TimeFlow(NamedTuple):
    r"""The size of the gradient at every step of a recurrence.

    Attributes:
      norm: `[T]`, :math:`n_t = \lVert \partial L / \partial h_t \rVert`.
      log_norm: `[T]`, its natural logarithm, right where the norm itself is no normal
        number; -inf for a norm of 0.
      growth: `[]`, :math:`\lambda`, by which the logarithm grows for each step back.

    Reference: none.
    """

    norm: jax.Array
    log_norm: jax.Array
    growth: jax.Array


@exportable("clipfx.JacobianNorm")
class JacobianNorm(NamedTuple):
    r"""The largest singular value of a Jacobian, and how well it is known.

    Attributes:
      value: `[]`, :math:`\sigma = \lVert J v \rVert`, never above the true one.
      residual: `[]`, :math:`\lVert J^H J v / \sigma^2 - v \rVert`: there is a singular
        value within :math:`\sigma` times this of the value.
      vector: The leaves of x of floating dtype in one list, `[...]` each: v, the
        direction that is lengthened most, of length 1; the next `start`.

    Reference: none.
    """

    value: jax.Array
    residual: jax.Array
    vector: list[jax.Array]


@helpful
def time_flow(grads: Tree) -> TimeFlow:
    r"""Measures gradients by time step, and how fast they grow on the way back.

    The rate is the slope of a straight line through the logarithms, by least squares,
    over the steps whose norm is not 0:

    .. math:: \lambda = -\frac{\sum_t (t - \bar t) \log n_t}{\sum_t (t - \bar t)^2}

    Gradients explode where it is positive and vanish where it is negative, by
    :math:`e^{\lambda}` a step. Over many steps it is the largest Lyapunov exponent of
    the recurrence, with the sign of back-propagation.

    Args:
      grads: Leaves `[T, ...]`: the gradient of the loss by what is added to the state
        at each step, with T >= 2. `recurrent_flow` makes it of a recurrence; in a model
        of your own add zeros `[T, ...]` to the states of its scan and differentiate by
        them.

    Returns:
      `TimeFlow`, float32, or float64 if a leaf is. The norm is over all leaves, in
      units of the loss over the state. The rate is not finite if a norm is not, and NaN
      if fewer than two are not 0.

    Raises:
      ValueError: If there is no leaf of floating dtype, or they have no T >= 2 in
        common.

    Example:
      >>> flow = time_flow(jnp.array([[8.0], [4.0], [2.0], [1.0]]))
      >>> print(flow.norm, f"{flow.growth:.3f}")  # log 2
      [8. 4. 2. 1.] 0.693

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013; Mikhaeil et al., `On the difficulty of
    learning chaotic dynamics with RNNs <https://arxiv.org/abs/2110.07238>`_, 2022.
    """
    leaves = _counted(grads)
    if not leaves:
        raise ValueError(
            "grads must have a leaf of floating dtype, got none; pass the gradients of "
            "the loss by the state, [T, ...]."
        )
    _steps("grads", leaves)
    norms = jax.vmap(_norm)([*map(_compat.lead_whole, leaves)])
    value, scale = norms.value[:, 0], norms.scale[:, 0]
    log = jnp.log(value) - jnp.log(scale)
    used = value != 0
    t = jnp.arange(log.size, dtype=log.dtype)
    t -= jnp.sum(jnp.where(used, t, 0)) / jnp.sum(used).astype(log.dtype)
    t = jnp.where(used, t, 0)
    growth = -jnp.sum(t * jnp.where(used, log, 0)) / jnp.sum(t * t)
    return TimeFlow(finite_norms(norms, log.dtype)[:, 0], log, growth)


@helpful
def recurrent_flow(
    step: Callable[[Tree, Tree], Tree],
    loss: Callable[[Tree], jax.Array],
    state: Tree,
    xs: Tree,
) -> TimeFlow:
    r"""Measures the gradient of a recurrent loss by the state of every time step.

    For :math:`h_t = f(h_{t-1}, x_t)`, t from 1 to T, and the loss
    :math:`L(h_1, \dots, h_T)`,

    .. math:: \frac{\partial L}{\partial h_t} = \nabla_t L +
        \Bigl(\frac{\partial h_{t+1}}{\partial h_t}\Bigr)^{\!\top}
        \frac{\partial L}{\partial h_{t+1}}

    Each is what reaches the state from all later steps, the gradient of L by zeros that
    are added to :math:`h_t`; the last step has the largest t. See `time_flow`.

    Args:
      step: f, from a state and the input of one step to the next state, of the same
        structure, shapes and dtypes.
      loss: L, from all states, leaves `[T, ...]`, to a scalar. Of the last state:
        `lambda h: loss(h[-1])`.
      state: :math:`h_0`, leaves `[...]`. Those of no floating dtype are carried along.
      xs: Inputs, leaves `[T, ...]` with T >= 2; `jnp.zeros(T)` where there are none.

    Returns:
      `TimeFlow`, see `time_flow`.

    Raises:
      TypeError: If `step` or `loss` is no function.
      ValueError: If the loss is no scalar, the state has no leaf of floating dtype, or
        the inputs no T >= 2 in common.

    Example:
      >>> step = lambda h, x: 0.5 * h + x
      >>> flow = recurrent_flow(step, lambda h: h[-1], jnp.float32(0), jnp.ones(4))
      >>> print(flow.norm, f"{flow.growth:.3f}")  # log 0.5
      [0.125 0.25  0.5   1.   ] -0.693

    Reference: see `time_flow`.
    """
    check_function("step", step, "pass one from a state and an input to a state")
    check_function("loss", loss, "pass one of all states, such as lambda h: ...h[-1]")
    leaves, treedef = jax.tree.flatten(state)
    at = [k for k, x in enumerate(leaves) if is_counted(x)]
    if not at:
        raise ValueError(
            "state must have a leaf of floating dtype, got none; pass the state that "
            "the recurrence starts from."
        )
    number = _steps("xs", jax.tree.leaves(xs))

    def body(state: Tree, row: Any) -> tuple[Tree, Tree]:
        x, added = row
        new, outdef = jax.tree.flatten(step(state, x))
        if outdef == treedef:  # else scan says what differs
            for k, zero in zip(at, added, strict=True):
                new[k] = new[k] + zero
        new = outdef.unflatten(new)
        return new, new

    def of(added: list[jax.Array]) -> jax.Array:
        value = loss(jax.lax.scan(body, state, (xs, added))[1])
        if jnp.shape(value):
            raise ValueError(
                f"loss must be a scalar, got shape {jnp.shape(value)}; sum or average "
                "what it is of."
            )
        return value

    likes = [jnp.asarray(leaves[k]) for k in at]
    zeros = [_as_split(jnp.zeros((number, *x.shape), x.dtype), x) for x in likes]
    return time_flow(jax.grad(of)(zeros))


@helpful
def jacobian_norm(
    fun: Callable[[Tree], Tree],
    x: Tree,
    *,
    rounds: int = 30,
    start: list[jax.Array] | None = None,
) -> JacobianNorm:
    r"""Finds the largest singular value of a layer's Jacobian by power iteration.

    With :math:`J = \partial f / \partial x`, as products :math:`J v` and :math:`J^H u`
    alone,

    .. math:: u \leftarrow J v / \lVert J v \rVert, \qquad
        v \leftarrow J^H u / \lVert J^H u \rVert

    It is the most by which the layer can lengthen a change of its input on the way
    forward, and a gradient on the way back. Round r multiplies the share of the second
    singular value by :math:`(\sigma_2 / \sigma_1)^2`.

    Args:
      fun: f, from a tree like `x` to any tree. What is no floating dtype on either side
        is held fixed. It needs a forward derivative, which a `jax.custom_vjp` has not.
      x: Where J is taken, leaves `[...]`.
      rounds: r >= 1, each of one product with J and one with its transpose. Static.
      start: The `vector` of another call, as at the last training step, when few rounds
        suffice. None for a fixed pseudo-random one.

    Returns:
      `JacobianNorm`, float32, or float64 if a leaf is, in units of f over x. Products
      are in the dtypes of x and f. If J is not finite, all of it is NaN.

    Raises:
      TypeError: If `fun` is no function, or `rounds` no static int.
      ValueError: If `rounds` is below 1, `x` or its image have no leaf of floating
        dtype, or `start` other shapes than those of `x`.

    Example:
      >>> w = jnp.array([[0.0, 3.0], [1.0, 0.0]])
      >>> found = jacobian_norm(lambda x: w @ x, jnp.ones(2))
      >>> print(f"{found.value:.4f}")
      3.0000

    Reference: Pennington et al., `Resurrecting the sigmoid in deep learning through
    dynamical isometry <https://arxiv.org/abs/1711.04735>`_, 2017; power iteration as by
    Miyato et al., `Spectral normalization <https://arxiv.org/abs/1802.05957>`_, 2018.
    """
    check_function(
        "fun", fun, "pass one of x alone, such as lambda x: layer(params, x)"
    )
    rounds = check_count("rounds", rounds, 1, "30 is the default")
    leaves, treedef = jax.tree.flatten(x)
    at = [k for k, leaf in enumerate(leaves) if is_counted(leaf)]

    def of(values: list[jax.Array]) -> list[jax.Array]:
        whole = list(leaves)
        for k, value in zip(at, values, strict=True):
            whole[k] = value
        return _counted(fun(treedef.unflatten(whole)))

    primals = [jnp.asarray(leaves[k]) for k in at]
    if start is None:
        keys = jax.random.split(jax.random.key(0), len(primals))
        pairs = zip(keys, primals, strict=True)
        start = [jax.random.normal(key, p.shape, p.dtype) for key, p in pairs]
    if [jnp.shape(v) for v in start] != [p.shape for p in primals]:
        raise ValueError(
            f"start must have shapes {[p.shape for p in primals]}, got "
            f"{[jnp.shape(v) for v in start]}; pass the vector of another call."
        )
    image, push = jax.linearize(of, primals)
    if not primals or not image:
        raise ValueError(
            f"{'fun' if primals else 'x'} must have a leaf of floating dtype, got "
            "none; of integers there is no Jacobian."
        )
    transposed = jax.linear_transpose(push, primals)

    def pull(u: list[jax.Array]) -> list[jax.Array]:
        (back,) = transposed([jnp.conj(x) for x in u])
        return [jnp.conj(x) for x in back]

    def turn(_: Any, v: list[jax.Array]) -> list[jax.Array]:
        u, _ = _unit(push(v))
        new, norm = _unit(pull(u))
        return [
            jnp.where(norm.value[0] == 0, *pair) for pair in zip(v, new, strict=True)
        ]

    pairs = zip(start, primals, strict=True)
    start = [_compat.as_like(jnp.asarray(v).astype(p.dtype), p) for v, p in pairs]
    v, _ = _unit([*map(_as_split, start, primals)])
    v = jax.lax.fori_loop(0, rounds, turn, v)
    u, norm = _unit(push(v))
    near = units(pull(u), _all(v), norm)
    left = _norm([a - b.astype(a.dtype) for a, b in zip(near, v, strict=True)])
    residual = jnp.where(norm.value == 0, 0, finite_norms(left, norm.value.dtype))
    return JacobianNorm(finite_norms(norm, norm.value.dtype)[0], residual[0], v)


def _counted(tree: Tree) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_counted(x)]


def _as_split(new: jax.Array, like: jax.Array) -> jax.Array:
    """The same, each shard's its own where `like` is, inside of `jax.shard_map`."""
    return _compat.vary(new, _compat.varying_axes(like))


def _all(leaves: list[jax.Array]) -> Groups:
    return Groups(("global",), (0,) * len(leaves))


def _norm(leaves: list[jax.Array]) -> Norms:
    return group_norms(leaves, _all(leaves))


def _unit(leaves: list[jax.Array]) -> tuple[list[jax.Array], Norms]:
    """A vector of length one in this direction, in its dtypes, and the length."""
    norm = _norm(leaves)
    new = units(leaves, _all(leaves), norm)
    return [a.astype(x.dtype) for a, x in zip(new, leaves, strict=True)], norm


def _steps(name: str, leaves: list[Any]) -> int:
    """The size of the first dimension, which all have in common."""
    sizes = {jnp.shape(x)[:1] for x in leaves}
    number = next(iter(sizes))[0] if len(sizes) == 1 and all(sizes) else 0
    if number < 2:
        raise ValueError(
            f"{name} must have leaves [T, ...] with one T >= 2, got shapes "
            f"{[jnp.shape(x) for x in leaves]}; put time first."
        )
    return number
