"""`clip_spectrum`: singular values against float64, on stacks and kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sentences import raises_one_sentence
from spectra64 import TARGETS, drawn, oracle, worst
from tiers import in_tiers
from trees import enable_x64

import clipfx
from clipfx._core import reductions, spectra


def clip(x, limit, steps=1, **kwargs):
    tx = clipfx.clip_spectrum(limit, **kwargs)
    tree = {"w": jnp.asarray(x, getattr(x, "dtype", None) or jnp.float32)}
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(steps):
        out, state = update(tree, state)
    return out["w"], state


GOLDEN = {
    "symmetric": (
        [[3, 1], [1, 3]],
        3,
        [[2.5, 0.5], [0.5, 2.5]],
        [[2.0320503, 0.3679497], [0.3679497, 2.0320503]],
        [[2.25, 0.75], [0.75, 2.25]],
    ),
    "square": (
        [[3, 0], [4, 5]],
        3,
        [[2.1708204, -0.8291796], [1.5124612, 2.5124612]],
        [[1.8150480, -0.5903032], [1.4362254, 2.2380092]],
        [[1.3416408, 0], [1.7888544, 2.2360680]],
    ),
    "tall": (
        [[1, 2], [3, 4], [5, 6]],
        2,
        [[-0.0717874, 0.6423500], [0.5530977, 0.9004701], [1.1779827, 1.1585903]],
        [[-0.0666287, 0.6257797], [0.5422835, 0.8804746], [1.1511957, 1.1351695]],
        [[0.2099623, 0.4199247], [0.6298870, 0.8398493], [1.0498117, 1.2597740]],
    ),
    "rank one": ([[3, 0], [4, 0]], 1, [[0.6, 0], [0.8, 0]], None, [[0.6, 0], [0.8, 0]]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_known_matrices(name):
    x, limit, *outs = GOLDEN[name]
    for response, expected in zip(("hard", "soft", "rescale"), outs, strict=True):
        if expected is not None:
            out, state = clip(np.float32(x), float(limit), steps=20, response=response)
            np.testing.assert_allclose(out, expected, rtol=0, atol=1.5e-5)
            largest = np.linalg.norm(np.float64(x), 2)
            np.testing.assert_allclose(state.metrics.norm, [largest], rtol=1e-6)


# ---------------------------------------------------------------------- the iteration


def coupled(x, limit, steps):
    """What was published for `soft`, with a fixed number of steps, in float64."""
    a = np.eye(len(x)) + x @ x.T / limit**2
    size = np.linalg.norm(a)
    y, z = a / size, np.eye(len(x))
    for _ in range(steps):
        t = 1.5 * np.eye(len(x)) - 0.5 * z @ y
        y, z = y @ t, t @ z
    return z @ x / np.sqrt(size)


@pytest.mark.parametrize(("ratio", "kept"), [(10, 1.00), (30, 0.98), (100, 0.53),
                                             (1000, 0.058)])  # fmt: skip
def test_published_iteration_loses_small_values_and_this_one_does_not(ratio, kept):
    x = drawn((16, 24), [ratio, *[0.1] * 15])
    expected = TARGETS["soft"](np.array([0.1]), 1.0)[0]
    small = np.linalg.svd(coupled(x, 1.0, 10), compute_uv=False)[-1]
    assert small / expected == pytest.approx(kept, abs=0.05)
    ours = np.linalg.svd(clip(np.float32(x), 1.0)[0], compute_uv=False)[-1]
    assert ours / expected == pytest.approx(1, abs=1e-3)


def far_from(ratio):
    """Matrices with singular values a tenth of the bound, and up to a ratio of it."""
    return {
        "one": drawn((24, 40), [ratio, *[0.1] * 23]),
        "half": drawn((24, 40), [ratio] * 12 + [0.1] * 12, 1),
        "all": drawn((24, 40), np.geomspace(ratio, 0.1, 24), 2),
        "beside the bound": drawn((24, 40), [ratio, *np.linspace(0.9, 1.1, 23)], 3),
    }


@functools.cache
def bounded(response, precision="highest"):
    fun = functools.partial(
        spectra.bounded, split=spectra.Split(), response=response, precision=precision
    )
    return jax.jit(lambda x: fun(x[None], jnp.ones(1))[0])


@pytest.mark.parametrize("response", ["soft", "hard"])
@pytest.mark.parametrize("ratio", [0.5, 3, 1e2, 1e4])
def test_every_singular_value_is_right(response, ratio):
    for x in far_from(ratio).values():
        assert worst(bounded(response)(jnp.asarray(x, jnp.float32)), x, response) < (
            1e-5 if ratio < 1e2 else 1e-2
        )


class Rounding:
    """`jax.numpy` whose products are sums of products of halves, as a TPU has them."""

    def __init__(self, passes):
        self.passes = passes

    def __getattr__(self, name):
        return self._matmul if name == "matmul" else getattr(jnp, name)

    def _matmul(self, x, y, precision):
        def halves(x):
            first = x.astype(jnp.bfloat16).astype(jnp.float32)
            return first, (x - first).astype(jnp.bfloat16).astype(jnp.float32)

        (a, b), (c, d) = halves(x), halves(y)
        terms = [(a, c), (a, d), (b, c)][: self.passes]
        return sum(jnp.matmul(*term, precision="highest") for term in terms)


@pytest.mark.parametrize(
    ("response", "passes", "ratio"),
    [("soft", 1, 1e2), ("soft", 3, 1e3), ("hard", 3, 1e3)],
)
def test_products_in_bfloat16(response, passes, ratio, monkeypatch):
    monkeypatch.setattr(spectra, "jnp", Rounding(passes))
    fun = jax.jit(
        lambda x: spectra.bounded(
            x[None], jnp.ones(1), spectra.Split(), response, "highest"
        )[0]
    )
    for x in far_from(ratio).values():
        out = fun(jnp.asarray(x, jnp.float32))
        assert worst(out, x, response, 2.0**-7 if passes == 1 else 3e-4) < 2e-2
    x = drawn((64, 256), [ratio, *[0.1] * 63])
    out = fun(jnp.asarray(x, jnp.float32))
    assert worst(out, x, response, 2.0**-7 if passes == 1 else 3e-4) < 1e-2


@pytest.mark.parametrize("response", ["soft", "hard"])
@pytest.mark.parametrize("ratio", [3, 1e2, 1e4])
def test_every_singular_value_is_right_in_bfloat16(response, ratio):
    x = jnp.asarray(drawn((24, 96), [ratio, *[0.1] * 23]), jnp.bfloat16)
    out = bounded(response)(x.astype(jnp.float32)).astype(jnp.bfloat16)
    wide = lambda y: y.astype(jnp.float32)
    assert worst(wide(out), wide(x), response, 2.0**-8) < 1e-2


@pytest.mark.parametrize("response", ["soft", "hard"])
def test_double_precision(response):
    with enable_x64():
        x = drawn((6, 9), [1e3, 50, 2, 0.7, 0.1, 1e-3])
        out, _ = clip(x, 1.0, response=response)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, oracle(x, 1.0, response), rtol=0, atol=1e-9)


def test_steps_are_the_closest_polynomials():
    """They alternate four times around the middle of their range, and end below 1."""
    *steps, before, last = spectra.STEPS
    ends = [least for least, _ in [*steps[1:], before]]
    for (least, p), after in zip(steps, ends, strict=True):
        assert_closest(p, least, 1 + 2.0**-7, after)
    assert_closest(before[1], before[0], 1, last[0])
    x = np.linspace(last[0], 1, 1001)
    np.testing.assert_allclose(last[1] @ np.stack([x, x**3, x**5]), 1, atol=1e-12)


def assert_closest(p, least, most, after):
    x = np.geomspace(least, most, 400_001)
    y = x * (p[0] + p[1] * x**2 + p[2] * x**4)
    low, high = y.min(), y.max()
    turns = [y[0], *y[1:-1][np.diff(np.sign(np.diff(y))) != 0], y[-1]]
    assert len(turns) == 4
    np.testing.assert_allclose(turns, [low, high, low, high], rtol=2e-4, atol=1e-7)
    assert high == pytest.approx(1, abs=1e-6)
    assert low == pytest.approx(after, rel=1e-2)


@pytest.mark.parametrize("response", ["soft", "hard"])
def test_derivative_is_that_of_the_rule(response):
    with enable_x64():
        x, d = (np.random.default_rng(k).normal(size=(3, 4)) for k in range(2))
        tx = clipfx.clip_spectrum(0.8, response=response)
        state = tx.init({"w": x})
        fun = jax.jit(lambda x: tx.update({"w": x}, state)[0]["w"])
        _, along = jax.jvp(fun, (jnp.asarray(x),), (jnp.asarray(d),))
        ahead, behind = (oracle(x + h * d, 0.8, response) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=0, atol=1e-6)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)))
        back = jax.jit(jax.grad(lambda x: jnp.vdot(fun(x), weights)))(x)
        assert jnp.vdot(back, d) == pytest.approx(float(jnp.vdot(along, weights)))


@pytest.mark.parametrize("response", ["soft", "hard"])
@pytest.mark.parametrize("at_once", [2**22, 2 * 24 * 40])
def test_one_device_takes_as_many_steps_as_it_needs(response, at_once, monkeypatch):
    """By branches, in parts, and leaves of one shape in one program."""
    monkeypatch.setattr(reductions, "forced_device", "one")
    monkeypatch.setattr(spectra, "_AT_ONCE", at_once)
    rows = [x for ratio in (0.3, 3, 1e2, 1e4) for x in far_from(ratio).values()]
    one, *rows = map(np.float32, rows)
    tree = {
        "a": one,
        "b": np.stack(rows[:8]),
        **dict(zip("cdefghi", rows[8:], strict=True)),
    }
    tx = clipfx.clip_spectrum(1.0, response=response)
    state = tx.init(tree)
    step = jax.jit(tx.update).lower(tree, state).compile()
    assert "conditional(" in step.as_text()
    out, _ = step(tree, state)
    got = [*out.pop("b"), *list(out.values())[1:]]
    for x, y in zip([one, *rows], [out["a"], *got], strict=True):
        assert worst(y, x, response) < 1e-2


@pytest.mark.parametrize("response", ["soft", "hard"])
def test_one_device_differentiates_what_a_branch_leaves_out(response, monkeypatch):
    monkeypatch.setattr(reductions, "forced_device", "one")
    with enable_x64():
        x = np.random.default_rng(0).normal(size=(3, 4))
        tx = clipfx.clip_spectrum(0.8, response=response)
        state = tx.init({"w": x})
        fun = lambda x: jnp.sum(tx.update({"w": x}, state)[0]["w"] ** 3)
        slope = jax.jit(jax.grad(fun))(x)
        ahead, behind = (np.sum(oracle(x * (1 + h), 0.8, response) ** 3)
                         for h in (1e-6, -1e-6))  # fmt: skip
        assert np.vdot(slope, x) == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)


# ------------------------------------------------------------------- what a matrix is


KINDS = {
    "stacked layers": ((3, 4, 6), None, lambda x: x),
    "convolution": ((2, 3, 4, 5), None, lambda x: x.reshape(24, 5)),
    "heads": ((6, 2, 4), (0, (1, 2)), lambda x: x.reshape(6, 8)),
    "each head": ((6, 2, 4), (0, 2), lambda x: x.transpose(1, 0, 2)),
    "as Muon has it": (
        (5, 3, 4),
        optax.contrib.MuonDimensionNumbers((0,), (2,)),
        lambda x: x.transpose(1, 0, 2),
    ),
    "from the end": ((3, 4), (-2, -1), lambda x: x),
    "vector": ((7,), None, lambda x: x[None]),
    "columns alone": ((4, 3), ((), 0), lambda x: x.T[:, None]),
    "scalar": ((), None, lambda x: x[None, None]),
}
USUAL = {"stacked layers", "convolution", "heads", "columns alone"}


@pytest.mark.parametrize("kind", in_tiers(KINDS, USUAL))
def test_axes_say_what_a_matrix_is(kind):
    shape, axes, matrices = kind
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for response in ("soft", "rescale"):
        out, state = clip(x, 0.7, steps=30, response=response, axes=axes)
        flat = np.atleast_3d(matrices(x).T).T  # [B, m, n]
        expected = np.stack([oracle(each, 0.7, response) for each in flat])
        got = np.atleast_3d(matrices(np.asarray(out)).T).T
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)
        largest = np.linalg.norm(flat, 2, (1, 2)).max()
        np.testing.assert_allclose(state.metrics.norm, [largest], rtol=1e-3)


def test_axes_by_path_and_thresholds_by_group():
    tree = {
        "conv": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32),
        "dense": {"bias": np.float32([3, 4]), "kernel": np.float32([[3, 1], [1, 3]])},
    }
    tx = clipfx.clip_spectrum(
        {"conv": 0.5, "dense": 3.0},
        groups={"conv": "conv", "dense": "dense"},
        axes={"conv": ((0, 1), 2)},
    )
    state = tx.init(tree)
    out, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, tree), state)
    conv = oracle(tree["conv"].reshape(6, 4), 0.5, "soft").reshape(2, 3, 4)
    np.testing.assert_allclose(out["conv"], conv, atol=1e-5)
    np.testing.assert_allclose(
        out["dense"]["kernel"], GOLDEN["symmetric"][3], atol=1e-5
    )
    # A vector by its norm, 5, with the threshold of its layer.
    np.testing.assert_allclose(
        out["dense"]["bias"], np.float32([3, 4]) / np.sqrt(1 + (5 / 3) ** 2), rtol=1e-6
    )
    assert clipfx.metrics.read(state)["clip0/norm/dense"] == pytest.approx(5, rel=1e-5)


def test_mapped_over_stacked_layers_each_has_a_threshold():
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    for response in ("soft", "hard"):
        tx = clipfx.per_stacked_layer(clipfx.clip_spectrum(0.7, response=response))
        out, state = jax.jit(tx.update)({"w": x}, tx.init({"w": x}))
        np.testing.assert_allclose(out["w"], oracle(x, 0.7, response), atol=1e-5)
    assert state.metrics.norm.shape == (3, 1)


# ---------------------------------------------------------------- measures and rules


def test_search_goes_on_where_the_last_step_ended():
    """Values that are close together need many rounds, however few a step."""
    x = drawn((24, 24), [1.0, *np.linspace(0.97, 0.9, 23)]).astype(np.float32)
    _, first = clip(x, 10.0, response="rescale", rounds=1)
    _, later = clip(x, 10.0, steps=60, response="rescale", rounds=1)
    assert abs(float(first.metrics.norm[0]) - 1) > 0.01
    assert float(later.metrics.norm[0]) == pytest.approx(1, abs=2e-3)


def test_rules_of_other_methods_see_singular_values():
    """An average of them, as AdaGC has it, and a quantile."""
    trees = [{"w": jnp.asarray(drawn((4, 6), [s, 0.1, 0.1, 0.1]), jnp.float32)}
             for s in (1.0, 1.1, 5.0)]  # fmt: skip
    for rule in (clipfx.adagc(1.2, decay=0.9, warmup_steps=0), clipfx.autoclip(50.0)):
        spectral = clipfx.clip_spectrum(rule, response="hard", rounds=20)
        by_norm = clipfx.clip_by_norm(rule, groups="leaf")
        states = spectral.init(trees[0]), by_norm.init(trees[0])
        steps = jax.jit(spectral.update), jax.jit(by_norm.update)
        for tree in trees:
            out, one = steps[0](tree, states[0])
            _, other = steps[1]({"w": largest_alone(tree["w"])}, states[1])
            states = one, other
        limit = float(one.metrics.threshold[0])
        assert limit == pytest.approx(float(other.metrics.threshold[0]), rel=1e-5)
        assert 1 < limit < 2
        assert np.linalg.norm(out["w"], 2) == pytest.approx(limit, rel=1e-5)
        np.testing.assert_allclose(np.linalg.svd(out["w"])[1][1:], 0.1, rtol=1e-4)


def largest_alone(x):
    """A matrix of the same shape whose norm is the largest singular value."""
    return jnp.zeros_like(x).at[0, 0].set(jnp.linalg.norm(x, 2))


def test_a_transform_that_has_no_rule_is_no_threshold():
    call = lambda: clipfx.clip_spectrum(optax.clip(1.0))
    raises_one_sentence((call, TypeError, "a threshold must be a rule"))


@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-34])
def test_extreme_magnitudes(size):
    x = drawn((4, 6), [0.9, 0.1, 0.05, 0.01])
    for response in TARGETS:
        limit = np.float32(0.3 * size)
        out, state = clip(np.float32(x * size), limit, steps=8, response=response)
        expected = oracle(x, 0.3, response)
        np.testing.assert_allclose(np.float64(out) / size, expected, rtol=0, atol=1e-5)
        assert float(state.metrics.norm[0]) / size == pytest.approx(0.9, rel=1e-4)
    # Far beyond the bound: nothing is longer than it.
    out, _ = clip(np.float32(x * size), size * 1e-12)
    assert np.linalg.norm(np.float64(out), 2) <= size * 1e-12 * (1 + 1e-4)


def test_nothing_below_the_bound_changes():
    x = drawn((4, 6), [0.5, 0.4, 0.2, 0.1]).astype(np.float32)
    for limit, response in ((1.0, "hard"), (1.0, "rescale"), (1e5, "soft")):
        out, state = clip(x, limit, response=response)
        np.testing.assert_array_equal(out, x)
        assert int(state.metrics.clipped[0]) == 0


def test_a_bad_matrix_spoils_or_empties_its_group_and_nothing_else():
    good = drawn((3, 3), [2.0, 1.0, 0.1]).astype(np.float32)
    bad = good.copy()
    bad[1, 1] = np.inf
    for nonfinite, expected in (("propagate", np.nan), ("zero", 0.0)):
        tx = clipfx.clip_spectrum(1.0, nonfinite=nonfinite)
        state = tx.init({"a": bad, "b": good})
        out, after = jax.jit(tx.update)({"a": bad, "b": good}, state)
        np.testing.assert_array_equal(out["a"], np.full((3, 3), expected))
        np.testing.assert_allclose(out["b"], oracle(good, 1.0, "soft"), atol=1e-5)
        assert after.metrics.nonfinite.tolist() == [1, 0]
        jax.tree.map(np.testing.assert_array_equal, after.rule_state, state.rule_state)


ONES = np.ones((2, 2), np.float32)
BAD = [
    (lambda: clip(ONES, -1.0), ValueError, "must be >= 0"),
    (lambda: clip(ONES, 1.0, response="tanh"), ValueError, '"soft", "hard"'),
    (
        lambda: clip(ONES, 1.0, rounds=0.5),
        TypeError,
        "rounds must be an int",
    ),
    (lambda: clip(ONES, 1.0, precision="low"), ValueError, "precision must"),
    (
        lambda: clip(ONES, 1.0, response="hard", precision="default"),
        ValueError,
        '"highest" or "high", got',
    ),
    (lambda: clip(ONES, 1.0, axes=(0, 0)), ValueError, r"two .*axes"),
    (lambda: clip(ONES, 1.0, axes=(0, 2)), ValueError, r"shape \(2, 2\)"),
    (lambda: clip(ONES, 1.0, axes=1), ValueError, "got 1 for shape"),
    (lambda: clip(ONES[0], 1.0, axis_name="x"), TypeError, "a PartitionSpec or"),
    (lambda: clip(ONES[0], 1.0, axis_name=P("x", None)), ValueError, "one entry"),
]


@pytest.mark.parametrize("case", BAD, ids=[case[2] for case in BAD])
def test_errors(case):
    raises_one_sentence(case)
