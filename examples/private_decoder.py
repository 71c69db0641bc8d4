"""A decoder that knows public text learns private text within (epsilon, delta).

    python -m examples.private_decoder
    python -m examples.private_decoder --train=lora,all --groups=global,layer
    python -m examples.private_decoder --model=2 --epsilons=0.5,inf --out=out/two

The public text is Python's own manual, the private one the docstrings of NumPy, SciPy
and scikit-learn, which are written in another way. One example is one docstring, cut
after `--length` bytes: the unit of privacy. That a docstring is among those trained on
can be told from the result within epsilon only. Docstrings held out are for measuring,
and not protected; neither is the number of docstrings.

`--train=lora` trains two thin factors beside each dense matrix of a block, by
`clipfx.privacy.dp_grad` of these alone: the rest is an argument that nothing is
differentiated by. `--train=all` trains everything. Parameters and moments are split
over the mesh as in transformer_fsdp, and noise is the same on any.

The same command resumes where it was stopped, bit for bit. A checkpoint has everything
but the secret, from which keys of noise and of batches follow: that is a file, drawn
when there is none, which whoever gets the model must not get. Nothing is logged while
training, for losses of private text are private.

By default: 3.70 bits per byte before, 3.33 to 3.35 with epsilon 1, 3.25 to 3.26 with 8
and 3.12 to 3.13 without privacy, by the secret. Trained for longer, with
`--base_steps=300 --steps=80`, it is 3.53 before, 3.04, 2.88 and 2.71. With the flags of
the second line above and `--epsilons=3,inf`: at epsilon 3 thresholds by layer cost
nothing, 3.28 where one has 3.30, and all weights gain little by being trained: 3.26,
and 3.28 by layer. Without privacy they gain more, 2.95. A private step of factors takes
0.9 to 1.1 times as long as a plain one, and as much memory; of all weights 1.0 to 1.2
times as long and 1.3 times the memory. Learning rates were chosen by the docstrings
held out, with 80 steps; epsilon does not count that choice.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import time
import warnings
from ast import (
    AST,
    AsyncFunctionDef,
    ClassDef,
    ExceptHandler,
    FunctionDef,
    Module,
    get_docstring,
    iter_child_nodes,
    match_case,
    parse,
    stmt,
)
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from clipfx import privacy
from examples import _checkpoints, _common, _processes, _run, _sampling, _training
from examples import transformer_fsdp as public
from examples._secret import Secret

PACKAGES = ("numpy", "scipy", "sklearn")
RATES = {"lora": 0.02, "all": 0.003}  # learning rates by what is trained
ROUNDS = 5  # of timing, each with one step of every kind
GROUPS = ("global", "layer")
# Of the base, besides what flags say of both.
PUBLIC: dict[str, Any] = {"batch": 64, "dropout": 0.0, "learning_rate": 4e-3}
BOTH = ("width", "layers", "heads", "length", "dtype", "seed")
END = 0  # the byte after a text, which is not counted


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What all private runs have in common; each is a flag of the same name."""

    rank: int = _run.flag(4, "Rank of the factors of --train=lora.", least=1)
    max_norm: float = _run.flag(0.1, "Bound on what one text contributes.", above=0)
    delta: float = _run.flag(1e-5, "Target delta.", above=0, below=1)
    batch: int = _run.flag(256, "Expected batch size of private steps.", least=1)
    steps: int = _run.flag(40, "Private steps of each run.", least=1)
    learning_rate: float | None = _run.flag(
        None, "First learning rate; by default by what is trained.", above=0
    )

    def rate(self, train: str) -> float:
        """The first learning rate."""
        return self.learning_rate or RATES[train]


