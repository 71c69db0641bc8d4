"""One step: what is released, what is bounded, and the noise in between."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import _compat
from clipfx._core.checks import check_keywords, helpful, is_known
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, each_of, entry, group_leaves
from clipfx.per_example.clipped_grad import ClippedGrad, check_bounded
from clipfx.per_example.engine.bookkeeping import over
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.populations import membership
from clipfx.per_example.engine.thresholds import limits
from clipfx.per_example.engine.trace import mask_of, params_of, size_of
from clipfx.privacy import accounting, noise
from clipfx.privacy.draws import draws, gaussian, laplace
from clipfx.privacy.scales import PrivateScale, in_scale, scaled
from clipfx.privacy.thresholds import LEAST, PrivateThreshold, plain

COUNTS = 2**32 - 1  # of the keys folded into a step's, that of counts


@exportable("clipfx.privacy.DPState")
class DPState(NamedTuple):
    """State of `dp_grad`; nothing in it is secret, all of it is released.

    Attributes:
      step: int32 scalar, how many steps there were.
      rule: What the threshold's rule needs for the next step.
      threshold: float32 `[G]`, of the last step, the largest of all populations.
      stddev: float32 `[G]`, of the last step's noise on the sum, for Laplace its scale.
      counts: float32 `[Q]`, the noised counts of the last step.
      scale: What the rule of the scale needs for the next step.

    Reference: none.
    """

    step: jax.Array
    rule: Any
    threshold: jax.Array
    stddev: jax.Array
    counts: jax.Array
    scale: Any = ()


@dataclasses.dataclass(frozen=True, eq=False)
class DPGrad:
    """The function that `dp_grad` returns.

    Attributes:
      clipped: What bounds and sums.
      rule: The threshold.
      noise_multiplier: z, joint for gradient and counts: what accounting needs.
      expected_batch_size: What sums are divided by.
      key: Of all draws; `reveal()` returns it, nothing prints or pickles it.
      allocation: How noise is divided between groups.
      scale: The coordinates that gradients are clipped and noised in, None for their
        own.

    Reference: none.
    """

    clipped: ClippedGrad
    rule: PrivateThreshold
    noise_multiplier: float
    expected_batch_size: float
    key: noise.Secret
    allocation: str
    scale: PrivateScale | None = None

    __name__ = "dp_grad"  # of the compiled function

    def __post_init__(self):
        same = {
            "noise_multiplier": plain(self.noise_multiplier),
            "expected_batch_size": float(self.expected_batch_size),
        }
        if not isinstance(self.key, noise.Secret):
            same["key"] = noise.Secret(self.key)
        for name, value in same.items():
            object.__setattr__(self, name, value)

    def __reduce__(self):
        return self.key.__reduce__()  # refuses

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: Any):
        return self

    def init(self, params: Any) -> DPState:
        """Returns the state before the first step.

        Args:
          params: As the loss gets them; with several `argnums` a tuple.
        """
        members = group_leaves(self.clipped.groups, params, by_slice=True)
        start, count = self._start(members), len(members.names)
        self.gradient_noise_multiplier(count)
        rule = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)),
                            self.rule.init(start))  # fmt: skip
        answers = jax.eval_shape(
            self.rule.ask,
            rule,
            jax.ShapeDtypeStruct((1, count), jnp.float32),
            jax.ShapeDtypeStruct((1, self.rule.num_populations or 1), jnp.float32),
        )
        return DPState(
            step=jnp.zeros([], jnp.int32),
            rule=rule,
            threshold=jnp.copy(start),
            stddev=jnp.zeros(count, jnp.float32),
            counts=jnp.zeros(answers.shape[1], jnp.float32),
            scale=() if self.scale is None else self.scale.init(params),
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
        rest = 1 - (z * reach / self.rule.count_stddev) ** 2
        if not is_known(rest):
            return z * jnp.where(rest > 0, rest, jnp.nan) ** -0.5
        if rest <= 0:
            raise ValueError(
                f"count_stddev must be above {z * reach:.6g} for "
                f"noise_multiplier={z!r} and {groups} group(s), got "
                f"{self.rule.count_stddev!r}; the counts alone would release more than "
                "that allows."
            )
        return z * rest**-0.5

    @helpful
    def sensitivity(self, state: DPState, relation: str = "add_or_remove_one") -> float:
        """How far the sum of the last step could move between neighbouring batches.

        Args:
          state: That the step returned.
          relation: See `clipfx.per_example.ClippedGrad.sensitivity`.
        """
        return self.clipped.sensitivity(relation, max_norm=state.threshold)

    @helpful
    def event(self, steps: int, *, sampling_probability: float = 1.0) -> Any:
        """What a run of steps releases, as `clipfx.privacy.event` says it.

        Args:
          steps: How many.
          sampling_probability: Of each example, in each batch.
        """
        return accounting.event(
            self.noise_multiplier,
            steps,
            sampling_probability=sampling_probability,
            mechanism="laplace" if self.clipped.ord == 1 else "gaussian",
        )

    def __call__(
        self,
        state: DPState,
        *args: Any,
        where: Any = ...,
        population_ids: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, DPState, PerExample]:
        """Returns the noised mean, the next state, and what must stay secret.

        Args:
          state: From `init` or the last call.
          *args: Of the loss, with a batch in place of an example.
          where: bool `[B]`, False for padding, which contributes exactly nothing; None
            where nobody is. Required.
          population_ids: Integers `[B]`, for a rule that distinguishes populations.
          **kwargs: Of the loss, the same for every example.
        """
        if not isinstance(state, DPState):
            raise TypeError(
                f"state must be a DPState, got {type(state).__name__}; it comes first, "
                "from grad.init(params) or the last call."
            )
        if where is ...:
            check_keywords("dp_grad", {"mask"} & {*kwargs}, ["where", "population_ids"])
            raise TypeError(
                "where must be passed to dp_grad, got nothing; pass the mask of those "
                "who are not padding (batches that libraries pad with the index -1 "
                "repeat their last example), or None if nobody is."
            )
        rule, signature = self.rule, self.clipped.signature
        params = params_of(signature, args)
        members = group_leaves(self.clipped.groups, params, by_slice=True)
        size = size_of(signature, args)
        keep = mask_of(where, size)
        member = self._member(population_ids, size)
        if member is not None:
            known = member.sum(1) > 0
            keep = known if keep is None else keep & known
        key = noise.key_of_step(self.key.reveal(), state.step)
        start, clip = self._start(members), self.clipped
        if rule.response is not None:
            clip = dataclasses.replace(clip, response=rule.response(state.rule))
            check_bounded(clip.response)

        def thresholds(counts: jax.Array) -> jax.Array:
            table = jnp.asarray(rule.limit(start, state.rule, counts), jnp.float32)
            # The noise of what is smaller could leave float32.
            return jnp.where(table < LEAST, 0, table) if self.noisy else table

        def of_examples(table: jax.Array) -> jax.Array:
            if member is None:
                return table
            return (member[:, :, None] * table[None]).sum(1)

        released = []  # once, or what clips and what noise follows could differ

        def ask(norm: jax.Array, keep: Any) -> jax.Array:
            noised = self._counts(state.rule, norm, member, keep, key)
            released.append((noised, thresholds(noised if rule.at_once else last)))
            return of_examples(released[-1][1])

        factors = None
        if self.scale is not None:
            scales = self.scale.scale(state.scale, params)
            factors = jax.tree.structure(params).flatten_up_to(scales)
            clip, args = in_scale(clip, args, params, factors)
        last = state.counts
        limit = ask if rule.at_once else of_examples(thresholds(last))
        sums, info = clip(*args, where=keep, max_norm=limit, **kwargs)
        if not released:  # the rule is of the last counts, or there was no example
            ask(info.norm, keep)
        noised, table = released[-1]
        bound = table.max(0)
        stddev = self._stddev(bound)
        mean = self._noised(sums, members, stddev, key, factors)
        new = DPState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            rule=jax.tree.map(
                lambda old, x: jnp.asarray(x, old.dtype),
                state.rule,
                rule.update(
                    state.rule,
                    noised,
                    self.expected_batch_size,
                    self._noise(params, members),
                ),
            ),
            threshold=bound,
            stddev=stddev,
            counts=noised,
            scale=() if self.scale is None else self.scale.update(state.scale, mean),
        )
        # What is released may be rounded.
        cast = lambda x, p: x.astype(jnp.result_type(p))
        return jax.tree.map(cast, mean, params), new, info

    def _member(self, population_ids: Any, size: int) -> Any:
        count = self.rule.num_populations
        if (population_ids is None) != (count is None):
            needed = "passed with" if population_ids is None else "left out without"
            raise TypeError(
                f"population_ids must be {needed} a rule that distinguishes "
                f"populations, got {population_ids!r}; clipfx.privacy.dpsgd_f is one."
            )
        return None if count is None else membership(population_ids, count, size)

    def _counts(
        self, state: Any, norm: jax.Array, member: Any, keep: Any, key: jax.Array
    ) -> jax.Array:
        """Noised answers `[Q]`, added up over all devices."""
        good = jnp.isfinite(norm).all(1)
        good = good if keep is None else good & keep
        most = jnp.asarray(jnp.finfo(jnp.float32).max, norm.dtype)
        norm = jnp.minimum(norm, most).astype(jnp.float32)
        answers = jnp.asarray(self.rule.ask(state, norm, member), jnp.float32)
        total = jnp.where(good[:, None], answers, 0).sum(0)
        total = over(total, _compat.varying_axes(total))
        if self.clipped.batch_axis_name is not None:
            total = jax.lax.psum(total, self.clipped.batch_axis_name)
        if not self.noisy:
            return total
        words = jax.random.bits(jax.random.fold_in(key, COUNTS), (2,), jnp.uint32)
        drawn = draws(gaussian, words, total.shape, total.dtype)
        return total + self.rule.count_stddev * drawn

    def _stddev(self, bound: jax.Array) -> jax.Array:
        """Of the noise on the sum, or its scale, by group `[G]`."""
        p, groups = self.clipped.ord, bound.shape[0]
        if not self.noisy:  # also for infinite bounds
            return jnp.zeros_like(bound)
        z = self.gradient_noise_multiplier(groups)
        if self.allocation == "equal_budget":
            return z * groups ** (1 / p) * bound
        # Squares could vanish, and the noise with them.
        most = jnp.maximum(bound.max(), LEAST)
        whole = most * jnp.linalg.norm(bound / most, p)
        return jnp.broadcast_to(z * whole, bound.shape)

    def _noise(self, params: Any, members: Groups) -> jax.Array:
        """Expected squared norm of the mean's noise, over squared thresholds `[G]`."""
        sizes = np.zeros(len(members.names))
        for x, index in zip(jax.tree.leaves(params), members.index, strict=True):
            parts = each_of(index)
            numbers = jnp.size(x) * (2 if jnp.iscomplexobj(x) else 1)
            np.add.at(sizes, [*parts], numbers / len(parts))
        shared = self.allocation == "global"
        drawn = np.full_like(sizes, sizes.sum()) if shared else len(sizes) * sizes
        z = self.gradient_noise_multiplier(len(sizes))
        return (z / self.expected_batch_size) ** 2 * jnp.asarray(drawn, jnp.float32)

    def _noised(
        self, sums: Any, members: Groups, stddev: jax.Array, key: Any, factors: Any
    ) -> Any:
        """The noised mean, in coordinates of the parameters."""
        inverse = laplace if self.clipped.ord == 1 else gaussian
        leaves, treedef = jax.tree.flatten(sums)
        if self.noisy:
            pairs = zip(members.index, leaves, strict=True)
            sizes = [entry(stddev, i, x) for i, x in pairs]
            leaves = noise.add(inverse, leaves, sizes, key, None)
        if factors is not None:
            leaves = [scaled(x, [1 / c for c in f])
                      for x, f in zip(leaves, factors, strict=True)]  # fmt: skip
        return treedef.unflatten([x / self.expected_batch_size for x in leaves])
