"""Bad input gets one sentence that names the argument and says what to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sentences import raises_one_sentence
from trees import sample

import clipfx

SGD, ADAM = optax.sgd(0.1), optax.scale_by_adam()
PAIR = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4))}


def updated(tx, params="same", **extra):
    """One step of a transform."""
    tree = sample()
    return tx.update(tree, tx.init(tree), tree if params == "same" else params, **extra)


ERRORS = [
    (lambda: clipfx.clip_by_norm(-1.0), ValueError, "must be >= 0, got -1.0"),
    (lambda: clipfx.clip_by_norm(math.nan), ValueError, "must be >= 0, got nan"),
    (
        lambda: clipfx.clip_by_norm([1.0]),
        TypeError,
        r"a threshold must be .*got \[1.0\]",
    ),
    (lambda: clipfx.clip_by_norm("1"), TypeError, "a threshold must be a number"),
    (lambda: clipfx.clip_by_norm(True), TypeError, "a threshold must be a number"),
    (lambda: clipfx.clip_by_norm(None), TypeError, "math.inf"),
    (lambda: clipfx.clip_by_norm({"a": -1.0}), ValueError, "must be >= 0"),
    (lambda: clipfx.clip_by_norm(np.array([1.0, -2.0])), ValueError, "must be >= 0"),
    (lambda: clipfx.clip_by_norm(1.0, ord=0), ValueError, "ord must be"),
    (
        lambda: clipfx.clip_by_norm(1.0, response="hard"),
        TypeError,
        "responses has them",
    ),
    (lambda: clipfx.clip_by_norm(1.0, nonfinite="skip"), ValueError, "apply_if_finite"),
    (
        lambda: clipfx.clip_by_norm(1.0, groups="layers").init(sample()),
        ValueError,
        "got 'layers'",
    ),
    (
        lambda: clipfx.clip_by_norm(1.0, groups={"decoder": "a"}).init(sample()),
        ValueError,
        "no label for 'encoder/bias'",
    ),
    (
        lambda: clipfx.clip_by_norm(jnp.ones(3), groups="layer").init(sample()),
        ValueError,
        r"shape \(2,\).*\('decoder', 'encoder'\), got shape \(3,\)",
    ),
    (
        lambda: clipfx.clip_by_norm({"decoder": 1.0}, groups="layer").init(sample()),
        ValueError,
        r"without \['encoder'\]",
    ),
    (
        lambda: clipfx.clip_by_norm(1.0, groups="layer").update(
            {"a": {"w": jnp.ones(2)}},
            clipfx.clip_by_norm(1.0, groups="layer").init(sample()),
        ),
        ValueError,
        r"init saw \('decoder', 'encoder'\), update saw \('a',\)",
    ),
    (
        lambda: clipfx.clip_by_norm(1.0).update(sample(), ()),
        TypeError,
        "must be a ClipState",
    ),
    (lambda: clipfx.clip_by_norm(1.0).update(sample(), None), TypeError, "tree_clip"),
    (
        lambda: clipfx.clip_by_norm(1.0, response=clipfx.responses.auto_s),
        TypeError,
        r"got auto_s\(.*response=auto_s\(\)",
    ),
    (
        lambda: clipfx.tree_clip(sample(), 1.0, response=clipfx.responses.band),
        TypeError,
        r"response=band\(\)",
    ),
    (
        lambda: clipfx.clip_by_norm(
            {"decoder": 1, "encoder": 1, "x": 1}, groups="layer"
        ).init(sample()),
        ValueError,
        r"got 'x'; there are \('decoder', 'encoder'\)",
    ),
    (lambda: clipfx.clip_by_norm(1j), TypeError, "a threshold must be a number"),
    (
        lambda: clipfx.tree_clip({"a": {"f": jnp.tanh}}, 1.0),
        TypeError,
        "at 'a/f'; take it out",
    ),
    (lambda: clipfx.tree_clip(sample(), lambda count: 1.0), TypeError, "needs state"),
    (
        lambda: clipfx.tree_clip(sample(), clipfx.thresholds.constant(1.0)),
        TypeError,
        "needs state",
    ),
    (lambda: clipfx.clip_by_value(lambda count: 1.0), TypeError, "inject_hyperparams"),
    (lambda: clipfx.clip_by_value({"a": 1.0}), TypeError, "max_abs must be a number"),
    (lambda: clipfx.clip_by_value(1.0, response=3), TypeError, "responses has them"),
    (
        lambda: clipfx.per_stacked_layer(clipfx.clip_by_norm),
        TypeError,
        "transform itself",
    ),
    (
        lambda: clipfx.per_stacked_layer(clipfx.clip_by_norm(1.0)).init(sample()),
        ValueError,
        "share the size of a leading axis",
    ),
    (
        lambda: clipfx.per_stacked_layer(clipfx.clip_by_norm(1.0)).init(jnp.ones([])),
        ValueError,
        "share the size of a leading axis",
    ),
    # Numbers out of range name the argument.
    (
        lambda: clipfx.autoclip(-1),
        ValueError,
        r"percentile must be .*\[0, 100\], got -1",
    ),
    (lambda: clipfx.autoclip(101.0), ValueError, r"percentile must be .* got 101.0"),
    (lambda: clipfx.autoclip(math.nan), ValueError, "percentile must be"),
    (lambda: clipfx.autoclip("10"), TypeError, "percentile must be a number"),
    (lambda: clipfx.autoclip(0.1), UserWarning, "in percent.* got 0.1; .*pass 10"),
    (lambda: clipfx.autoclip(window=0), ValueError, "window must be"),
    (lambda: clipfx.autoclip(window=2.5), ValueError, "window must be a whole number"),
    (lambda: clipfx.autoclip(window=None), TypeError, "window must be a number"),
    (
        lambda: jax.jit(lambda n: clipfx.autoclip(window=n).init(sample()))(5),
        TypeError,
        'window must be a static .*static_args="window"',
    ),
    (
        lambda: clipfx.clip_fair_groups(num_populations=True),
        TypeError,
        "num_populations must be .*got True",
    ),
    (lambda: clipfx.quantile_clip(1.5), ValueError, "quantile must be"),
    (lambda: clipfx.record_norms(0), ValueError, "size must be an int >= 1, got 0"),
    (lambda: clipfx.record_norms(2.5), TypeError, "size must be an int .* got 2.5"),
    (
        lambda: clipfx.record_norms(jnp.array(5)),
        TypeError,
        'size must be a static .*static_args="size"',
    ),
    (
        lambda: clipfx.calibrate.suggest(range(1, 99), rates=[5]),
        ValueError,
        r"rates must be shares in \(0, 1\), got 5; for five percent write 0.05",
    ),
    (
        lambda: clipfx.calibrate.suggest(range(1, 99), rates=[]),
        ValueError,
        "rates must be shares",
    ),
    (
        lambda: clipfx.calibrate.suggest([1.0] * 9),
        ValueError,
        "norms must have at least 20 finite steps that are not 0, got 9 of 9",
    ),
    (
        lambda: clipfx.calibrate.suggest([math.nan] * 99),
        ValueError,
        "norms must have at least 20 .*, got 0 of 99",
    ),
    (
        lambda: clipfx.calibrate.suggest([-1.0] * 99),
        ValueError,
        "norms must be >= 0, got -1 in 'global'; logarithms",
    ),
    (
        lambda: clipfx.calibrate.suggest({"a": [1.0, 2.0], "b": [1.0]}),
        ValueError,
        "norms must hold one number for each step and group",
    ),
    (
        lambda: clipfx.calibrate.suggest({}),
        ValueError,
        "norms must hold one number for each step and group",
    ),
    (
        lambda: clipfx.calibrate.suggest(np.ones((2, 2, 2))),
        ValueError,
        r"norms must be \[T\], \[T, G\] or a dict by group, got \(2, 2, 2\)",
    ),
    (
        lambda: clipfx.calibrate.suggest("norms"),
        TypeError,
        "norms must be an array of numbers, got str",
    ),
    (
        lambda: clipfx.calibrate.replay(optax.scale(2.0), [1.0]),
        TypeError,
        "transform must have a clipfx.ClipState",
    ),
    (
        lambda: clipfx.calibrate.replay(clipfx.zclip, [1.0]),
        TypeError,
        "transform must be an optax.GradientTransformation",
    ),
    (
        lambda: clipfx.calibrate.history(clipfx.zclip()),
        TypeError,
        "opt_state must be the state of an optimizer",
    ),
    (lambda: clipfx.quantile_clip(step_size=0), ValueError, "step_size must be"),
    (lambda: clipfx.quantile_clip(min_norm=-1), ValueError, "min_norm must be"),
    (lambda: clipfx.zclip(0), ValueError, "z_threshold must be"),
    (lambda: clipfx.zclip(decay=1.0), ValueError, r"decay must be .*\[0, 1\), got 1.0"),
    (lambda: clipfx.zclip(decay=-0.1), ValueError, "decay must be"),
    (lambda: clipfx.zclip(max_norm=-1), ValueError, "max_norm must be"),
    (lambda: clipfx.zclip(clip_factor=2), ValueError, "clip_factor must be"),
    (lambda: clipfx.zclip(warmup_steps=0), ValueError, "warmup_steps must be"),
    (lambda: clipfx.zclip(clip_to="max"), ValueError, "clip_to must be .*got 'max'"),
    (lambda: clipfx.adagc(-1), ValueError, "max_ratio must be"),
    (lambda: clipfx.adagc(decay=1), ValueError, "decay must be"),
    (lambda: clipfx.adagc(decay=jnp.float32(1)), ValueError, "decay must be"),
    (lambda: clipfx.adagc(max_norm=lambda count: 1.0), TypeError, "max_norm must be"),
    (lambda: clipfx.adagc(warmup_steps=-1), ValueError, "warmup_steps must be"),
    (lambda: clipfx.band_by_history(low=2), ValueError, "low must be"),
    (lambda: clipfx.band_by_history(high=0.5), ValueError, "high must be"),
    (lambda: clipfx.band_by_history(decay=1.5), ValueError, "decay must be"),
    (lambda: clipfx.band_by_history(min_norm=-1), ValueError, "min_norm must be"),
    (lambda: clipfx.norm_stabilizer(1.0), ValueError, "mean_decay must be"),
    (lambda: clipfx.norm_stabilizer(0.7, 1), ValueError, "square_decay must be"),
    (lambda: clipfx.spamp(1.0), ValueError, "decay must be"),
    (lambda: clipfx.spamp(min_power=0), ValueError, "min_power must be"),
    (lambda: clipfx.spamp(init="one"), ValueError, "init must be"),
    (lambda: clipfx.spamp(power_of="x"), ValueError, "power_of must be"),
    (lambda: clipfx.spamp(curve=0.7), TypeError, "curve must be a function"),
    (lambda: clipfx.spamp(nonfinite="skip"), ValueError, "nonfinite must be"),
    (lambda: clipfx.grad_power(-1), ValueError, "power must be"),
    (lambda: clipfx.grad_power(math.inf), ValueError, "power must be"),
    (lambda: clipfx.smooth_norm(-1, 1), ValueError, "l0 must be"),
    (lambda: clipfx.smooth_norm(1, -1), ValueError, "l1 must be"),
    (lambda: clipfx.smooth_norm(0, 0), ValueError, "must not both be 0"),
    (lambda: clipfx.clip_spikes(1.0), ValueError, "decay must be"),
    (lambda: clipfx.spam_clip(-1), ValueError, "threshold must be"),
    (lambda: clipfx.spam_clip(decay=1), ValueError, "decay must be"),
    (lambda: clipfx.spam_clip(warmup_steps=0), ValueError, "warmup_steps must be"),
    (lambda: clipfx.agc(-0.1), ValueError, "max_ratio must be"),
    (lambda: clipfx.agc(eps=-1), ValueError, "eps must be"),
    (lambda: updated(clipfx.agc(axis=2)), ValueError, "axis must name axes"),
    (lambda: updated(clipfx.agc(axis={"decoder": 5})), ValueError, "axis must name"),
    (lambda: updated(clipfx.agc(axis=0.5)), ValueError, "axis must name axes"),
    (lambda: updated(clipfx.agc(axis=lambda path: 2)), ValueError, "axis must name"),
    (lambda: updated(clipfx.agc(), None), TypeError, "params must be passed to agc"),
    *[
        (lambda call=call: clipfx.clip_cotangent(PAIR, *call[0], **call[1]), kind, text)
        for call, kind, text in [
            (((), {}), ValueError, "max_norm or max_abs must be given, .*got none"),
            (((1.0, 1.0), {"axis": -1}), ValueError, "max_norm or max_abs must be"),
            (((-1.0,), {"axis": -1}), ValueError, "max_norm must be >= 0, got -1.0"),
            (((None, math.nan), {}), ValueError, "max_abs must be >= 0, got nan"),
            ((("1",), {"axis": -1}), TypeError, "max_norm must be a number"),
            (((1.0,), {}), ValueError, "axis must say .*got nothing"),
            (((1.0,), {"axis": 0.5}), TypeError, "axis must be an int"),
            (((1.0,), {"axis": 2}), ValueError, r"axis must name .*\['a'\].*\(2, 3\)"),
            (((1.0,), {"axis": (0, -2)}), ValueError, "axis must name .*once"),
            (
                ((1.0,), {"axis": 0}),
                ValueError,
                r"x must have leaves of one shape .*\(3,\) .*\['a'\] and \(4,\) for",
            ),
            (
                ((np.ones(3, np.float32),), {"axis": 1}),
                ValueError,
                r"max_norm must be .*norms of shape \(2,\), got shape \(3,\)",
            ),
            (((1.0,), {"axis": 1, "nonfinite": "skip"}), ValueError, "nonfinite must"),
            (((), {"clip_value": 1.0}), TypeError, "did you mean max_abs"),
            (((1.0,), {"axes": -1}), TypeError, "did you mean axis"),
        ]
    ],
    (lambda: clipfx.clip_by_params(-1), ValueError, "max_ratio must be"),
    (lambda: clipfx.clip_by_params(min_step=-1), ValueError, "min_step must be"),
    (lambda: clipfx.clip_by_params(per="leaf"), ValueError, "per must be"),
    *[
        (
            lambda per=per: updated(clipfx.clip_by_params(per=per), None),
            TypeError,
            "params must be passed to clip_by_params",
        )
        for per in ("tensor", "element")
    ],
    (
        lambda: clipfx.clip_group_ratio(-1, groups="layer"),
        ValueError,
        "max_ratio must be",
    ),
    (
        lambda: updated(
            clipfx.clip_group_ratio(1, groups="layer", reference_group="x")
        ),
        ValueError,
        r"reference_group must be .*got 'x'.*\('decoder', 'encoder'\)",
    ),
    (lambda: clipfx.clip_by_curvature(0), ValueError, "learning_rate must be"),
    (lambda: clipfx.clip_by_curvature(0.1, decay=1), ValueError, "decay must be"),
    (
        lambda: clipfx.clip_by_curvature(lambda count: 0.1),
        TypeError,
        "learning_rate must be a number",
    ),
    (
        lambda: updated(clipfx.clip_by_curvature(0.1), None),
        TypeError,
        "params must be passed to clip_by_curvature",
    ),
    (
        lambda: clipfx.weight_decay_balance(
            sample(), sample(), weight_decay=-1, learning_rate=0.1
        ),
        ValueError,
        "weight_decay must be",
    ),
    (
        lambda: clipfx.weight_decay_balance(
            sample(), sample(), weight_decay=0.1, learning_rate=0
        ),
        ValueError,
        "learning_rate must be",
    ),
    (lambda: clipfx.limit_norm_growth(-1), ValueError, "max_ratio must be"),
    (lambda: clipfx.limit_norm_growth(min_norm=-1), ValueError, "min_norm must be"),
    (lambda: clipfx.clip_update_rms(ADAM, -1.0), ValueError, "must be >= 0"),
    (lambda: clipfx.clip_update_rms(ADAM, b2=1), ValueError, "b2 must be"),
    (lambda: clipfx.clip_update_rms(ADAM, eps=0), ValueError, "eps must be"),
    (lambda: updated(clipfx.clip_update_rms(ADAM)), TypeError, "b2 must be given"),
    *[
        (
            lambda tx=tx: updated(clipfx.clip_update_rms(tx, b2=0.9)),
            TypeError,
            "inner must keep Adam's second moment as nu .*clip_by_block_rms",
        )
        for tx in (SGD, optax.adafactor(0.1))
    ],
    (
        lambda: updated(clipfx.clip_update_rms(optax.chain(ADAM, ADAM), b2=0.9)),
        ValueError,
        "one second moment of each leaf, got two of 'decoder/kernel'",
    ),
    (
        lambda: clipfx.clip_update_rms(ADAM, nonfinite="skip"),
        ValueError,
        "apply_if_finite",
    ),
    (lambda: clipfx.dual_norm_gate(SGD, 0.0), ValueError, "rho must be"),
    (lambda: clipfx.dual_norm_gate(SGD, {"a": 1.0}), TypeError, "rho must be a number"),
    (lambda: clipfx.skip_spikes(optax.adam), TypeError, "inner must be"),
    (lambda: clipfx.skip_spikes(SGD, window=0), ValueError, "window must be"),
    (lambda: clipfx.skip_spikes(SGD, num_std=0), ValueError, "num_std must be"),
    (lambda: clipfx.skip_spikes(SGD, min_steps=1), ValueError, "min_steps must be"),
    (
        lambda: updated(clipfx.skip_spikes(SGD), value=jnp.ones(3)),
        ValueError,
        r"value must be a scalar, .*got shape \(3,\)",
    ),
    *[
        (lambda wrap=wrap, x=x: wrap(x), TypeError, "pass the transform itself")
        for wrap in (
            clipfx.clip_update_rms,
            lambda tx: clipfx.dual_norm_gate(tx, 1.0),
            clipfx.error_feedback,
            clipfx.skip_spikes,
        )
        for x in (1.0, None, clipfx.clip_by_norm, optax.GradientTransformation)
    ],
    # Arguments that other libraries call otherwise.
    *[
        (
            lambda make=make, word=word: make(**{word: 1.0}),
            TypeError,
            f"{make.__name__} must be .* got '{word}'; did you mean {meant}",
        )
        for make, word, meant in [
            (clipfx.clip_by_global_norm, "max_grad_norm", "max_norm"),
            (clipfx.clip_by_global_norm, "norm_type", "ord"),
            (clipfx.clip_per_layer, "clipping_norm", "max_norm"),
            (clipfx.clip_by_value, "max_delta", "max_abs"),
            (clipfx.clip_by_value, "clip_value", "max_abs"),
            (clipfx.agc, "clipping", "max_ratio"),
            (clipfx.zclip, "z_thresh", "z_threshold"),
            (clipfx.autoclip, "percentil", "percentile"),
            (clipfx.adagc, "warmup", "warmup_steps"),
            (clipfx.limit_norm_growth, "gamma", "max_ratio"),
            (clipfx.skip_spikes, "windows", "window"),
        ]
    ],
    # Trees that do not belong together.
    *[
        (
            lambda make=make, params=params: updated(make(), params),
            ValueError,
            f"params must have a leaf .* at 'decoder/kernel', .*{got}",
        )
        for make in (
            clipfx.agc,
            clipfx.clip_by_params,
            lambda: clipfx.clip_by_params(per="element"),
            lambda: clipfx.clip_by_curvature(0.1),
        )
        for params, got in [
            ({}, "got none;"),
            ([jnp.ones(3)], "got none;"),
            (
                {"decoder": {"kernel": jnp.ones(3)}},
                r"got one of float32 and shape \(3,",
            ),
            ({"decoder": {"kernel": jnp.ones}}, "got one of function"),
            ({"decoder": {"kernel": "w"}}, "got one of str"),
        ]
    ],
    *[
        (
            lambda tx=tx: tx.update(sample(), tx.init({"w": jnp.ones(3)}), sample()),
            ValueError,
            r"state of \w+ must have a leaf .* shape \(8, 5\) at 'decoder/kernel'",
        )
        for tx in (
            clipfx.spam_clip(),
            clipfx.error_feedback(optax.identity()),
            clipfx.clip_by_curvature(0.1),
        )
    ],
    (
        lambda: clipfx.weight_decay_balance(
            sample(), {}, weight_decay=0.1, learning_rate=0.1
        ),
        ValueError,
        "params must have a leaf .*got none",
    ),
    *[
        (lambda call=call: call(), TypeError, "state of .* must be ")
        for call in (
            lambda: clipfx.spam_clip().update(sample(), None),
            lambda: clipfx.error_feedback(SGD).update(sample(), None),
            lambda: clipfx.skip_spikes(SGD).update(sample(), ()),
            lambda: clipfx.clip_update_rms(ADAM, b2=0.9).update(sample(), ()),
            lambda: clipfx.dual_norm_gate(SGD, 1.0).update(sample(), None),
            lambda: clipfx.clip_by_curvature(0.1).update(sample(), None, sample()),
            lambda: clipfx.clip_spikes().update(sample(), None),
            lambda: clipfx.zclip().update(sample(), None),
        )
    ],
    (lambda: clipfx.error_feedback(SGD, max_ratio=-1), ValueError, "max_ratio must be"),
    (lambda: clipfx.clip_by_snr(-1.0), ValueError, "must be >= 0"),
    (lambda: clipfx.clip_by_snr(1.0, gamma=0), ValueError, "gamma must be"),
    (lambda: clipfx.clip_by_snr(1.0, low=-1), ValueError, "low must be"),
    (
        lambda: clipfx.clip_by_snr(1.0, weight="min_snr"),
        TypeError,
        "clipfx.snr has them",
    ),
    (lambda: updated(clipfx.clip_by_snr(1.0)), TypeError, "snr must be passed"),
    (
        lambda: updated(clipfx.clip_by_snr(1.0), snr=jnp.ones(8)),
        ValueError,
        r"snr must be a scalar.*\(8,\).*per_example",
    ),
    (lambda: updated(clipfx.clip_by_snr(1.0), snr=-1.0), ValueError, "snr must be"),
    (lambda: clipfx.snr.ddpm_linear(10), ValueError, "num_steps must be"),
    (lambda: clipfx.snr.cosine(0), ValueError, "num_steps must be"),
    (lambda: clipfx.snr.cosine(max_beta=1), ValueError, "max_beta must be"),
    (
        lambda: clipfx.snr.from_betas([0.5, 1.5]),
        ValueError,
        "betas must be .*0.5 to 1.5",
    ),
    (
        lambda: clipfx.snr.from_alpha_bar(jnp.ones((2, 2))),
        ValueError,
        r"alpha_bar must be a vector .*\(2, 2\)",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
