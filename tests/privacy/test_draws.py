"""From random bits to noise: the cipher, the counters, the inverse, the tail."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sentences import raises_one_sentence
from tiers import in_tiers
from trees import enable_x64

from clipfx.privacy import draws

KEY = jax.random.key(11)
WORDS = jax.random.key_data(KEY)
KINDS = {"gaussian": (draws.gaussian, scipy.stats.norm),
         "laplace": (draws.laplace, scipy.stats.laplace)}  # fmt: skip
# Of even order.
MOMENTS = {"gaussian": lambda k: scipy.special.factorial2(k - 1),
           "laplace": math.factorial}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


def drawn(kind, shape, dtype=jnp.float32):
    with enable_x64(True):
        return np.float64(draws.draws(KINDS[kind][0], WORDS, shape, dtype))


def of_tails(kind, numbers, dtype):
    """What 62-bit numbers of tails become, and their tails and the rest exactly."""
    numbers = np.asarray(numbers, np.uint64)
    high, low = (
        numbers >> np.uint64(31),
        (numbers & np.uint64(2**31 - 1)) << np.uint64(1),
    )
    with enable_x64(True):
        words = [jnp.asarray(x.astype(np.uint32)) for x in (high, low)]
        make = jax.jit(lambda *words: draws.of_words(KINDS[kind][0], *words, dtype))
        found, negative = make(*words), make(words[0] | jnp.uint32(2**31), words[1])
        np.testing.assert_array_equal(negative, -found)
        found = np.float64(found)
    share = lambda x: (np.float64(x) + 0.5) * 2.0**-62
    return found, share(numbers), share(np.uint64(2**62 - 1) - numbers)


def test_words_are_those_of_jax():
    with jax.threefry_partitionable(True):
        right = jax.random.key_data(jax.random.split(KEY, (6, 5, 7)))
    found = draws.threefry(WORDS, *draws._counters((6, 5, 7), None))
    np.testing.assert_array_equal(jnp.stack(found, -1), right)


@each_kind
@each_dtype
def test_inverse_is_exact_everywhere(kind, dtype):
    rng = np.random.default_rng(0)
    small = (2 ** rng.uniform(0, 62, 20_000)).astype(np.uint64)  # all magnitudes alike
    numbers = np.concatenate([np.uint64([0, 1]), small])
    numbers = np.concatenate([numbers, np.uint64(2**62 - 1) - numbers])
    found, tail, rest = of_tails(kind, numbers, dtype)
    near = rest < 0.5
    with np.errstate(divide="ignore"):  # where it is not near
        right = {
            "gaussian": np.where(
                near, math.sqrt(2) * scipy.special.erfinv(rest),
                -scipy.special.ndtri(tail / 2),
            ),
            "laplace": np.where(near, -np.log1p(-rest), -np.log(tail)),
        }[kind]  # fmt: skip
    few = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, right, rtol=4 * few, atol=4 * few)
    if dtype == jnp.float32:  # no cells of size 2^-23 around 0
        np.testing.assert_allclose(found, right, rtol=4 * few, atol=0)


@each_kind
@each_dtype
def test_draws_end_where_the_docs_say(kind, dtype):
    (last,), (chance,), _ = of_tails(kind, [0], dtype)
    ends = {"gaussian": 9.08, "laplace": 43.67}[kind]
    assert last == pytest.approx(ends, abs=0.005)
    assert chance == 2.0**-63 == pytest.approx(1.1e-19, rel=0.02, abs=0)
    assert 2 * KINDS[kind][1].sf(last) == pytest.approx(chance, rel=1e-5, abs=0)
    # The example in the docs: a billion parameters, ten thousand steps, epsilon 1.
    assert (1 + math.e) * 1e13 * chance == pytest.approx(4e-6, rel=0.02, abs=0)
    # Where draws from 23 bits end: too near to be out there once in a large model.
    before = float(jnp.sqrt(2) * jax.lax.erf_inv(jnp.float32(1 - 2**-23)))
    assert 2 * scipy.stats.norm.sf(before) > 1e-8
    assert before < 5.5 < last


@each_kind
@pytest.mark.parametrize("dtype", in_tiers([jnp.float32, jnp.float64], 2))
def test_distribution_of_millions(kind, dtype):
    count = 3_000_000
    x = np.sort(drawn(kind, (count,), dtype))
    exact, law = KINDS[kind][1].cdf(x), KINDS[kind][1]
    place = (np.arange(count) + 0.5) / count
    assert np.abs(exact - place).max() < 2 / math.sqrt(count)  # Kolmogorov
    # Anderson and Darling, whose weight is in the tails; 6 is exceeded once in 1000.
    both = law.logcdf(x) + law.logsf(x[::-1])
    assert -count - ((2 * place) * both).sum() < 6
    moment = lambda k: MOMENTS[kind](k) * (k % 2 == 0)
    for power in (1, 2, 3, 4):
        spread = math.sqrt((moment(2 * power) - moment(power) ** 2) / count)
        found = (x**power).mean()
        assert found == pytest.approx(moment(power), rel=0, abs=4 * spread)
    for far in law.isf([1e-3, 1e-4, 1e-5]):
        for seen in ((x > far).sum(), (x < -far).sum()):
            expected = count * law.sf(far)
            assert abs(seen - expected) < 4 * math.sqrt(expected)


@each_kind
def test_neighbours_and_halves_are_independent(kind):
    x = drawn(kind, (1000, 1000))
    assert np.unique(x).size > 0.9 * x.size
    y = np.abs(x)
    for a in (x, y, np.sign(x)):
        a = a - a.mean()
        for b in (np.roll(a, 1, 0), np.roll(a, 1, 1), np.roll(a, 500, 0), a.T):
            off = ~np.eye(1000, dtype=bool)
            assert abs((a * b)[off].mean()) < 4.5 * a.var() / 1000
    assert abs((np.sign(x) * (y - y.mean())).mean()) < 4.5 * y.std() / 1000
    # Low bits are even, but for the last, which is how a logarithm is rounded.
    bits = np.float32(x).view(np.uint32).ravel()
    for k in range(1, 9):
        assert abs(((bits >> k) & 1).mean() - 0.5) < 4.5 * 0.5 / 1000


def test_counters_differ():
    jax.eval_shape(lambda: draws._counters((7, 1, 2**31, 2), None))
    for shape in ((), (1,), (5,), (3, 4), (2, 3, 4)):
        high, low = draws._counters(shape, None)
        size = math.prod(shape)
        assert sorted(np.ravel(low)) == list(range(size))
        assert not np.any(high)
    # Single elements of a leaf that has more than 2^32.
    shape = (70_000, 70_000, 3)
    places = [(0, 0, 0), (0, 69_999, 2), (1, 0, 0), (1, 69_999, 2), (69_999, 69_999, 2)]
    pick = jax.jit(
        lambda: [[w[p] for w in draws._counters(shape, None)] for p in places]
    )
    assert pick.lower().compile().memory_analysis().temp_size_in_bytes < 1e6
    found = [tuple(map(int, pair)) for pair in pick()]
    assert found == [(i, 3 * j + k) for i, j, k in places]


def test_shapes_may_be_symbolic():
    pytest.importorskip("flatbuffers")
    shape = jax.export.symbolic_shape("n, m")
    draw = lambda x: draws.draws(draws.gaussian, WORDS, x.shape, x.dtype)
    known = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.export.export(jax.jit(draw))(known).call
    right = drawn("gaussian", (3, 5))
    np.testing.assert_allclose(call(jnp.zeros((3, 5))), right, rtol=1e-6)


ERRORS = [
    (lambda: draws.draws(draws.gaussian, WORDS, (2**32 + 1,), jnp.float32), ValueError,
     "leaf"),
    (lambda: draws.draws(draws.gaussian, WORDS, (3, 2**31, 4), jnp.float32), ValueError,
     "leaf"),
]  # fmt: skip


@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
