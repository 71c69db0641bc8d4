"""Forces between atoms, learned from clusters some of which have atoms too close.

    python -m examples.potential
    python -m examples.potential --data=clusters.extxyz --calm=3

Two atoms that come close repel each other with a force that explodes, and its error
with it. A neural network gives the energy of a cluster as a sum over atoms, its
gradient in their places the forces, and the loss is their mean squared error. The data
is made with ASE: icosahedra of 13 atoms, each shaken by up to --shake, with the forces
of a Lennard-Jones potential, or of effective medium theory for copper
(--calculator=emt). What counts is the error of held-out clusters that are calm, with no
force on an atom above --calm.

`global` clips the gradient of a batch, `zclip` and `quantile` do so at thresholds of
their own, `per_example` clips that of each cluster; `filtered` is the other remedy, to
train on calm clusters only. Adam is behind all of them.

--data takes any file that ASE reads with several clusters and their forces, such as
extended XYZ; all of one element, and not periodic.

Each method is shown at its best rate, by the mean over three seeds, and +- is their
standard deviation. By default, errors of the components of forces in eV/angstrom, of
calm clusters and, as a median, of all that are held out:

                   calm              all
    none           0.658  +- 0.02    2.9  +- 0.2
    zclip          0.615  +- 0.3     2.4  +- 0.7
    quantile       0.458  +- 0.04    2.7  +- 0.7
    global         0.306  +- 0.05    0.65 +- 0.05
    filtered       0.036  +- 0.001   0.95 +- 0.2
    per_example    0.0296 +- 0.003   0.26 +- 0.08

Forces of 0 everywhere have the same calm error as `none`, 0.658: that has learned
nothing. A clip of the batch bounds the step, but leaves its direction to the one
cluster that outweighs all others. With a bound on each all are of use, and calm ones
are learned a little better than `filtered` does, which sees no others. The order is the
same with --calculator=emt --shake=0.5: 0.43, 0.20, 0.16, 0.074, 0.020 and 0.016. On two
CPU cores a step takes 0.27 ms without a clip, as long with a clip of the batch, and
0.43 ms with one of each cluster.

The norms that `python -m clipfx.calibrate out/potential` reads are of a run that has
learned nothing, and scatter too far to say more than to normalise. That is of use:
`global` with the --max_norm=0.000171 that it begins with has 0.328 +- 0.02.
"""

import dataclasses
import functools
import itertools
import math
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

