"""Recorded norms are those of the run, and replayed clips do what real ones do."""

import html
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same

import clipfx
from clipfx import calibrate
from clipfx.calibrate.report import page
from clipfx.calibrate.statistics import describe, hill, round_up, threshold_for

STEPS = 300
RATES = (0.01, 0.05, 0.1)
# The package shows the function of that name.
study = sys.modules["clipfx.calibrate.suggest"].study
module = sys.modules["clipfx.calibrate.settings"]


def gradients(steps=STEPS, seed=0, spikes=True):
    """Two leaves over time, of lognormal sizes with a spike in every 37 steps."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 0.3, (steps, 2)) * [1.0, 5.0]
    if spikes:
        size[36::37] *= 20
    a, b = rng.normal(size=(steps, 3, 2)), rng.normal(size=(steps, 4))
    unit = lambda x: x / np.sqrt((x * x).sum(axis=(*range(1, x.ndim),), keepdims=True))
    a, b = unit(a) * size[:, :1, None], unit(b) * size[:, 1:]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"a": a, "b": b}), size


def scanned(tx, grads):
    """States after each step, and the updates."""

    def step(state, grad):
        updates, state = tx.update(grad, state, grad)
        return state, (state, updates)

    first = jax.tree.map(lambda x: x[0], grads)
    return jax.jit(lambda g: jax.lax.scan(step, tx.init(first), g))(grads)


# ----------------------------------------------------------------------- record_norms


def test_recorded_norms_are_the_last_in_order():
    grads, size = gradients(50)
    for length in (50, 60, 7):
        tx = clipfx.record_norms(length, groups="leaf")
        state, (_, updates) = scanned(tx, grads)
        found = calibrate.history(state)
        assert_same(updates, grads)
        assert list(found) == ["clip0/a", "clip0/b"]
        for column, norms in enumerate(found.values()):
            assert norms.dtype == np.float32
            np.testing.assert_allclose(norms, size[-length:, column], rtol=1e-6)


def test_recording_changes_no_bit_and_keeps_no_bad_row():
    tx = clipfx.record_norms(3)
    tree = {"half": jnp.ones(3, jnp.bfloat16), "int": jnp.arange(2)}
    hurt = jax.tree.map(lambda x: x, {"w": jnp.array([1.0, -0.0, jnp.nan, jnp.inf])})
    out, _ = tx.update(tree, tx.init(tree))
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, out, tree))
    state = tx.init(hurt)
    out, state = tx.update(hurt, state)
    np.testing.assert_array_equal(out["w"], hurt["w"])
    assert int(state.metrics.nonfinite[0]) == 1
    assert calibrate.history(state)["clip0/global"].shape == (0,)


def test_recorded_norms_of_shards_are_of_the_whole():
    mesh = jax.make_mesh((8,), ("x",))
    whole = {"a": jnp.arange(16.0), "b": jnp.ones(8)}
    split = jax.device_put(whole, NamedSharding(mesh, P("x")))
    tx = clipfx.record_norms(4, groups="leaf")
    step = jax.jit(lambda g, s: tx.update(g, s)[1])
    expected = calibrate.history(step(whole, tx.init(whole)))
    for got in (
        step(split, tx.init(split)),
        jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P()), out_specs=P()))(
            split, tx.init(whole)
        ),
    ):
        for name, norms in calibrate.history(got).items():
            np.testing.assert_allclose(norms, expected[name], rtol=1e-6)


def test_history_is_found_wherever_it_is():
    grads, size = gradients(6)
    tx = optax.named_chain(
        ("seen", clipfx.record_norms(groups="leaf")),
        ("clip", clipfx.clip_by_global_norm(1.0)),
        ("guard", clipfx.skip_spikes(clipfx.autoclip(window=6))),
    )
    found = calibrate.history(scanned(tx, grads)[0])
    norms = {name.partition("/")[0]: x for name, x in found.items()}
    assert len(found) == 4  # and no loss of skip_spikes
    np.testing.assert_allclose(found["seen/b"], size[:, 1], rtol=1e-6)
    np.testing.assert_allclose(norms["guard"], 1.0, rtol=1e-6)
    layers = clipfx.per_stacked_layer(clipfx.record_norms(5))
    stacked = {"w": jnp.array([[3.0, 4.0], [6.0, 8.0]])}
    found = calibrate.history(jax.jit(layers.update)(stacked, layers.init(stacked))[1])
    assert {name: x.tolist() for name, x in found.items()} == {
        "clip0/global/0": [5.0],
        "clip0/global/1": [10.0],
    }


# ---------------------------------------------------------------- replay and suggest


def test_replayed_clips_do_what_real_ones_do_to_the_step():
    """Every method of the table, on gradients of ten elements and on their norms."""
    grads, _ = gradients()
    norms = calibrate.history(scanned(clipfx.record_norms(groups="leaf"), grads)[0])
    rows = np.stack([*norms.values()], axis=1)
    found, replays = study(norms, RATES)
    joint = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    bound = float(re.search(r"([\d.]+)\)", found.begin)[1])
    numbers = module._numbers(joint, rows, found.rates, bound)
    methods = module._methods(found.rates, 2)
    replayed = dict(zip(methods, replays.values(), strict=True))
    made = {name: make(numbers, STEPS) for name, (make, _) in methods.items()}
    real = scanned(
        optax.named_chain(*[(n, alone(tx)) for n, tx in made.items()]), grads
    )
    states, clipped = real[1][0], {}
    for name in made:
        state = states[name]
        if hasattr(state, "skipped"):
            counts = state.skipped[:, None]
        else:
            counts = state.metrics.clipped
        clipped[name] = np.diff(np.asarray(counts), axis=0, prepend=0) > 0
        np.testing.assert_array_equal(replayed[name].clipped, clipped[name], name)
        metrics = state.clip.metrics if hasattr(state, "clip") else state.metrics
        factor = metrics.factor[:, : clipped[name].shape[1]]
        np.testing.assert_allclose(replayed[name].factor, factor, rtol=3e-6)
    assert [s.clip_rate for s in found.settings] == [x.mean() for x in clipped.values()]
    rates = {s.method: s.clip_rate for s in found.settings}
    assert rates["autoclip()"] > 0.8
    assert 0 < rates["zclip()"] < 0.1
    assert len({*rates.values()}) > 8


def alone(tx):
    """Sees the gradients, and hands them on as they were."""

    def update(grads, state, params=None):
        return grads, tx.update(grads, state, params)[1]

    return optax.GradientTransformationExtraArgs(tx.init, update)


def test_replay_of_a_setting_of_ones_own():
    norms = np.array([1.0, 2.0, np.inf, 8.0], np.float32)
    done = calibrate.replay(clipfx.clip_by_global_norm(4.0), norms)
    assert done.clipped[:, 0].tolist() == [False, False, False, True]
    assert done.factor[:, 0].tolist() == [1, 1, 0, 0.5]
    assert done.threshold[:, 0].tolist() == [4.0] * 4


def test_thresholds_clip_at_most_what_they_promise():
    norms = np.random.default_rng(0).lognormal(0, 0.5, STEPS)
    found = calibrate.suggest(norms)
    for rate, exact, setting in zip(
        found.rates, found.thresholds["global"], found.settings[1:], strict=False
    ):
        assert (norms.astype(np.float32) > exact).sum() == int(rate * STEPS)
        assert rate - 2 / STEPS <= setting.clip_rate <= rate
    assert round_up(1234.5) == 1235
    assert round_up(0.99999) == 1.0
    assert round_up(2.0) == 2.0
    assert threshold_for(np.full(20, 3.0), 0.5) == 3.0


def test_statistics_are_those_that_norms_were_drawn_with():
    rng = np.random.default_rng(0)
    pareto = rng.pareto(1.5, 20_000) + 1
    assert hill(pareto) == pytest.approx(1.5, rel=0.05)
    assert hill(np.ones(30)) == np.inf
    norms = rng.lognormal(1.0, 0.2, 2000) * np.geomspace(1, 8, 2000)
    seen = describe("global", norms / np.geomspace(1, 8, 2000))
    assert seen.spread == pytest.approx(0.2, rel=0.1)
    assert seen.median == pytest.approx(np.e, rel=0.03)
    assert seen.drift == pytest.approx(1, rel=0.1)
    drifts = describe("global", norms)
    assert drifts.drift == pytest.approx(8**0.75, rel=0.1)
    # A drift is no spread, and makes no tail heavy.
    assert drifts.spread == pytest.approx(0.2, rel=0.1)
    assert drifts.tail_index == pytest.approx(seen.tail_index, rel=0.1)
    norms[[700, 1500]] *= 30
    norms[[3, 5]] = np.inf, 0
    seen = describe("global", norms)
    assert seen.spikes == (700, 1500)
    assert (seen.nonfinite, seen.zeros) == (1, 1)


def quiet(sigma=0.1):
    return np.random.default_rng(1).lognormal(0, sigma, STEPS)


def exploding():
    return np.concatenate([np.geomspace(1, 1e3, 20), 1e3 * quiet()[20:]])


def drifting():
    return (
        np.where(np.arange(STEPS) % 50 == 49, 20, 1)
        * quiet()
        * np.geomspace(1, 0.01, STEPS)
    )


@pytest.mark.parametrize(
    ("norms", "begin", "doubted", "warning"),
    [
        (quiet(0.3), "clip_by_global_norm.* insurance", "adagc(max_norm=", "ends at"),
        (exploding(), "clip_by_global_norm.*record again", "zclip()", "learns"),
        (drifting(), "zclip.*drifts to", "limit_norm", "no general"),
        (quiet(2.0), "clip_by_global_norm.*scatter so far", "norm_stab", "anew"),
    ],
    ids=["quiet", "exploding", "drifting", "wild"],
)
def test_advice_fits_the_norms(norms, begin, doubted, warning):
    found = calibrate.suggest(norms)
    assert found.advice.startswith(f"{found.begin}: ")
    sentence = f"Begin with {found.advice}"
    assert sentence in " ".join(str(found).split())
    assert re.search(begin, sentence)
    assert found.begin in {s.method for s in found.settings}
    setting = next(s for s in found.settings if s.method.startswith(doubted))
    assert warning in setting.warning
    assert any("drifts" in x for x in found.warnings) == ("drifts" in begin)


def test_advice_goes_by_settled_norms_without_spikes_and_aftermath():
    """Their 95th percentile, whatever comes before, behind or above."""
    advised = lambda norms: float(
        re.findall(r"[\d.]+", study(norms, RATES)[0].begin)[0]
    )
    norms, exact = quiet(), np.exp(0.1 * 1.645)
    assert advised(norms) == pytest.approx(exact, rel=0.05)
    first = np.where(np.arange(STEPS) < 50, 8 * norms, norms)
    assert advised(first) == pytest.approx(exact, rel=0.05)
    after = np.where(np.arange(STEPS) % 60 > 52, 3 * norms, norms)
    after[53::60] *= 10
    assert np.quantile(after[STEPS // 2 :], 0.95) > 2
    assert advised(after) == pytest.approx(exact, rel=0.1)
    fitted = np.where(np.arange(STEPS) < STEPS // 2, norms, 0.0)
    assert advised(fitted) == pytest.approx(exact, rel=0.1)


def test_insurance_takes_a_hundredth_of_the_way_at_most():
    """Also of a few that train seldom and far, which do not stand out here."""
    rng = np.random.default_rng(0)
    usual, far = rng.lognormal(0, 0.8, 3000), 12 * rng.lognormal(0, 0.2, 3000)
    norms = np.where(rng.random(3000) < 0.03, far, usual)
    found = calibrate.suggest(norms)
    (bound,) = map(float, re.findall(r"[\d.]+", found.begin))
    half = norms[1500:]
    kept = np.minimum(half, bound).sum() / half.sum()
    assert 0.99 <= kept < 0.991
    assert bound > 2 * np.quantile(half, 0.95)
    assert "takes 1% of the sum" in found.advice and "insurance" in found.advice


@pytest.mark.parametrize("rise", [1 / 30, 1.5, 5, 30])
def test_norms_that_rise_for_good_are_no_run_to_go_by(rise):
    norms = quiet() * np.geomspace(1, rise, STEPS)
    found = calibrate.suggest(norms)
    (bound,) = map(float, re.findall(r"[\d.]+", found.begin))
    assert ("record again" in found.advice) == (rise > 4)
    if rise > 4:
        assert bound == pytest.approx(np.median(norms[:5]), rel=1e-3)
        assert "and stay there" in found.advice


def test_what_is_no_trouble_is_not_warned_of():
    warned = {s.method for s in calibrate.suggest(quiet(0.1)).settings if s.warning}
    assert not warned & {"zclip()", "quantile_clip(0.9)", "skip_spikes(optimizer)"}


def test_frozen_groups_are_left_out_and_named():
    alone = calibrate.suggest({"w": quiet()})
    found = calibrate.suggest({"frozen": np.zeros(STEPS), "w": quiet()})
    assert found.settings == alone.settings
    assert found.warnings == (
        "frozen has a norm of 0 on every step and is left out.",
        *alone.warnings,
    )


def test_steps_of_norm_zero_choose_no_threshold():
    """As where a network is thrown so far that nothing reaches it any more."""
    norms = np.where(np.arange(STEPS) < 40, quiet(), 0)
    found = calibrate.suggest(norms)
    assert found.thresholds == calibrate.suggest(quiet()[:40]).thresholds
    (told,) = [x for x in found.warnings if "norm of 0" in x]
    assert told.startswith(f"{STEPS - 40} of {STEPS} steps had a norm of 0, which")


def test_a_clip_by_group_is_ready_to_paste():
    """As it is printed it makes a clip of the groups, with the clip rate promised."""
    layers = [f"{'attention_' * 3}{k}" for k in range(2)]
    norms = {f"clip0/encoder/{x}": quiet(0.3) * (k + 1) for k, x in enumerate(layers)}
    found, replays = study(norms, RATES)
    line = found.per_layer()
    text = page("run", norms, found, replays)
    assert f"<pre>{html.escape(line)}</pre>" in text
    assert text.count("<picture>") == 4  # of groups too
    assert f"\n\n{line}\n" in str(found)
    assert max(map(len, line.splitlines())) <= 88
    limits = eval(line, {"clip_per_layer": dict})
    assert [*limits] == [f"encoder/{x}" for x in layers]
    tx = eval(f"clipfx.{line}")
    tx.init({"encoder": {x: {"w": jnp.ones(1)} for x in layers}})
    (rate,) = [s.clip_rate for s in found.settings if s.method == line]
    pairs = zip(norms.values(), limits.values(), strict=True)
    above = [(x.astype(np.float32) > np.float32(limit)).mean() for x, limit in pairs]
    assert rate == pytest.approx(np.mean(above))
    assert module.written({"a": 1.0, "b/c": 2.5}) == (
        'clip_per_layer({"a": 1, "b/c": 2.5})'
    )