@dataclasses.dataclass(frozen=True)
class Settings(Tuning):
    """What a command does; each is a flag of the same name."""

    text: str | None = _run.flag(
        None, "UTF-8 file of public text; by default Python's manual.", resumes=True
    )
    private: str | None = _run.flag(
        None, "UTF-8 file, a private text a line; by default docstrings.", resumes=True
    )
    epsilons: tuple[float, ...] = _run.flag(
        (1.0, 8.0, math.inf), "Target epsilons; inf is not private.",
        above=0, most=math.inf, resumes=True,
    )  # fmt: skip
    train: tuple[str, ...] = _run.flag(
        ("lora",), "What is trained.", among=RATES, resumes=True
    )
    groups: tuple[str, ...] = _run.flag(
        ("global",), "What has a norm of its own.", among=GROUPS, resumes=True
    )
    base_steps: int = _run.flag(200, "Steps of training on public text.", least=1)
    save_every: int = _run.flag(
        20, "Private steps between checkpoints.", least=1, resumes=True
    )
    width: int = _run.flag(64, "Model width.", least=1)
    layers: int = _run.flag(2, "Transformer layers.", least=1)
    heads: int = _run.flag(4, "Attention heads.", least=1)
    length: int = _run.flag(64, "Sequence length, in bytes.", least=1)
    dtype: str = _run.flag("float32", "Compute dtype.", among=("bfloat16", "float32"))
    seed: int = _run.flag(
        0, "Public seed, of first weights and public batches.", least=0
    )
    secret: str | None = _run.flag(
        None, "File of the secret; by default in --out, drawn if not there.",
        resumes=True,
    )  # fmt: skip
    data: int = _run.flag(
        0, "Data-parallel (FSDP) mesh size; 0 for all remaining devices.",
        least=0, resumes=True,
    )  # fmt: skip
    model: int = _run.flag(
        1, "Tensor-parallel mesh size; must divide --heads.", least=1, resumes=True
    )
    cpu_devices: int = _run.flag(
        2, "Simulated devices in all, if there is only a CPU.", least=1, resumes=True
    )


# ----------------------------------------------------------------------- private text


class Data(NamedTuple):
    """Texts `[count, length + 1]` to train on, and others to measure on.

    uint8: a newline, which the first byte is predicted from, the text, padding.
    """

    train: np.ndarray
    test: np.ndarray