# From the threshold to what clips the gradient of a batch.
METHODS = {
    "none": lambda c: optax.identity(),
    "global": clipfx.clip_by_global_norm,
    "zclip": lambda c: clipfx.zclip(),
    "quantile": lambda c: clipfx.quantile_clip(0.5),
    "per_example": lambda c: optax.identity(),
    "filtered": lambda c: optax.identity(),
}
COLORS = {method: f"C{k}" for k, method in enumerate(METHODS)}
CUTOFF = 6.0  # angstrom: atoms farther apart do not see each other
CENTERS = np.linspace(1.0, CUTOFF, 12, dtype=np.float32)
SPREAD = 0.5  # angstrom, of the Gaussians around these


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all runs share; each is a flag of the same name."""

    clip: tuple[str, ...] = _run.flag(
        tuple(METHODS), "Methods to compare.", among=METHODS
    )
    rates: tuple[float, ...] = _run.flag(
        (0.001, 0.003, 0.01, 0.03, 0.1), "Learning rates.", above=0
    )
    max_norm: float = _run.flag(
        0.1, "Threshold of the clips global and per_example.", above=0
    )
    calculator: str = _run.flag("lj", "Forces to learn.", among=("lj", "emt"))
    shake: float = _run.flag(
        0.35, "Largest standard deviation of displacements, in angstrom.", above=0
    )
    clusters: int = _run.flag(500, "Clusters, a fifth of them held out.", least=10)
    calm: float = _run.flag(
        5.0, "Largest force in a cluster that is calm, in eV/angstrom.", above=0
    )
    data: str | None = _run.flag(None, "A file of clusters with forces, read by ASE.")
    width: int = _run.flag(32, "Hidden units.", least=1)
    steps: int = _run.flag(1000, "Training steps of each run.", least=1)
    batch: int = _run.flag(8, "Batch size, in clusters.", least=1)
    runs: int = _run.flag(3, "Random seeds of each variant.", least=1)
    seed: int = _run.flag(0, "First random seed.", least=0)


class Clusters(NamedTuple):
    """Clusters padded to the same number of atoms.

    Attributes:
      places: Where atoms are `[n, atoms, 3]`, in angstrom.
      forces: On each `[n, atoms, 3]`, in eV/angstrom.
      there: Whether an atom is one, and no padding `[n, atoms]`.
    """

    places: Any
    forces: Any
    there: Any

    def calm(self, limit: float) -> np.ndarray:
        """Whether no atom feels a force above the limit `[n]`."""
        return np.linalg.norm(self.forces, axis=-1).max(-1) <= limit


class Data(NamedTuple):
    """Clusters to train on, with the probability of each `[n]`; and those held out."""

    train: Clusters
    chance: Any
    test: Clusters


def make_clusters(settings: Settings, seed: int) -> Clusters:
    """Icosahedra of 13 atoms, shaken, with their forces."""
    from ase.calculators.emt import EMT
    from ase.calculators.lj import LennardJones
    from ase.cluster import Icosahedron

    rng = np.random.default_rng(seed)
    made = []
    for _ in range(settings.clusters):
        atoms = Icosahedron("Cu", 2)
        shake = rng.uniform(0.05, settings.shake)
        atoms.positions += shake * rng.normal(size=atoms.positions.shape)
        # Atoms are at rest 2.55 angstrom apart, as in copper.
        sigma = 2.55 / 2 ** (1 / 6)
        lj = LennardJones(sigma=sigma, epsilon=0.4, rc=8.0)
        atoms.calc = lj if settings.calculator == "lj" else EMT()
        made.append((atoms.positions, atoms.get_forces()))
    return pad(made)


def read_clusters(path: str) -> Clusters:
    """All clusters of a file, with the forces that stand there.

    Raises:
      ValueError: If there are none, or they are not what this model is for.
    """
    import ase.io
    from ase.calculators.calculator import PropertyNotImplementedError

    try:
        read = ase.io.read(path, ":")
    except Exception as error:  # as many kinds as there are formats
        if isinstance(error, OSError) and error.filename:  # no such file
            raise
        raise ValueError(f"ASE cannot read {path!r}: {error}") from None
    read = read if isinstance(read, list) else [read]
    if len(read) < 10:
        raise ValueError(f"{path!r} has {len(read)} clusters, and 10 are the least.")
    if any(atoms.pbc.any() for atoms in read):
        raise ValueError(f"{path!r} has periodic cells, and the model is for clusters.")
    if len({symbol for atoms in read for symbol in atoms.symbols}) != 1:
        raise ValueError(f"{path!r} must have atoms of one element only.")
    try:
        return pad([(atoms.positions, atoms.get_forces()) for atoms in read])
    except (RuntimeError, PropertyNotImplementedError):
        raise ValueError(f"{path!r} has clusters without forces.") from None


def pad(clusters: Sequence[tuple[np.ndarray, np.ndarray]]) -> Clusters:
    """Stacks places and forces of clusters of any size."""
    most = max(len(places) for places, _ in clusters)
    stack = lambda arrays: np.stack(
        [np.pad(x, [(0, most - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in arrays]
    )
    places, forces = (stack(x).astype(np.float32) for x in zip(*clusters, strict=True))
    return Clusters(places, forces, stack([np.ones(len(x), bool) for x, _ in clusters]))


def split(clusters: Clusters, method: str, settings: Settings, seed: int) -> Data:
    """Holds a fifth out; `filtered` trains on none but calm clusters."""
    order = np.random.default_rng(seed).permutation(len(clusters.places))
    test, rest = np.split(order, [len(order) // 5])
    part = lambda at: Clusters(*(x[at] for x in clusters))
    usable = part(rest).calm(settings.calm if method == "filtered" else math.inf)
    if not usable.any() or not part(test).calm(settings.calm).any():
        raise ValueError(f"no clusters are calm at --calm={settings.calm:g}.")
    return Data(part(rest), np.float32(usable / usable.sum()), part(test))


def init(settings: Settings, key: Any) -> Any:
    """Weights of a network with two hidden layers."""
    sizes = [len(CENTERS), settings.width, settings.width, 1]
    return [
        {
            "w": jax.random.normal(jax.random.fold_in(key, k), (m, n)) / m**0.5,
            "b": jnp.zeros(n),
        }
        for k, (m, n) in enumerate(itertools.pairwise(sizes))
    ]


def energy(params: Any, places: Any, there: Any) -> jax.Array:
    """Of a cluster `[atoms, 3]`: a sum over atoms, by how far the others are."""
    far = 2 * CUTOFF * (1 - there[:, None] * there * (1 - jnp.eye(len(places))))
    squares = ((places[:, None] - places) ** 2).sum(-1)
    distance = jnp.sqrt(squares + far**2)  # of pairs that are none: no kink at zero
    fade = jnp.where(distance < CUTOFF, jnp.cos(jnp.pi / CUTOFF * distance) + 1, 0)
    near = jnp.exp(-(((distance[..., None] - CENTERS) / SPREAD) ** 2) / 2)
    x = (near * fade[..., None]).sum(1)
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    each = (x @ params[-1]["w"])[:, 0]
    return (each * there).sum()


def forces(params: Any, places: Any, there: Any) -> jax.Array:
    """Minus the gradient of the energy `[atoms, 3]`."""
    return -jax.grad(energy, 1)(params, places, there)


def loss(params: Any, cluster: Clusters) -> jax.Array:
    """Mean squared error of the forces on one cluster."""
    errors = forces(params, cluster.places, cluster.there) - cluster.forces
    return (errors**2).sum() / (3 * cluster.there.sum())


def force_errors(params: Any, clusters: Clusters) -> jax.Array:
    """Mean absolute error of components of the forces, for each cluster `[n]`."""

    def one(cluster):
        wrong = forces(params, cluster.places, cluster.there) - cluster.forces
        return jnp.abs(wrong).sum() / (3 * cluster.there.sum())

    return jax.vmap(one)(clusters)


@functools.partial(jax.jit, static_argnames=("method", "settings"))
def train(
    data: Data, rate: Any, key: Any, *, method: str, settings: Settings
) -> dict[str, jax.Array]:
    """Trains one potential.

    Returns:
      Errors of held-out clusters `[n]`, and the norm of the gradient of each step
      `[steps]`, before a clip of the batch.
    """
    bounded = per_example.clipped_grad(loss, settings.max_norm)
    tx = optax.chain(
        METHODS[method](settings.max_norm),
        optax.scale_by_adam(),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, settings.steps)),
        optax.scale(-rate),
    )

    def step(carry, key):
        params, state = carry
        shape, count = (settings.batch,), len(data.chance)
        pick = jax.random.choice(key, count, shape, p=data.chance)
        batch = jax.tree.map(lambda x: x[pick], data.train)
        if method == "per_example":
            grads = optax.tree.scale(1 / settings.batch, bounded(params, batch)[0])
        else:
            mean = lambda p: jax.vmap(loss, (None, 0))(p, batch).mean()
            grads = jax.grad(mean)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    params = init(settings, jax.random.fold_in(key, 0))
    keys = jax.random.split(jax.random.fold_in(key, 1), settings.steps)
    (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), keys)
    return {"errors": force_errors(params, data.test), "norms": norms}


def score(seen: dict[str, Any], data: Data, settings: Settings) -> dict[str, float]:
    """What a table tells of a run."""
    errors, norms = np.asarray(seen["errors"]), np.asarray(seen["norms"])
    calm = data.test.calm(settings.calm)
    size = np.abs(data.test.forces).sum((1, 2)) / (3 * data.test.there.sum(1))
    return {
        "calm error": float(errors[calm].mean()),
        "median error": float(np.median(errors)),
        "calm force": float(size[calm].mean()),
        "median norm": float(np.median(norms)),
        "largest norm": float(norms.max()),
    }


def plot(rows: Sequence[dict[str, Any]], norms: Sequence[np.ndarray]) -> Figure:
    """The error over rates; and how large gradients are, of runs at the best rate."""
    of = {id(row): norm for row, norm in zip(rows, norms, strict=True)}
    figure = Figure(figsize=(9, 4), layout="constrained")
    error, sizes = figure.subplots(1, 2)
    _sweep.draw_over(error, rows, "rate", "calm error", COLORS, marker="o")
    zero = np.mean([row["calm force"] for row in rows])
    error.axhline(zero, color="k", lw=1, ls=":", label="no forces at all")
    for (method,), own in _sweep.groups(rows, ("method",)).items():
        best = _sweep.best(own, ("rate",), "-calm error")
        each = np.sort(np.concatenate([of[id(row)] for row in best]))[::-1]
        share = np.arange(1, len(each) + 1) / len(each)
        sizes.plot(each, share, color=COLORS[method], label=method)
    error.set(xlabel="learning rate", xscale="log", yscale="log")
    error.set_ylabel("error of calm clusters (eV/Å)")
    error.legend(fontsize=8)
    sizes.set(xlabel="norm of the gradient (before a clip of the batch)", xscale="log")
    sizes.set(ylabel="share of steps with a larger one", yscale="log")
    return figure


def run(settings: Settings, out: _run.Out) -> None:
    """Trains with every method and rate; prints and writes what came out."""
    seeds = range(settings.seed, settings.seed + settings.runs)
    given = read_clusters(settings.data) if settings.data else None
    clusters = {seed: given or make_clusters(settings, seed) for seed in seeds}
    rows = _sweep.every(method=settings.clip, rate=settings.rates, seed=seeds)
    norms = []
    known: set[Any] = set()
    progress = tqdm(rows, desc="runs")
    for row in progress:
        seed, method = row["seed"], row["method"]
        data = split(clusters[seed], method, settings, seed)
        rate, key = np.float32(row["rate"]), jax.random.key(seed)
        seen, seconds = _sweep.timed(
            train, known, data, rate, key, method=method, settings=settings
        )
        norms.append(np.asarray(seen["norms"]))
        row |= score(seen, data, settings)
        row["ms/step"] = 1000 * seconds / settings.steps
        note = f"{method}, rate {row['rate']:g}: error {row['calm error']:.3f}"
        progress.set_postfix_str(note, refresh=False)
    shown = ("calm error", "median error", "median norm", "largest norm", "ms/step")
    table = _sweep.compared(rows, ("method",), ("rate",), "-calm error", shown)
    print("\n" + _common.format_table([*table]))
    print(
        "calm error: mean absolute error of forces on held-out clusters that are calm; "
        "median\nerror: of all those held out; in eV/angstrom. norms: of the gradient "
        "of a batch, before\na clip of the batch; ms/step: of a training, after "
        "compiling. +-: standard deviation\nover seeds."
    )
    zero = sum(float(row["calm force"]) for row in rows) / len(rows)
    print(f"Forces of 0 everywhere have a calm error of {zero:.3g}.")
    by_step = _sweep.norms_by_step(rows, norms, ("method",), "-calm error")
    out.jsonl([*rows, *by_step])
    out.figure(plot(rows, norms), "potential.png")


if __name__ == "__main__":
    _run.main(run, Settings)
