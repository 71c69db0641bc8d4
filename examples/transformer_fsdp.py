"""A decoder of text on a mesh of devices, in one process or many; kill it, start again.

    python -m examples.transformer_fsdp
    python -m examples.transformer_fsdp --steps=300
    python -m examples.transformer_fsdp --processes=2 --out=out/two
    python -m examples.transformer_fsdp --model=2 --clip=zclip --out=out/zclip
    srun python -m examples.transformer_fsdp --coordinator=cluster --width=2048 ...

Parameters and the state of AdamW are float32 and split over both axes of the mesh: over
"data", as in FSDP, and over "model", by the columns and rows of the dense layers.
The loss is computed in bfloat16; its gradient is that of the float32 parameters, and
clipped in float32. The clip needs no argument for any of it.

The same command resumes where it was stopped, for whatever reason; the second one above
goes on with what the first has trained, and the picture marks where. Parameters, the
state of the clip, random keys and metrics become bit for bit what they would have been.
To that end a batch depends on seed and step alone, a checkpoint holds everything else,
and metrics of steps that no checkpoint has are written again. It also resumes on
another mesh, up to rounding.

Without an accelerator it runs on eight devices simulated by the CPU. On a TPU or GPU
pod start it once for each host, with `--coordinator=cluster`.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

from clipfx import plots
from examples import _checkpoints, _common, _processes, _run
from examples._clippers import CLIPPERS, check_clippers
from examples._log import Log, read_rows, resumes_of
from examples._training import Settings, from_items, items_of, programs


@dataclasses.dataclass(frozen=True)
class Flags(Settings):
    """What a run is, and what may be another when it is resumed."""

    text: str | None = _run.flag(
        None, "UTF-8 text file; by default Python's own manual.", resumes=True
    )
    clip: str = _run.flag(
        "global", "Clipping method.", among=tuple(CLIPPERS), resumes=True
    )
    max_norm: float = _run.flag(
        1.0, "Clipping threshold, if the method takes one.", above=0, resumes=True
    )
    reset_clip_state: bool = _run.flag(
        False,
        "Resume with another clipping method than the checkpoint's.",
        resumes=True,
    )
    steps: int = _run.flag(
        200,
        "Total training steps, including those before a resume.",
        least=1,
        resumes=True,
    )
    save_every: int = _run.flag(50, "Steps between checkpoints.", least=1, resumes=True)
    data: int = _run.flag(
        0,
        "Data-parallel (FSDP) mesh size; 0 for all remaining devices.",
        least=0,
        resumes=True,
    )
    model: int = _run.flag(
        1, "Tensor-parallel mesh size; must divide --heads.", least=1, resumes=True
    )
    cpu_devices: int = _run.flag(
        8, "Simulated devices in all, if there is only a CPU.", least=1, resumes=True
    )
    processes: int = _run.flag(
        1, "Processes to start on this machine's CPU.", least=1, resumes=True
    )
    coordinator: str = _run.flag(
        "", "`cluster`, or host:port of process 0.", resumes=True
    )
    process_id: int = _run.flag(
        -1, "Index of this process, with --coordinator.", resumes=True
    )


# ------------------------------------------------------------------------------ data


def split_text(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and the last tenth, kept apart; at least a passage of each."""
    ids = np.frombuffer(text.encode(), np.uint8)
    window = length + 1
    if len(ids) < 2 * window:
        raise ValueError(
            f"the text has {len(ids)} bytes, and at length {length} it takes "
            f"{2 * window}: give a longer text or a smaller length."
        )
    cut = len(ids) - max(len(ids) // 10, window)
    return ids[:cut], ids[cut:]


def passages_at(
    ids: np.ndarray, step: int, settings: Settings, sharding: NamedSharding
) -> jax.Array:
    """Passages `[batch, length + 1]` of a step; each process cuts out its own."""
    window = settings.length + 1
    order = np.random.default_rng([settings.seed, step])
    starts = order.integers(len(ids) - window + 1, size=settings.batch)

    def cut(index):
        rows = starts[index[0], None] + np.arange(window)[index[1]]
        return ids[rows].astype(np.int32)

    shape = (settings.batch, window)
    return jax.make_array_from_callback(shape, sharding, cut)


# ------------------------------------------------------------------------------ mesh


def make_mesh(settings: Settings, data: int, model: int) -> Mesh:
    """A mesh of `data` times `model` devices; `ValueError` if that cannot be."""
    there = jax.device_count()
    data = data or max(there // model, 1)
    if data * model > there:
        raise ValueError(
            f"a mesh of --data={data} times --model={model} takes {data * model} "
            f"devices, and there are {there}."
        )
    if data * model < there and jax.process_count() > 1:
        raise ValueError(
            f"a mesh of --data={data} times --model={model} leaves some of the {there} "
            f"devices of {jax.process_count()} processes out: give all of them work."
        )
    part = settings.batch // settings.accumulate
    for name, size, axis, by in (
        ("--batch", settings.batch, "--accumulate", settings.accumulate),
        ("--batch over --accumulate", part, "--data", data),
        ("--width", settings.width, "--data", data),
        ("--width", settings.width, "--heads", settings.heads),
        ("--heads", settings.heads, "--model", model),
        ("256 bytes", 256, "--model", model),
    ):
        if size % by:
            raise ValueError(f"{name} is {size}, which {axis}={by} does not divide.")
    kinds = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), kinds, devices=devices)