def docstrings(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those of all modules, classes and functions, read and not imported."""
    found = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{package} is missing: pip install it, or give --private."
            )
        for path in sorted(
            pathlib.Path(spec.submodule_search_locations[0]).rglob("*.py")
        ):
            if "tests" in path.parts:
                continue
            with warnings.catch_warnings(action="ignore"):  # backslashes that are none
                tree = parse(path.read_text(encoding="utf-8"))
            kinds = (Module, ClassDef, FunctionDef, AsyncFunctionDef)
            found += [get_docstring(x) for x in blocks(tree) if isinstance(x, kinds)]
    return [text for text in found if text]


def blocks(tree: Module) -> Iterator[AST]:
    """As `ast.walk`, but of expressions, in which none is defined."""
    found: list[AST] = [tree]
    for node in found:
        yield node
        inner = (stmt, ExceptHandler, match_case)
        found += [x for x in iter_child_nodes(node) if isinstance(x, inner)]


def load_private(path: str | None, length: int) -> Data:
    """Each text once, a tenth of them held out; `ValueError` if they are too few."""
    texts = _common.load_text(path).splitlines() if path else docstrings()
    cut = dict.fromkeys(text.strip().encode()[:length] for text in texts)
    each = [b"\n" + text.ljust(length, bytes([END])) for text in cut if text]
    if len(each) < 10:
        raise ValueError(f"there are {len(each)} private texts, and it takes 10.")
    rows = np.frombuffer(b"".join(each), np.uint8).reshape(-1, length + 1)
    rows = np.random.default_rng(0).permutation(rows)
    return Data(rows[len(rows) // 10 :], rows[: len(rows) // 10])


# ------------------------------------------------------------------------------ steps


class Tuned(NamedTuple):
    """All that the next step needs but the secret, or as many shapes or shardings.

    Attributes:
      params: Float32, nested dicts: factors of rank `rank`, or all weights.
      opt_state: Of Adam.
      private: `clipfx.privacy.DPState`; without privacy nothing.
    """

    params: Any
    opt_state: Any
    private: Any


class Kind(NamedTuple):
    """What is trained, and what has a norm of its own; None: nothing is private."""

    train: str
    groups: str | None

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.train}, {self.groups or 'not private'}"


class Programs(NamedTuple):
    """What runs of a kind call, on a mesh.

    Attributes:
      start: From weights of the base (they are copied) to the first state.
      step: For a number of texts, the compiled step: from a state (donated), base,
        texts `[B, length + 1]`, bool `[B]`, a key and the noise multiplier to the next.
      bits: Of texts, given what is trained and the base: their sum, and their bytes.
      shapes: Of the state, each leaf knowing where it lies.
    """

    start: Callable[[Any], Tuned]
    step: Callable[[int], Any]
    bits: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array]]
    shapes: Tuned


def make_grad(
    kind: Kind, tuning: Tuning, loss: Callable, params: Any, key: Any, z: Any
) -> privacy.DPGrad:
    """The private gradient; the bound is that of all layers together."""
    given = {
        "noise_multiplier": z,
        "expected_batch_size": tuning.batch,
        "key": key,
        "groups": kind.groups or "global",
    }
    init = privacy.dp_grad(loss, max_norm=1.0, **given).init
    layers = jax.eval_shape(init, params).threshold.size
    return privacy.dp_grad(loss, max_norm=tuning.max_norm / math.sqrt(layers), **given)


@functools.cache
def programs(
    kind: Kind, settings: _training.Settings, tuning: Tuning, mesh: Mesh
) -> Programs:
    """Puts the pieces on a mesh."""
    lora = kind.train == "lora"
    model = _training.make_model(settings, **({"rank": tuning.rank} if lora else {}))
    graph = nnx.graphdef(nnx.eval_shape(lambda: model(nnx.Rngs(0))))
    rate = optax.linear_schedule(tuning.rate(kind.train), 0.0, tuning.steps)
    tx = optax.adam(rate)
    place = functools.partial(NamedSharding, mesh)

    def nats(params, passage, base):
        """Of each byte, and which of them are not padding."""
        parts = [base, params] if lora else [params]
        logits = nnx.merge(graph, *map(nnx.State, parts))(passage[None, :-1])[0]
        ids = passage[1:]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return jnp.where(ids != END, each, 0.0), ids != END

    def loss(params, passage, base):
        return nats(params, passage, base)[0].sum() / settings.length

    grad = functools.partial(make_grad, kind, tuning, loss)

    def start(base):
        params = base
        if lora:
            key = jax.random.fold_in(jax.random.key(settings.seed), 1)
            params = nnx.state(model(nnx.Rngs(key)), nnx.LoRAParam)
            params = nnx.to_pure_dict(params)
        private = grad(params, jax.random.key(0), 1.0).init(params)
        state = Tuned(params, tx.init(params), private if kind.groups else ())
        return jax.tree.map(jnp.copy, state)

    def step(state, base, passages, where, key, z):
        if kind.groups:
            grads, private, _ = grad(state.params, key, z)(
                state.private, state.params, passages, base, where=where
            )
        else:
            private = ()
            each = jax.vmap(loss, (None, 0, None))
            total = lambda *args: jnp.where(where, each(*args), 0).sum() / tuning.batch
            grads = jax.grad(total)(state.params, passages, base)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return Tuned(params, opt_state, private)

    def bits(params, base, passages):
        losses, real = jax.vmap(nats, (None, 0, None))(params, passages, base)
        return losses.sum() / math.log(2), real.sum()

    base = base_shapes(settings, mesh)
    shapes = jax.eval_shape(start, base)
    places = _training.shardings_of(shapes, tx, mesh)
    shapes = _training.placed(shapes, places)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=places)

    @functools.cache
    def compiled(size):
        like = functools.partial(jax.ShapeDtypeStruct, sharding=place(P("data")))
        texts = like((size, settings.length + 1), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
        given = texts, like((size,), jnp.bool), key, jax.ShapeDtypeStruct((), "float32")
        return jitted.lower(shapes, base, *given).compile()

    return Programs(
        start=jax.jit(start, out_shardings=places),
        step=compiled,
        bits=jax.jit(bits, out_shardings=place(P())),
        shapes=shapes,
    )


def base_shapes(settings: _training.Settings, mesh: Mesh) -> Any:
    """Of the weights of the base, each leaf knowing where it lies."""
    return _training.programs(settings, "global", 1.0, mesh).shapes.params


# ------------------------------------------------------------------------------- runs


class Shared(NamedTuple):
    """What all runs share, and `about`, what of it a resumed run must have the same."""

    settings: _training.Settings
    tuning: Tuning
    mesh: Mesh
    base: Any
    data: Data
    secret: Secret
    out: pathlib.Path
    about: dict[str, Any]

    @property
    def size(self) -> int:
        """Of padded batches: hardly any is larger, and devices share them evenly."""
        size = _sampling.size_for(len(self.data.train), self.tuning.batch)
        return size + -size % self.mesh.shape["data"]

    def put(self, passages: np.ndarray, where: np.ndarray) -> tuple:
        """Texts and mask on the mesh."""
        split = NamedSharding(self.mesh, P("data"))
        return jax.device_put((passages.astype(np.int32), where), split)

    def of(self, kind: Kind) -> Programs:
        """The programs of a kind."""
        return programs(kind, self.settings, self.tuning, self.mesh)


def load_base(
    settings: _training.Settings, text: str, out: pathlib.Path, mesh: Mesh, steps: int
) -> Any:
    """Weights trained on public text, or as far as `out` is, from there on."""
    data, model = mesh.shape["data"], mesh.shape["model"]
    public.train(
        settings, text, out, steps=steps, save_every=100, data=data, model=model
    )
    shapes = _training.programs(settings, "global", 1.0, mesh).shapes
    items = {"model": _training.items_of(shapes)["model"]}
    with _checkpoints.manager(out / "checkpoints") as manager:
        found = _checkpoints.restore(manager, items, lambda saved: ["model"])
    assert found is not None
    if found[0] != steps:
        raise ValueError(
            f"{out} has done {found[0]} of --base_steps={steps}: give the same, or "
            "another --out."
        )
    return _training.from_items(shapes, found[1]).params


def measure(shared: Shared, kind: Kind, params: Any) -> float:
    """Bits per byte of texts held out."""
    bits, count, size = 0.0, 0, shared.size
    for start in range(0, len(shared.data.test), size):
        texts = shared.data.test[start : start + size]
        rest = np.full((size - len(texts), texts.shape[1]), END, np.uint8)
        whole, _ = shared.put(np.concatenate([texts, rest]), np.ones(size, bool))
        some, real = jax.device_get(shared.of(kind).bits(params, shared.base, whole))
        bits, count = bits + float(some), count + int(real)
    return bits / count


@functools.cache
def account(target: float, tuning: Tuning, count: int) -> tuple[float, float]:
    """The noise multiplier of a run on `count` texts, and the epsilon it spends."""
    steps, q = tuning.steps, tuning.batch / count
    find = privacy.noise_multiplier_for
    z = find(target, tuning.delta, steps, sampling_probability=q)
    event = privacy.event(z, steps, sampling_probability=q)
    return z, privacy.epsilon(event, tuning.delta)


def items_of(state: Tuned) -> dict[str, dict[str, Any]]:
    """What to save; Orbax takes no arrays without elements."""
    return {"model": {k: x for k, x in _training.by_name(state).items() if x.size}}


def describe(shared: Shared, kind: Kind, target: float) -> dict[str, Any]:
    """All that a run is, but for the mesh: what its keys follow from."""
    rate = shared.tuning.rate(kind.train)
    run = {**kind._asdict(), "epsilon": str(target), "learning_rate": rate}
    return {**shared.about, **run}


def tune(
    shared: Shared, kind: Kind, target: float, save_every: int = 20
) -> tuple[dict[str, Any], Tuned]:
    """A run from where its folder stands: a row of results, and what it ends with."""
    tuning, count = shared.tuning, len(shared.data.train)
    z, spent = account(target, tuning, count) if kind.groups else (0.0, math.inf)
    same = describe(shared, kind, target)
    about = {
        "settings": {
            **same,
            "secret": shared.secret.mark(b""),
            "base": int(_checkpoints.checksum(shared.base)),
        }
    }

    def wanted(saved: dict) -> list[str]:
        if told := public.difference(saved, about, "settings"):
            raise ValueError(f"{told}, or another --out.")
        return ["model"]

    run, say = shared.of(kind), tqdm.write
    folder = shared.out / f"{kind.train}_{kind.groups or 'plain'}_{target:g}"
    with _checkpoints.manager(folder) as manager:
        found = _checkpoints.restore(manager, items_of(run.shapes), wanted, say)
        first, items = found or (0, {})
        state = run.start(shared.base)
        if first:
            named = _training.by_name(state) | items["model"]
            state = jax.tree.structure(state).unflatten(named.values())
            say(f"Goes on after step {first} of {folder}.")
        draws = _sampling.draw_indices(
            count, tuning.batch, tuning.steps, shared.size, shared.secret.rng(same)
        )
        key = shared.secret.key(same)
        bar = tqdm(draws, f"{kind.name}, epsilon {target:g}", tuning.steps)
        for number, index in enumerate(bar):
            if number < first:
                continue  # drawn, to be where it was
            batch = shared.put(shared.data.train[index], index >= 0)
            step = run.step(len(index))
            state = step(state, shared.base, *batch, key, np.float32(z))
            jax.block_until_ready(state)
            done = number + 1
            if done % save_every == 0 or done == tuning.steps:
                _checkpoints.save(manager, done, items_of(state), about)
    row = {
        "trained": kind.train,
        "groups": kind.groups or "",
        "target": target,
        "epsilon": spent,
        "noise multiplier": z,
        "bits/byte": measure(shared, kind, state.params),
    }
    return row, state


def costs(shared: Shared, kinds: Sequence[Kind]) -> list[dict[str, Any]]:
    """What a step of each kind takes: time, the median, in turns; memory; numbers."""
    texts, size = shared.data.train, shared.size
    texts = np.resize(texts[: shared.tuning.batch], (size, texts.shape[1]))
    batch = shared.put(texts, np.arange(size) < shared.tuning.batch)
    key, z = shared.secret.key("timing"), np.float32(1)
    steps = {kind: shared.of(kind).step(size) for kind in kinds}
    states = {kind: shared.of(kind).start(shared.base) for kind in kinds}
    times: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    for kind in [*kinds] * (ROUNDS + 1):  # the first warms up
        begin = time.perf_counter()
        states[kind] = steps[kind](states[kind], shared.base, *batch, key, z)
        jax.block_until_ready(states[kind])
        times[kind].append(1000 * (time.perf_counter() - begin))
    return [
        {
            "step": kind.name,
            "numbers": sum(x.size for x in jax.tree.leaves(states[kind].params)),
            "ms": float(np.median(times[kind][1:])),
            "MiB": steps[kind].memory_analysis().temp_size_in_bytes / 2**20,
        }
        for kind in kinds
    ]


def plot(rows: Sequence[dict], spent: Sequence[dict], delta: float) -> Figure:
    """Bits per byte against epsilon, and what steps cost."""
    figure = Figure((10, 4.5), layout="constrained")
    panels: Any = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    axes, *bars = panels
    base, *rows = rows
    axes.axhline(base["bits/byte"], color="k", lw=1, ls=":", label="public text only")
    lines: dict[str, list] = {}
    for row in rows:
        name = Kind(row["trained"], row["groups"] or None).name
        lines.setdefault(name, []).append((row["epsilon"], row["bits/byte"]))
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        if math.isinf(x[0]):
            axes.axhline(y[0], color=f"C{number}", lw=1, ls="--", label=name)
        else:
            axes.plot(x, y, f"C{number}o-", ms=4, lw=1, label=name)
    targets = sorted({x["target"] for x in rows if math.isfinite(x["target"])})
    axes.set(xlabel=f"epsilon, delta {delta:g}", xscale="log")
    axes.set_ylabel("bits per byte of private text held out")
    axes.set_xticks(targets, [f"{x:g}" for x in targets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()
    for panel, (key, title) in zip(
        bars, (("ms", "ms a step"), ("MiB", "MiB a device")), strict=True
    ):
        names = [row["step"] for row in spent]
        colors = [f"C{[*lines].index(x)}" if x in lines else "0.7" for x in names]
        panel.bar(names, [row[key] for row in spent], color=colors)
        panel.set_title(title)
        panel.tick_params("x", rotation=90)
    for panel in panels:
        panel.grid(alpha=0.3, axis="both" if panel is axes else "y")
        panel.set_axisbelow(True)
    return figure


def share(given: Settings, out: _run.Out) -> Shared:
    """Reads what flags name, and trains the base."""
    settings = _training.Settings(**PUBLIC, **{x: getattr(given, x) for x in BOTH})
    names = [field.name for field in dataclasses.fields(Tuning)]
    tuning = Tuning(**{name: getattr(given, name) for name in names})
    text = _common.load_text(given.text)
    data = load_private(given.private, settings.length)
    count = len(data.train)
    if not tuning.batch <= count < 1 / tuning.delta:
        limits = f"--batch must be at most {count}, --delta less than 1/{count}"
        raise ValueError(f"{limits}, got {tuning.batch} and {tuning.delta:g}.")
    _sampling.draw_indices(count, tuning.batch, 1, 1, np.random.default_rng(0))
    mesh = public.make_mesh(settings, given.data, given.model)
    secret = Secret(pathlib.Path(given.secret or out.folder / "secret"))
    base = load_base(settings, text, out.path("base"), mesh, given.base_steps)
    about = {
        **dataclasses.asdict(settings),
        **dataclasses.asdict(tuning),
        "base_steps": given.base_steps,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "private": secret.mark(data.train.tobytes()),
    }
    return Shared(settings, tuning, mesh, base, data, secret, out.folder, about)


def run(settings: Settings, out: _run.Out) -> None:
    """Trains the base, tunes it at each epsilon; prints and writes."""
    targets = sorted(settings.epsilons)
    private = [Kind(*x) for x in itertools.product(settings.train, settings.groups)]
    plain = [Kind(train, None) for train in settings.train]
    runs = [(kind, x) for kind in private for x in targets if math.isfinite(x)]
    runs += [(kind, math.inf) for kind in plain if math.inf in targets]
    _processes.set_up(settings.cpu_devices, 1, -1, "")
    shared = share(settings, out)
    kinds = sorted([*plain, *private], key=lambda kind: kind.train, reverse=True)
    spent = costs(shared, kinds)
    rows = [tune(shared, *run, save_every=settings.save_every)[0] for run in runs]
    base = measure(shared, Kind("all", None), shared.base)
    first = {"trained": "nothing", "groups": "", "target": 0.0, "epsilon": 0.0}
    rows = [first | {"noise multiplier": 0.0, "bits/byte": base}, *rows]
    train, test = map(len, shared.data)
    print(f"\n{train} private texts, {test} held out:\n")
    print(_common.format_table(rows))
    print(f"\nSteps of {shared.size} texts, on a mesh of {dict(shared.mesh.shape)}:\n")
    print(_common.format_table(spent))
    print(
        "\nbits/byte: of private texts held out. numbers: those trained. MiB: what a"
        "\nstep takes on a device besides its arguments."
    )
    out.jsonl([*rows, *spent])
    out.figure(plot(rows, spent, settings.delta), "private_decoder.png")


if __name__ == "__main__":
    _run.main(run, Settings)
