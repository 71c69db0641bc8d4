"""Boxes around digits, regressed with losses of their overlap, with and without a clip.

    python -m examples.boxes
    python -m examples.boxes --loss=ciou --batch=8

A digit, stretched and anywhere on a noisy canvas, is to be framed. The loss of UnitBox,
`log`, is -log(IoU): its gradient grows as 1 over the overlap, and with the inverse of
the sides of a box that degenerates. Where boxes do not meet any more it is 0, so that a
network thrown that far stays there. GIoU has a gradient there too, and CIoU, which adds
the distance of the centres and the ratio of the sides, has 1 / (w^2 + h^2) in its
gradient. `value` clips each element of the gradient, `global` its norm, `per_example`
the norm for each image.

Each is shown at its best rate, by the mean over three seeds, and +- is their standard
deviation. By default, in mean IoU on held-out images:

            none             value            global           per_example
    log     0.233 +- 0.2     0.511 +- 0.004   0.509 +- 0.002   0.512 +- 0.005
    giou    0.519 +- 0.0009  0.529 +- 0.002   0.513 +- 0.004   0.509 +- 0.004
    ciou    0.518 +- 0.003   0.524 +- 0.002   0.512 +- 0.001   0.511 +- 0.003

Without a clip the logarithm loses all boxes with some seed at every rate, and any clip
keeps them. GIoU and CIoU need none: here their gradients stay below 10. `value` helps
them a little, and bounds of a norm do not, but train at larger rates. On two CPU cores
a step takes 0.10 to 0.11 ms without a clip, as long with `value`, and up to 0.01 ms and
0.02 ms more with `global` and `per_example`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import clipfx
from clipfx import per_example
from examples import _common, _run, _sweep

# From thresholds of the norm and of an element to what clips the gradient of a batch.
METHODS = {
    "none": lambda norm, value: optax.identity(),
    "value": lambda norm, value: clipfx.clip_by_value(value),
    "global": lambda norm, value: clipfx.clip_by_global_norm(norm),
    "per_example": lambda norm, value: optax.identity(),
}
COLORS = {method: f"C{k}" for k, method in enumerate(METHODS)}
CANVAS = 24  # pixels
LEAST = 1e-3  # side of a box, in canvases
OVERLAP = 1e-6  # least IoU of which a logarithm is taken


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs share; each is a flag of the same name."""

    loss: tuple[str, ...] = _run.flag(
        ("log", "giou", "ciou"), "Losses to compare.", among=("log", "giou", "ciou")
    )
    clip: tuple[str, ...] = _run.flag(
        tuple(METHODS), "Methods to compare.", among=METHODS
    )
    rates: tuple[float, ...] = _run.flag(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "Learning rates.", above=0
    )
    max_norm: float = _run.flag(1.0, "Threshold of global and per_example.", above=0)
    max_value: float = _run.flag(0.1, "Threshold of value.", above=0)
    images: int = _run.flag(3000, "Images, a third of them held out.", least=3)
    width: int = _run.flag(64, "Hidden units.", least=1)
    steps: int = _run.flag(1200, "Training steps of each run.", least=1)
    batch: int = _run.flag(32, "Batch size.", least=1)
    runs: int = _run.flag(3, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Data(NamedTuple):
    """Images `[n, pixels]` with corners `[n, 4]`: left, top, right, bottom."""

    images: Any
    boxes: Any
    test_images: Any
    test_boxes: Any


def make_data(settings: Settings, seed: int) -> Data:
    """Digits cut to what is drawn, stretched by 0.4 to 2.2 along each side."""
    digits, _ = _common.load_digits()
    rng = np.random.default_rng(seed)
    images = 0.1 * rng.normal(size=(settings.images, CANVAS, CANVAS))
    boxes = np.empty((settings.images, 4))
    for image, box in zip(images, boxes, strict=True):
        digit = digits[rng.integers(len(digits))].reshape(8, 8) / 2 + 0.5
        ink = digit > 0.2
        digit = digit[np.ix_(ink.any(1), ink.any(0))]
        size = np.round(digit.shape * rng.uniform(0.4, 2.2, 2)).clip(2).astype(int)
        rows, columns = (
            np.arange(n) * m // n for n, m in zip(size, digit.shape, strict=True)
        )
        top, left = rng.integers(CANVAS - size + 1)
        height, width = size
        place = image[top : top + height, left : left + width]
        place += digit[np.ix_(rows, columns)]
        box[:] = left, top, left + width, top + height
    images = images.reshape(len(images), -1).astype(np.float32)
    boxes = (boxes / CANVAS).astype(np.float32)
    test = settings.images // 3
    return Data(images[test:], boxes[test:], images[:test], boxes[:test])


def init(settings: Settings, key: Any) -> Any:
    """Weights of a network with one hidden layer, that starts near the middle."""
    shapes = {"in": (CANVAS**2, settings.width), "out": (settings.width, 4)}
    keys = dict(zip(shapes, jax.random.split(key), strict=True))
    weights = {
        k: jax.random.normal(keys[k], s) / s[0] ** 0.5 for k, s in shapes.items()
    }
    offset = jnp.array([0.5, 0.5, 0.3, 0.3])
    return weights | {"bias": jnp.zeros(settings.width), "offset": offset}


class Pair(NamedTuple):
    """Areas `[...]` of two boxes, and what the losses are made of.

    Attributes:
      iou: Intersection over union.
      empty: Share of the smallest box around both that neither covers.
      apart: Squared distance of the centres over the squared diagonal of that box.
      wrong_ratio: Squared difference of the angles of the diagonals, at most 1.
    """

    iou: Any
    empty: Any
    apart: Any
    wrong_ratio: Any


def compare(found: Any, right: Any) -> Pair:
    """Compares boxes: centre and sides `[..., 4]` with corners `[..., 4]`."""
    centre, sides = found[..., :2], jnp.maximum(found[..., 2:], LEAST)
    low, high = right[..., :2], right[..., 2:]
    first, last = centre - sides / 2, centre + sides / 2
    both = jnp.maximum(jnp.minimum(last, high) - jnp.maximum(first, low), 0).prod(-1)
    union = sides.prod(-1) + (high - low).prod(-1) - both
    hull = jnp.maximum(last, high) - jnp.minimum(first, low)
    angle = lambda sides: jnp.arctan(sides[..., 0] / sides[..., 1])
    return Pair(
        both / union,
        1 - union / hull.prod(-1),
        ((centre - (low + high) / 2) ** 2).sum(-1) / (hull**2).sum(-1),
        (2 / jnp.pi * (angle(sides) - angle(high - low))) ** 2,
    )


def overlap_loss(pair: Pair, loss: str) -> jax.Array:
    """The loss of one pair of boxes."""
    if loss == "log":
        return -jnp.log(jnp.maximum(pair.iou, OVERLAP))
    if loss == "giou":
        return 1 - pair.iou + pair.empty
    weight = pair.wrong_ratio / (1 - pair.iou + pair.wrong_ratio + 1e-7)
    ratio = jax.lax.stop_gradient(weight) * pair.wrong_ratio
    return 1 - pair.iou + pair.apart + ratio


def frame(params: Any, image: Any) -> jax.Array:
    """Centre and sides of the box `[..., 4]` around what is on images `[..., n]`."""
    hidden = jax.nn.relu(image @ params["in"] + params["bias"])
    return hidden @ params["out"] + params["offset"]


@functools.partial(jax.jit, static_argnames=("loss", "method", "settings"))
def train(
    data: Data, rate: Any, key: Any, *, loss: str, method: str, settings: Settings
) -> dict[str, jax.Array]:
    """Trains one network.

    Returns:
      `iou` of held-out images `[n]`, and the norm of the gradient of each step
      `[steps]`, before a clip of the batch.
    """
    one = lambda p, image, box: overlap_loss(compare(frame(p, image), box), loss)
    bounded = per_example.clipped_grad(one, settings.max_norm, batch_argnums=(1, 2))
    tx = optax.chain(
        METHODS[method](settings.max_norm, settings.max_value),
        optax.sgd(optax.cosine_decay_schedule(1.0, settings.steps), momentum=0.9),
        optax.scale(rate),
    )

    def step(carry, key):
        params, state = carry
        pick = jax.random.randint(key, (settings.batch,), 0, len(data.images))
        batch = data.images[pick], data.boxes[pick]
        if method == "per_example":
            grads = optax.tree.scale(1 / settings.batch, bounded(params, *batch)[0])
        else:
            mean = lambda p: jax.vmap(one, (None, 0, 0))(p, *batch).mean()
            grads = jax.grad(mean)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    params = init(settings, jax.random.fold_in(key, 0))
    keys = jax.random.split(jax.random.fold_in(key, 1), settings.steps)
    (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), keys)
    pair = compare(frame(params, data.test_images), data.test_boxes)
    return {"iou": jnp.where(jnp.isfinite(pair.iou), pair.iou, 0), "norms": norms}


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """IoU over rates, a panel for each loss."""
    panels = _sweep.groups(rows, ("loss",))
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, ((loss,), runs) in zip(every, panels.items(), strict=True):
        _sweep.draw_over(axes, runs, "rate", "iou", COLORS, marker="o", ms=4)
        axes.set(title=loss, xlabel="learning rate", xscale="log")
    every[0].set_ylabel("mean IoU, held out")
    every[-1].legend(loc="lower left")
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Trains with every loss, method and rate; prints and writes what came out."""
    seeds = range(settings.seed, settings.seed + settings.runs)
    data = {seed: make_data(settings, seed) for seed in seeds}
    rows = _sweep.every(
        loss=settings.loss, method=settings.clip, rate=settings.rates, seed=seeds
    )
    progress = tqdm(rows, desc="runs")
    norms = []
    known: set[Any] = set()
    for row in progress:
        seen, seconds = _sweep.timed(
            train, known,
            data[row["seed"]], np.float32(row["rate"]), jax.random.key(row["seed"]),
            loss=row["loss"], method=row["method"], settings=settings,
        )  # fmt: skip
        norms.append(np.asarray(seen["norms"]))
        iou = np.asarray(seen["iou"])
        row |= {
            "iou": float(iou.mean()),
            "no overlap": float((iou == 0).mean()),
            "median norm": float(np.median(norms[-1])),
            "largest norm": float(norms[-1].max()),
            "ms/step": 1000 * seconds / settings.steps,
        }
        note = f"{row['loss']}, {row['method']}, rate {row['rate']:g}: "
        progress.set_postfix_str(note + f"IoU {row['iou']:.3f}", refresh=False)
    by, at = ("loss", "method"), ("rate",)
    shown = ("iou", "no overlap", "median norm", "largest norm", "ms/step")
    print("\n" + _common.format_table([*_sweep.compared(rows, by, at, "iou", shown)]))
    print(
        "iou: mean of held-out images, 0 where a run diverged; no overlap: share of "
        "them whose IoU\nis 0; norms: of the gradient, before a clip of the batch; "
        "ms/step: of a training, after\ncompiling. +-: standard deviation over seeds."
    )
    out.jsonl([*rows, *_sweep.norms_by_step(rows, norms, by, "iou")])
    out.figure(plot(rows), "boxes.png")


if __name__ == "__main__":
    _run.main(run, Settings)