# ------------------------------------------------------------------------------ runs


def difference(saved: dict, now: dict, part: str) -> str:
    """What a checkpoint and this run disagree on, in a part of what is told of them."""
    names = [k for k, v in now[part].items() if saved[part].get(k) != v]
    flags_of = lambda about: " ".join(f"--{k}={about[part].get(k)}" for k in names)
    told = (
        f"the checkpoint was trained with {flags_of(saved)}, and this run has "
        f"{flags_of(now)}: give the same"
    )
    return told if names else ""


def items_to_read(saved: dict, now: dict, reset: bool) -> list[str]:
    """Of a checkpoint; `ValueError` if this run does not go on from there."""
    if told := difference(saved, now, "settings"):
        raise ValueError(f"{told}, or another --out.")
    told = difference(saved, now, "clip")
    if told and not reset:
        raise ValueError(
            f"{told} clipper, or --reset_clip_state to go on with the new one, whose "
            "state then starts afresh."
        )
    return ["model"] if told else ["model", "clip"]


def train(
    settings: Settings,
    text: str,
    out: pathlib.Path,
    *,
    clip: str = "global",
    max_norm: float = 1.0,
    steps: int = 200,
    save_every: int = 50,
    data: int = 0,
    model: int = 1,
    reset_clip_state: bool = False,
) -> dict[str, Any] | None:
    """Trains from where `out` stands; a row of results, None if nothing was left to do.

    Every process of a run calls it; the first of them writes and tells.
    """
    check_clippers([clip])
    ids, held_out = split_text(text, settings.length)
    mesh = make_mesh(settings, data, model)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    about = {
        "settings": {**dataclasses.asdict(settings), "text": digest},
        "clip": {"clip": clip, "max_norm": max_norm},
    }
    chief = jax.process_index() == 0
    say = tqdm.write if chief else lambda text: None

    start, step, loss, shapes = programs(settings, clip, max_norm, mesh)
    rows = NamedSharding(mesh, P("data"))
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(_checkpoints.manager(out / "checkpoints"))
        wanted = lambda saved: items_to_read(saved, about, reset_clip_state)
        found = _checkpoints.restore(manager, items_of(shapes), wanted, say)
        first, items = found or (0, {})
        if first >= steps:
            say(f"{out} has done {first} of --steps={steps} already.")
            return None
        state = from_items(shapes if "clip" in items else start(), items)
        if first:
            fresh = "" if "clip" in items else ", with a fresh clip state"
            say(f"Goes on after step {first} of {out}{fresh}.")
        log = None
        if chief:
            log = stack.enter_context(contextlib.closing(Log(out, first, steps)))
        waiting: list[tuple[int, dict]] = []

        def write(keep: int) -> None:
            while log and len(waiting) > keep:
                number, seen = waiting.pop(0)
                plain = {k: v.item() for k, v in jax.device_get(seen).items()}
                log.write({"step": number, **plain})

        begin, seen = time.perf_counter(), {}
        for number in range(first, steps):
            state, seen = step(state, passages_at(ids, number, settings, rows))
            if log:
                waiting.append((number, seen))
            write(keep=1)  # those of the step before, while this one runs
            if number == first:
                jax.block_until_ready(state)
                begin = time.perf_counter()  # compilation does not count
            if (number + 1) % save_every == 0 or number + 1 == steps:
                write(keep=0)
                if log:
                    log.sync()
                _checkpoints.save(manager, number + 1, items_of(state), about)
        seconds = time.perf_counter() - begin
        tests = (passages_at(held_out, k, settings, rows) for k in range(8))
        losses = [float(loss(state.params, passages)) for passages in tests]
    rates = [float(v) for k, v in seen.items() if "/clip_rate/" in k]
    return {
        "clip": clip,
        "mesh": f"{mesh.shape['data']} x {mesh.shape['model']}",
        "processes": jax.process_count(),
        "steps": steps,
        "bits/byte": float(np.mean(losses)) / math.log(2),
        "clip rate": sum(rates) / len(rates) if rates else math.nan,
        "bytes/s": int(
            (steps - first - 1) * settings.batch * settings.length / seconds
        ),
    }


