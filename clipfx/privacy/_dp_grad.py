"""Bounded, summed, noised, divided: one step of differentially private training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat, responses
from clipfx._checks import check_choice, check_number, is_known
from clipfx._tree import Groups, group_leaves
from clipfx.per_example._batch import mask_of, params_of, size_of
from clipfx.per_example._bounded import PerExample
from clipfx.per_example._grad import ClippedGrad, check_bounded, clipped_grad
from clipfx.per_example._groups import membership
from clipfx.per_example._limits import limits
from clipfx.per_example._tape import over
from clipfx.privacy import _accounting, _noise
from clipfx.privacy._rules import PrivateThreshold, check_finite, fixed

COUNTS = 2**32 - 1  # of the keys of a step, which leaves number from 0, that of counts


class DPState(NamedTuple):
    """State of `dp_grad`; nothing in it is secret, all of it is released.

    Attributes:
      step: int32 scalar, how many steps there were.
      rule: What the threshold's rule needs for the next step.
      threshold: float32 `[G]`, of the last step, the largest of all populations.
      stddev: float32 `[G]`, of the last step's noise on the sum, for Laplace its scale.
      counts: float32 `[Q]`, the noised counts of the last step.

    Reference: none.
    """

    step: jax.Array
    rule: Any
    threshold: jax.Array
    stddev: jax.Array
    counts: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class DPGrad:
    """The function that `dp_grad` returns.

    Attributes:
      clipped: What bounds and sums.
      rule: The threshold.
      noise_multiplier: z, joint for gradient and counts: what accounting needs.
      expected_batch_size: What sums are divided by.
      key: Of all draws.
      allocation: How noise is divided between groups.

    Reference: none.
    """

    clipped: ClippedGrad
    rule: PrivateThreshold
    noise_multiplier: float
    expected_batch_size: float
    key: jax.Array
    allocation: str

    __name__ = "dp_grad"  # of the compiled function

    def init(self, params: Any) -> DPState:
        """Returns the state before the first step.

        Args:
          params: As the loss gets them; with several `argnums` a tuple.
        """
        members = group_leaves(self.clipped.groups, params)
        start, count = self._start(members), len(members.names)
        self.gradient_noise_multiplier(count)
        rule = self.rule.init(start)
        answers = jax.eval_shape(
            self.rule.ask,
            rule,
            jax.ShapeDtypeStruct((1, count), jnp.float32),
            jax.ShapeDtypeStruct((1, self.rule.num_groups or 1), jnp.float32),
        )
        return DPState(
            step=jnp.zeros([], jnp.int32),
            rule=jax.tree.map(jnp.copy, rule),
            threshold=jnp.copy(start),
            stddev=jnp.zeros(count, jnp.float32),
            counts=jnp.zeros(answers.shape[1], jnp.float32),
        )

    def _start(self, members: Groups) -> jax.Array:
        """`max_norm` as `[G]`."""
        return limits(self.rule.max_norm, members, -1)[0].astype(jnp.float32)

    @property
    def noisy(self) -> bool:
        """Whether there may be noise."""
        return not is_known(self.noise_multiplier) or self.noise_multiplier > 0

    def gradient_noise_multiplier(self, groups: int = 1) -> Any:
        """The multiplier of the gradient's own noise, larger than the joint one.

        Args:
          groups: G, how many groups of leaves there are.

        Raises:
          ValueError: If counts alone release more than the joint multiplier allows;
            NaN, if that is traced.
        """
        z, reach = self.noise_multiplier, self.rule.reach(groups)
        if not self.noisy or not reach:
            return z
        rest = z**-2 - (reach / self.rule.count_stddev) ** 2
        if is_known(rest) and rest <= 0:
            raise ValueError(
                f"count_stddev must be above {z * reach:.6g} for "
                f"noise_multiplier={z!r} and {groups} group(s), got "
                f"{self.rule.count_stddev!r}; the counts alone would release more than "
                "that allows."
            )
        return rest**-0.5

    def sensitivity(self, state: DPState, relation: str = "add_or_remove_one") -> float:
        """How far the sum of the last step could move between neighbouring batches.

        Args:
          state: That the step returned.
          relation: See `clipfx.per_example.ClippedGrad.sensitivity`.
        """
        return self.clipped.sensitivity(relation, max_norm=state.threshold)

    def event(self, steps: int, *, sampling_probability: float = 1.0) -> Any:
        """What a run of steps releases, as `clipfx.privacy.event` says it.

        Args:
          steps: How many.
          sampling_probability: Of each example, in each batch.
        """
        return _accounting.event(
            self.noise_multiplier,
            steps,
            sampling_probability=sampling_probability,
            mechanism="laplace" if self.clipped.ord == 1 else "gaussian",
        )

    def __call__(
        self,
        state: DPState,
        *args: Any,
        where: Any = None,
        population: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, DPState, PerExample]:
        """Returns the noised mean, the next state, and what must stay secret.

        Args:
          state: From `init` or the last call.
          *args: Of the loss, with a batch in place of an example.
          where: bool `[B]`, False for padding, which contributes exactly nothing.
          population: Integers `[B]`, for a rule that distinguishes populations.
          **kwargs: Of the loss, the same for every example.
        """
        if not isinstance(state, DPState):
            raise TypeError(
                f"state must be a DPState, got {type(state).__name__}; it comes first, "
                "from grad.init(params) or the last call."
            )
        rule, signature = self.rule, self.clipped.signature
        params = params_of(signature, args)
        members = group_leaves(self.clipped.groups, params)
        size = size_of(signature, args)
        keep = mask_of(where, size)
        member = self._member(population, size)
        if member is not None:
            known = member.sum(1) > 0
            keep = known if keep is None else keep & known
        key = _noise.key_of_step(self.key, state.step)

        def counts(norm: jax.Array, keep: Any) -> jax.Array:
            return self._counts(state.rule, norm, member, keep, key)

        def of_examples(table: jax.Array) -> jax.Array:
            if member is None:
                return table
            return (member[:, :, None] * table[None]).sum(1)

        start, clip = self._start(members), self.clipped
        if rule.response is not None:
            clip = dataclasses.replace(clip, response=rule.response(state.rule))
        limit: Any
        if rule.at_once:
            limit = lambda norm, keep: of_examples(
                rule.limit(start, state.rule, counts(norm, keep))
            )
        else:
            limit = of_examples(rule.limit(start, state.rule, state.counts))
        sums, info = clip(*args, where=keep, max_norm=limit, **kwargs)

        noised = counts(info.norm, keep)
        bound = rule.limit(start, state.rule, noised).max(0)
        stddev = self._stddev(bound)
        new = DPState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            rule=rule.update(state.rule, noised, self.expected_batch_size),
            threshold=bound.astype(jnp.float32),
            stddev=stddev.astype(jnp.float32),
            counts=noised.astype(jnp.float32),
        )
        return self._noised(sums, params, members, stddev, key), new, info

    def _member(self, population: Any, size: int) -> Any:
        count = self.rule.num_groups
        if (population is None) != (count is None):
            needed = "be passed with" if population is None else "not be passed without"
            raise TypeError(
                f"population must {needed} a rule that distinguishes populations, got "
                f"{population!r}; clipfx.privacy.dpsgd_f is one."
            )
        return None if count is None else membership(
            population, count, size, "population")  # fmt: skip

    def _counts(
        self, state: Any, norm: jax.Array, member: Any, keep: Any, key: jax.Array
    ) -> jax.Array:
        """Noised answers `[Q]`, added up over all devices."""
        good = jnp.isfinite(norm).all(1)
        good = good if keep is None else good & keep
        answers = self.rule.ask(state, norm, member)
        total = jnp.where(good[:, None], answers, 0).sum(0)
        total = over(total, _compat.varying_axes(total))
        if self.clipped.axis_name is not None:
            total = jax.lax.psum(total, self.clipped.axis_name)
        if not self.noisy:
            return total
        key = jax.random.fold_in(key, COUNTS)
        noise = _noise.gaussian(key, total.shape, total.dtype)
        return total + self.rule.count_stddev * noise

    def _stddev(self, bound: jax.Array) -> jax.Array:
        """Of the noise on the sum, or its scale, by group `[G]`."""
        p, groups = self.clipped.ord, bound.shape[0]
        if not self.noisy:  # also for infinite bounds
            return jnp.zeros_like(bound)
        z = self.gradient_noise_multiplier(groups)
        if self.allocation == "equal_budget":
            return z * groups ** (1 / p) * bound
        return jnp.broadcast_to(z * jnp.linalg.norm(bound, p), bound.shape)

    def _noised(
        self, sums: Any, params: Any, members: Groups, stddev: jax.Array, key: Any
    ) -> Any:
        draw = _noise.laplace if self.clipped.ord == 1 else _noise.gaussian
        leaves, treedef = jax.tree.flatten(sums)
        if self.noisy:
            sizes = [stddev[i] for i in members.index if i is not None]
            leaves = _noise.add(draw, leaves, sizes, key, None)
        mean = [x / self.expected_batch_size for x in leaves]
        # What is released may be rounded.
        like = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        return treedef.unflatten(
            [x.astype(dtype) for x, dtype in zip(mean, like, strict=True)]
        )


def dp_grad(
    fun: Callable,
    *,
    max_norm: Any,
    noise_multiplier: float,
    expected_batch_size: float,
    key: jax.Array,
    ord: int = 2,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    groups: Any = "global",
    response: responses.Response = responses.hard,
    allocation: str = "global",
    microbatch_size: int | None = None,
    axis_name: Any = None,
) -> DPGrad:
    r"""Makes the gradient of differentially private training, DP-SGD in one call.

    With the bounded gradients :math:`\bar g_i` of `clipfx.per_example.clipped_grad`,
    thresholds :math:`C_k` of G groups, :math:`S = (\sum_k C_k^p)^{1/p}` and m the
    expected batch size,

    .. math:: \frac1m \Bigl(\sum_i \bar g_i + \mathcal N(0, z^2 S^2)\Bigr) ,

    or Laplace noise of scale z S for p = 1. Noise is drawn once per call, in float32,
    equal for one device and many. The sum is divided by the *expected* batch size, a
    public number, whatever came; a batch without examples is a step of noise alone.

    `grad.event(steps, sampling_probability=q)` is what a run releases, for
    `clipfx.privacy.epsilon`, if batches are drawn by Poisson sampling and padded with
    `where=`. Read "What is promised and what is not" first.

    Args:
      fun: `fun(params, example, ...)` returns the loss of one example, a scalar.
      max_norm: C: a number >= 0, `[G]`, a dict by group name, or a rule that adapts it:
        `quantile`, `dpsgd_f`, `dpsgd_global`, `dpsgd_global_adapt`.
      noise_multiplier: z >= 0 of the whole step; with a rule, counts and gradient share
        it. 0 adds no noise, to see what clipping alone does. May be traced, to compile
        once for several.
      expected_batch_size: m > 0: the sampling probability times the number of examples.
      key: See `add_gaussian_noise`.
      ord: p, 2 with Gaussian or 1 with Laplace noise. Static.
      argnums: See `clipfx.per_example.clipped_grad`. Static.
      batch_argnums: See `clipfx.per_example.clipped_grad`. Static.
      has_aux: See `clipfx.per_example.clipped_grad`. Static.
      groups: Which leaves share a norm, see `clipfx.clip_by_norm`. Static.
      response: A bounded response: `responses.hard`, `auto_s()`, `psac()`, ... Static.
      allocation: Between groups: `"global"`, the same noise everywhere, or
        `"equal_budget"`, :math:`z G^{1/p} C_k` for group k, less where thresholds are
        small. Both cost the same. Static.
      microbatch_size: How many examples at a time, by a scan; None takes all. Static.
      axis_name: Mesh axes that batches are split over, for `pmap` and
        `shard_map(check_vma=False)`; elsewhere this happens by itself. Static.

    Returns:
      A function `grad(state, *args, where=None, population=None)` of the state, from
      `grad.init(params)`, and the arguments of the loss, batches in place of examples.
      It returns the noised mean, with the structure and dtypes of the parameters; the
      next `DPState`; and `clipfx.per_example.PerExample`, losses and norms, which are
      *not private*.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range, the response has no bound, the
        threshold is infinite, or a rule's counts use up the noise multiplier; besides,
        see `clipfx.per_example.clipped_grad`.

    Example:
      >>> import clipfx, jax, jax.numpy as jnp
      >>> loss = lambda w, x: (jnp.vdot(w, x) - 1) ** 2
      >>> grad = clipfx.privacy.dp_grad(
      ...     loss, max_norm=1.0, noise_multiplier=1.1, expected_batch_size=2,
      ...     key=jax.random.key(0))
      >>> params, batch = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> grads, state, _ = grad(grad.init(params), params, batch)
      >>> state.threshold, state.stddev
      (Array([1.], dtype=float32), Array([1.1], dtype=float32))

    Differs from the source: divides by the expected batch size; thresholds are lowered
    by 2^-20, or rounding would exceed them.

    Reference: Abadi et al., `Deep learning with differential privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016.
    """
    check_number(
        "noise_multiplier", noise_multiplier, "[0, inf)",
        "clipfx.privacy.noise_multiplier_for finds it",
    )  # fmt: skip
    check_number(
        "expected_batch_size", expected_batch_size, "(0, inf)",
        "it is the sampling probability times the number of examples", static=True,
    )  # fmt: skip
    check_choice("allocation", allocation, ("global", "equal_budget"))
    rule = max_norm if isinstance(max_norm, PrivateThreshold) else fixed(max_norm)
    if ord == 1 and rule.count_stddev:
        raise ValueError(
            "max_norm must be fixed with ord=1, got a rule that counts with Gaussian "
            "noise; that and Laplace noise have no joint multiplier."
        )
    if callable(rule.max_norm):
        raise TypeError(
            "max_norm must be a number, an array, a dict by group name or a rule of "
            f"clipfx.privacy, got {max_norm!r}; a function of norms is not private."
        )
    clipped = clipped_grad(
        fun,
        rule.max_norm,
        argnums=argnums,
        batch_argnums=batch_argnums,
        has_aux=has_aux,
        groups=groups,
        response=response,
        ord=ord,
        microbatch_size=microbatch_size,
        axis_name=axis_name,
    )
    check_bounded(response)
    if rule.num_groups is not None and groups != "global":
        raise ValueError(
            f'groups must be "global" for a rule by population, got {groups!r}; '
            "each population has one threshold."
        )
    grad = DPGrad(
        clipped, rule, noise_multiplier, expected_batch_size, _noise.as_key(key),
        allocation,
    )  # fmt: skip
    if grad.noisy:
        check_finite(rule.max_norm)
    if groups == "global":
        grad.gradient_noise_multiplier()
    return grad
