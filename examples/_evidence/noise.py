"""What clips do to gradients on average."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import clipfx
from examples._evidence.claims import Row, at_least, at_most, judge, near, single

TITLE = "Noise: bias and variance"
NOTE = """\
A clip is odd about zero, not about the true gradient, so that symmetric noise around a
gradient that is not zero does not leave the mean alone: long steps on one side lose
more than those on the other. What symmetry does give is weaker: on average steps do
not lead uphill. Under skewed noise not even that."""

CHEN = "[Chen et al., 2020](https://arxiv.org/abs/2006.15429)"
KOLOSKOVA = "[Koloskova et al., 2023](https://arxiv.org/abs/2305.01588)"


@jax.jit
def _each_clipped(rows, max_norm):
    """Gradients `[n, d]`, each clipped by itself."""
    return jax.vmap(lambda g: clipfx.tree_clip(g, max_norm)[0])(rows)


def _mean(values, chances, max_norm=1.0):
    """The mean of a clipped gradient that takes few values."""
    rows = np.array(values, np.float32).reshape(len(values), -1)
    # At most 4 values of 2 entries: one compiled program.
    padded = np.zeros((4, 2), np.float32)
    padded[: len(rows), : rows.shape[1]] = rows
    cut = np.asarray(_each_clipped(padded, single(max_norm)), np.float64)
    return (np.array(chances) @ cut[: len(rows)])[: rows.shape[1]]


def _cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def symmetric_mean() -> Row:
    """1/2 plus or minus 1."""
    return judge(
        "Under noise that is symmetric around the true gradient clipping leaves the "
        "mean gradient what it was.",
        "½ + 1 and ½ − 1, equally likely, c = 1; mean of the clipped.",
        [near(_mean([1.5, -0.5], [0.5, 0.5]), 0.5)],
    )


def symmetric_direction() -> Row:
    """Noise that is large along one axis."""
    mean = np.array([1.0, 1.0])
    found = _mean([[11, 1], [-9, 1]], [0.5, 0.5])
    return judge(
        "Under such noise clipping does not change the direction on average.",
        "(1, 1) ± (10, 0), c = 1; cosine between the means before and after.",
        [near(_cosine(mean, found), 1.0, 0.01)],
    )


def symmetric_sign() -> Row:
    """What is left of the claim, and where it ends."""
    cases = [([1.5, -0.5], 0.5), ([10.1, -9.9], 0.1), ([[11, 1], [-9, 1]], [1, 1])]
    inner = [float(_mean(v, [0.5, 0.5]) @ np.ravel(mean)) for v, mean in cases]
    skewed = float(0.1 * _mean([10, -1], [0.1, 0.9])[0])
    return judge(
        "On average clipped steps never lead uphill: their mean has no negative inner "
        "product with the true gradient.",
        "Three cases of symmetric noise, least product; and 10 with chance 0.1, else "
        "−1, c = 1.",
        [at_least(round(min(inner), 6), 0.0, label="symmetric")],
        [at_least(skewed, 0.0, label="skewed")],
        source=CHEN,
    )


def centred() -> Row:
    """Noise alone."""
    values, chances = [10, 1, -1, -10], [0.1, 0.4, 0.4, 0.1]
    means = [float(_mean(values, chances, c)[0]) for c in (1, 3)]
    return judge(
        "Where the true gradient is zero symmetric noise stays without bias.",
        "±10 with chance 0.1 each, ±1 with 0.4 each, c = 1 and c = 3; mean.",
        [near(max(means, key=abs), 0.0, 1e-6)],
    )


def variance() -> Row:
    """Normal noise, and noise with heavy tails."""
    shape = 2000, 16
    ratios = {}
    for name in ("normal", "Student's t"):
        ratios[name] = []
        for seed in range(5):
            rng = np.random.default_rng(seed)
            normal, heavy = rng.normal(size=shape), rng.standard_t(3, size=shape)
            rows = single(0.5 + (normal if name == "normal" else heavy))
            cut = np.asarray(_each_clipped(rows, single(3.0)))
            ratios[name].append(cut.var(0).sum() / rows.var(0).sum())
    return judge(
        "Clipping reduces the variance of the step.",
        "2,000 gradients of 16 entries, ½ plus noise, c = 3; variance after over "
        "before.",
        [at_most(values, 0.99, label=name) for name, values in ratios.items()],
    )


def any_threshold() -> Row:
    """Descent without noise, at thresholds far apart."""
    curvature = single(np.geomspace(0.1, 1, 8))

    @jax.jit
    def left(max_norm):
        """The norm of the gradient after 50,000 steps, over that of the first."""

        def step(x, _):
            return x - 0.5 * clipfx.tree_clip(curvature * x, max_norm)[0], None

        x, _ = jax.lax.scan(step, jnp.ones(8), None, length=50_000)
        return clipfx.global_norm(curvature * x) / jnp.linalg.norm(curvature)

    return judge(
        "Without noise clipped descent reaches the minimum whatever the threshold.",
        "A quadratic in 8 dimensions, c = 10, 0.1 and 0.001, 50,000 steps: largest "
        "gradient left, over the first.",
        [at_most(max(float(left(single(c))) for c in (10, 0.1, 0.001)), 1e-6)],
        source=KOLOSKOVA,
    )


def floor() -> Row:
    """Where clipped descent on a quadratic stops, under the worst noise of two points.

    Noise is s/p with chance p, else -s/(1-p); of all p that which moves the point at
    which the mean clipped gradient vanishes farthest.
    """

    def rest(sigma, max_norm):
        far = 0.0
        for chance in np.geomspace(1e-4, 0.5, 60):
            # Both have mean 0 and variance sigma^2.
            up = sigma * math.sqrt((1 - chance) / chance)
            down = -sigma * math.sqrt(chance / (1 - chance))
            low, high = -up, -down
            mean = lambda x, up=up, down=down, p=chance: (
                p * np.clip(x + up, -max_norm, max_norm)
                + (1 - p) * np.clip(x + down, -max_norm, max_norm)
            )
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if mean(middle) < 0 else (low, middle)
            far = max(far, abs(low))
        return far

    ratio = lambda sigma, c: rest(sigma, c) / min(sigma, sigma**2 / c)
    found = [ratio(1.0, c) for c in (1, 2, 4, 8, 16)]
    return judge(
        "Under skewed noise of deviation σ clipped SGD stops where the gradient is of "
        "the order of min(σ, σ²/c), however small the learning rate.",
        "A quadratic, σ = 1, c from 1 to 16, worst of all two-point noises; rest over "
        "σ²/c: least and largest.",
        [at_least(min(found), 0.1, label="least"),
         at_most(max(found), 1.0, label="largest")],
        source=KOLOSKOVA,
    )  # fmt: skip


CLAIMS = [symmetric_mean, symmetric_direction, symmetric_sign, centred, variance,
          any_threshold, floor]  # fmt: skip
