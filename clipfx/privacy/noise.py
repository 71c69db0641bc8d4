"""Noise for sums of bounded gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat
from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.groups import is_counted
from clipfx._core.leaves import times, widen
from clipfx._core.reductions import device_of_programs, on_one_cpu
from clipfx._types import AxisName
from clipfx.privacy.draws import draws, gaussian, laplace


class Secret:
    """A key that is not shown, copied or written; `reveal()` returns it."""

    __slots__ = ("reveal",)

    def __init__(self, key: Any):
        key = as_key(key)
        self.reveal = lambda: key

    def __repr__(self) -> str:
        return "<secret key>"

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: Any) -> "Secret":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "what holds a secret key must not be pickled, got an attempt to; write its "
            "settings and its state, and make it again with the key."
        )


@exportable("clipfx.privacy.NoiseState")
class NoiseState(NamedTuple):
    """State of the noise transforms.

    Attributes:
      step: int32 scalar, how many draws there were. The key is not part of the state:
        who has a published checkpoint could take the noise off again.

    Reference: none.
    """

    step: jax.Array


@helpful
def add_gaussian_noise(
    stddev: float | optax.Schedule, key: jax.Array, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\mathcal N(0, \sigma^2)` to every coordinate.

    .. math:: g \leftarrow g + \sigma z, \quad z_i \sim \mathcal N(0, 1)

    Leaf i of step t draws with key and counter (t, i) alone: the same numbers whether
    the updates are on one device or split over a mesh, and after a resume those that
    the undisturbed run would have drawn. Drawn in float32, for float64 leaves in
    float64, and added there, whatever the dtype of the leaf.

    Up to rounding :math:`z = \Phi^{-1}(u)`, with u the middle of one of :math:`2^{63}`
    cells, which Threefry-2x32 chooses: :math:`|z| \le 9.08`, and a normal variable is
    farther out with probability :math:`2^{-63} = 1.1 \cdot 10^{-19}`. That such numbers
    are never drawn adds at most :math:`(1 + e^\epsilon)\, n T\, 2^{-63}` to the
    :math:`\delta` of T steps with n coordinates.

    It is the noise of clipped *sums*: divide afterwards. Add it once per logical batch,
    *inside* of `optax.MultiSteps(..., use_grad_mean=False)`. By default MultiSteps
    passes on the mean over k microbatches, for which noise of a sum is k times too
    large.

    Args:
      stddev: :math:`\sigma` >= 0, or an Optax schedule.
      key: From `jax.random.key`, of a seed that nobody can guess, for this alone: two
        transforms, runs or `dp_grad` of one key draw the same noise, which anybody
        can subtract. It may be of any implementation; all draw alike. Nothing prints
        it, and what holds it cannot be pickled. Under `optax.inject_hyperparams` pass
        `static_args="key"`, or the state holds it.
      axis_name: Mesh axes that *all* updates are split over, for `pmap` and
        `shard_map(check_vma=False)`: each part draws its own noise. Under `jit`, and
        in `shard_map`, which knows what varies, this happens by itself; in `shard_map`
        the numbers then depend on the mesh. Static.

    Returns:
      A transform with `NoiseState`. Structure, shapes `[...]` and dtypes stay. Leaves
      that are not floating pass through.

    Raises:
      TypeError: If `stddev` is no number, or `key` no key.
      ValueError: If `stddev` is negative or not finite; at updates, if a leaf has more
        than 2^32 elements, unless dimensions fall into two groups of at most that.

    Example:
      >>> import clipfx, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     clipfx.privacy.add_gaussian_noise(1.1, jax.random.key(0)),
      ...     optax.scale(1 / 256), optax.sgd(0.1))
      >>> params = {"w": jnp.zeros(3)}
      >>> updates, state = tx.update(params, tx.init(params), params)

    Differs from the source: floating-point numbers are not real numbers. Draws end, and
    low bits can tell something about what was added to; see the page on what is
    promised.

    Reference: Abadi et al., `Deep learning with differential privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016; Salmon et al., `Parallel random numbers:
    as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    return _transform("stddev", stddev, gaussian, key, axis_name)


@helpful
def add_laplace_noise(
    scale: float | optax.Schedule, key: jax.Array, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Laplace noise of scale b to every coordinate.

    .. math:: g \leftarrow g + b z, \quad p(z_i) = e^{-|z_i|} / 2

    The standard deviation is :math:`b \sqrt 2`. With b the sensitivity of a sum in the
    1-norm over :math:`\epsilon`, see `clipped_grad(..., ord=1)`, a step is
    :math:`\epsilon`-differentially private. The noise grows with the square root of
    the number of parameters, a bound on the 1-norm is spent on all of them: for models
    of some hundred parameters.

    Args:
      scale: b >= 0, or an Optax schedule.
      key: See `add_gaussian_noise`.
      axis_name: See `add_gaussian_noise`. Static.

    Returns:
      A transform with `NoiseState`. Structure, shapes `[...]` and dtypes stay. Leaves
      that are not floating pass through.

    Raises:
      TypeError: If `scale` is no number, or `key` no key.
      ValueError: If `scale` is negative or not finite; see `add_gaussian_noise`.

    Example:
      >>> import clipfx, jax, optax
      >>> tx = optax.chain(
      ...     clipfx.privacy.add_laplace_noise(2.0, jax.random.key(0)),
      ...     optax.scale(1 / 256), optax.sgd(0.1))

    Differs from the source: see `add_gaussian_noise`; draws end at 43.67 scales, beyond
    which there would be one with probability :math:`2^{-63}`.

    Reference: Dwork et al., `Calibrating noise to sensitivity in private data analysis
    <https://doi.org/10.1007/11681878_14>`_, 2006.
    """
    return _transform("scale", scale, laplace, key, axis_name)