def plot(rows: Sequence[dict[str, Any]], resumes: Sequence[int]) -> Figure:
    """Draws loss, norm and thresholds over the steps, a line at each resume."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for ax in axes:
        for number, step in enumerate(resumes):
            label = "" if number else "resumed"
            ax.axvline(step - 0.5, color="k", ls=":", lw=1, label=label)
    column = lambda name: [math.nan if r[name] is None else r[name] for r in rows]
    limits = plots.by_clip(rows).get("clip0", {}).get("threshold", {}).values()
    limit = {"norm": np.stack([*limits], 1)} if limits else {}
    plots.lines(column("loss"), ylabel="loss", legend=False, ax=axes[0])
    plots.norms({"norm": column("norm")}, limit, clipped={}, ax=axes[1])
    axes[0].set(xlabel="")
    return figure


def run(settings: Flags, out: _run.Out) -> None:
    """Trains, or starts the processes that do."""
    text = _common.load_text(settings.text)
    count, each = settings.processes, settings.cpu_devices // settings.processes
    if settings.cpu_devices % count:
        raise ValueError(
            f"--cpu_devices={settings.cpu_devices} cannot be shared out evenly among "
            f"--processes={count}."
        )
    if count > 1 and not settings.coordinator:
        command = [sys.executable, "-m", "examples.transformer_fsdp", *sys.argv[1:]]
        sys.exit(_processes.start(command, count))
    _processes.set_up(each, count, settings.process_id, settings.coordinator)
    pick = lambda names: {name: getattr(settings, name) for name in names}
    same = Settings(**pick(field.name for field in dataclasses.fields(Settings)))
    split_text(text, same.length)
    make_mesh(same, settings.data, settings.model)  # an error leaves nothing in `out`
    chief = jax.process_index() == 0
    if chief:
        for name in ("metrics.jsonl", "tensorboard", "checkpoints"):
            out.path(name)
    row = train(
        same, text, out.folder,
        **pick(("clip", "max_norm", "reset_clip_state")),
        **pick(("steps", "save_every", "data", "model")),
    )  # fmt: skip
    if row and chief:
        print("\n" + _common.format_table([row]))
        print("\nbits/byte: on held-out text. clip rate: mean over groups.")
        figure = plot(read_rows(out.folder), resumes_of(out.folder))
        out.figure(figure, "transformer_fsdp.png")


if __name__ == "__main__":
    _run.main(run, Flags)
