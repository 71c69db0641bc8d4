"""Bounded, summed, noised, divided: differentially private training in one call."""

from typing import Any

import jax

from clipfx import responses
from clipfx._core.checks import check_choice, check_number, helpful
from clipfx._types import AxisName, GroupSpec, Limit, LossFn, Positions
from clipfx.per_example.clipped_grad import check_bounded, clipped_grad
from clipfx.privacy import noise
from clipfx.privacy.scales import PrivateScale, check_scale
from clipfx.privacy.step import DPGrad
from clipfx.privacy.thresholds import PrivateThreshold, check_finite, check_start, fixed


@helpful
def dp_grad(
    fun: LossFn,
    *,
    max_norm: Limit,
    noise_multiplier: float,
    expected_batch_size: float,
    key: jax.Array,
    ord: int | None = None,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    norm_method: Any = "auto",
    allocation: str = "global",
    microbatch_size: int | None = None,
    batch_axis_name: AxisName | None = None,
    scale: PrivateScale | None = None,
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
        `quantile`, `histogram_threshold`, `dpsgd_f`, `dpsgd_global`,
        `dpsgd_global_adapt`.
      noise_multiplier: z >= 0 of the whole step; with a rule, counts and gradient share
        it. 0 adds no noise, to see what clipping alone does. May be traced, to compile
        once for several.
      expected_batch_size: m > 0: the sampling probability times the number of examples.
      key: See `add_gaussian_noise`.
      ord: p, 2 with Gaussian or 1 with Laplace noise. Static.
      argnums: See `clipfx.per_example.clipped_grad`. Static.
      batch_argnums: See `clipfx.per_example.clipped_grad`. Static.
      has_aux: See `clipfx.per_example.clipped_grad`. Static.
      groups: Which leaves share a norm, see `clipfx.per_example.clipped_grad`. Static.
      response: A bounded response, None for `hard`: `auto_s()`, `psac()`, ... Static.
      norm_method: See `clipfx.per_example.clipped_grad`. Static.
      allocation: Between groups: `"global"`, the same noise everywhere, or
        `"equal_budget"`, :math:`z G^{1/p} C_k` for group k, less where thresholds are
        small. Both cost the same. Static.
      microbatch_size: How many examples at a time, by a scan; None takes all. Static.
      batch_axis_name: Mesh axes that batches are split over, for `pmap` and
        `shard_map(check_vma=False)`; elsewhere this happens by itself. Static.
      scale: What gradients are multiplied by before they are clipped, s > 0, computed
        from what was released: `second_moment`, for Adam. Thresholds, norms and noise
        are then those of :math:`s g`, and the noised sum is divided by s; None for 1.

    Returns:
      A function `grad(state, *args, where=, population_ids=None)` of the state, from
      `grad.init(params)`, and the arguments of the loss, batches in place of examples;
      `where` is the mask bool `[B]` of those who are not padding, or None if nobody is.
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
      >>> grads, state, _ = grad(grad.init(params), params, batch, where=None)
      >>> state.threshold, state.stddev
      (Array([1.], dtype=float32), Array([1.1], dtype=float32))

    Differs from the source: divides by the expected batch size; thresholds are lowered
    by 2^-20, or rounding would exceed them; below 2^-100 they are 0, where there is
    noise.

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
    check_start(rule.max_norm)
    check_scale(scale)
    clipped = clipped_grad(
        fun,
        rule.max_norm,
        argnums=argnums,
        batch_argnums=batch_argnums,
        has_aux=has_aux,
        groups=groups,
        response=response,
        ord=ord,
        norm_method=norm_method,
        microbatch_size=microbatch_size,
        batch_axis_name=batch_axis_name,
    )
    check_bounded(clipped.response)
    if rule.num_populations is not None and groups != "global":
        raise ValueError(
            f'groups must be "global" for a rule by population, got {groups!r}; '
            "each population has one threshold."
        )
    grad = DPGrad(
        clipped, rule, noise_multiplier, expected_batch_size, noise.Secret(key),
        allocation, scale,
    )  # fmt: skip
    if grad.noisy:
        check_finite(rule.max_norm)
    if groups == "global":
        grad.gradient_noise_multiplier()
    return grad