def _transform(
    name: str, size: Any, inverse: Callable, key: Any, axis_name: Any
) -> optax.GradientTransformationExtraArgs:
    secret = Secret(key)
    if not callable(size):
        check_number(name, size, "[0, inf)", "0 adds nothing")

    def init(params: Any) -> NoiseState:
        del params
        return NoiseState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NoiseState]:
        del params, extra_args
        now = size(state.step) if callable(size) else size
        leaves, treedef = jax.tree.flatten(updates)
        sizes = [now] * len(leaves)
        key = key_of_step(secret.reveal(), state.step)
        noised = add(inverse, leaves, sizes, key, axis_name)
        step = jnp.asarray(optax.safe_increment(state.step))
        return treedef.unflatten(noised), NoiseState(step)

    return optax.GradientTransformationExtraArgs(init, update)


def add(
    inverse: Callable, leaves: Sequence[Any], sizes: Sequence[Any], key: Any, axes: Any
) -> list[Any]:
    """Adds to every floating leaf noise of its size.

    Args:
      inverse: `gaussian` or `laplace`.
      leaves: `[...]`.
      sizes: One per leaf.
      key: Of the step.
      axes: Mesh axes that leaves are split over, besides those they vary over.
    """

    @functools.cache
    def words(axes: tuple[str, ...]) -> jax.Array:
        """For real and imaginary parts of all leaves at once, `[leaves, 2, 2]`."""
        own = jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key
        return jax.random.bits(own, (len(leaves), 2, 2), jnp.uint32)

    noised = []
    for i, (x, size) in enumerate(zip(leaves, sizes, strict=True)):
        if not is_counted(x):
            noised.append(x)
            continue
        x, size = jnp.asarray(x), jnp.asarray(size)
        to = lambda x, size, words: x + times(_like(inverse, x, words), size)
        total = _in_one(to, widen(x), size, words(_split_over(x, axes))[i])
        noised.append(total.astype(x.dtype))
    return noised


def _in_one(
    to: Callable[..., jax.Array], x: jax.Array, size: jax.Array, words: jax.Array
) -> jax.Array:
    """Calls what draws, so that it is compiled once for all who use the result.

    It is elementwise: the compiler would draw again for each of them, or store parts.
    """

    def in_branch(x: jax.Array, size: jax.Array, words: jax.Array) -> jax.Array:
        # Barriers are gone early on a CPU. It is always taken, which no compiler knows.
        taken = (words[0, 0] | 1) > 0
        return jax.lax.cond(taken, to, lambda x, *_: x, x, size, words)

    before = lambda *args: jax.lax.optimization_barrier(to(*args))
    return on_one_cpu(in_branch, before, device_of_programs(), x, size, words)


def as_key(key: Any) -> jax.Array:
    """A typed key from any that `jax.random` makes."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    raw = getattr(key, "dtype", None) == jnp.uint32 and jnp.ndim(key) == 1
    if not (typed and key.ndim == 0) and not raw:
        kind = getattr(key, "dtype", type(key).__name__)
        raise TypeError(
            f"key must be one key of jax.random, got {kind}{list(jnp.shape(key))}; "
            "make it with jax.random.key(seed)."
        )
    return key if typed else jax.random.wrap_key_data(key)


def key_of_step(key: jax.Array, step: jax.Array) -> jax.Array:
    """Differs from step to step."""
    return jax.random.fold_in(key, step)


def _like(inverse: Callable, x: jax.Array, words: jax.Array) -> jax.Array:
    """Noise of the shape, dtype and sharding of x."""
    if jnp.iscomplexobj(x):
        parts = zip((x.real, x.imag), words[:, None], strict=True)
        return jax.lax.complex(*(_like(inverse, part, two) for part, two in parts))
    explicit = _compat.explicit_spec(x) is not None
    sharding = jax.typeof(x).sharding if explicit else None
    return draws(inverse, words[0], x.shape, x.dtype, sharding)


def _split_over(x: jax.Array, axes: Any) -> tuple[str, ...]:
    """The mesh axes over which parts of a leaf get noise of their own."""
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return tuple(sorted(_compat.varying_axes(x) | set(axes)))
