"""What is said about clipping, measured: `docs/evidence.md` is made by this.

    python -m examples.evidence
    python -m examples.evidence --only=symmetric_mean,batch_norm_depth

Every claim is a small function that measures, compares and judges, in a file for each
theme in `examples/_evidence/`. By default all run, two minutes on two cores, and the
page and its pictures are written. With `--only` those named are printed, and the page
stays as it is.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from typing import Any

from tqdm import tqdm

from examples import _run
from examples._evidence import page
from examples._evidence.claims import Row


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings; each is a flag of the same name."""

    only: tuple[str, ...] = _run.flag(
        (), "Names of claims, as on the page; none for all.", among=tuple(page.CLAIMS)
    )
    page: str = _run.flag("docs/evidence.md", "Where to write the page.")


def measure(names: tuple[str, ...] = ()) -> dict[str, Row]:
    """Rows by name, of all claims if none is named, by as many processes as two."""
    wanted = names or tuple(page.CLAIMS)
    together = {name: group for group in page.TRAINED for name in group}
    groups = dict.fromkeys(together.get(name, (name,)) for name in wanted)
    longest_first = sorted(groups, key=lambda group: group not in page.TRAINED)
    found: dict[str, Row] = {}
    with concurrent.futures.ProcessPoolExecutor(
        1 if names else 2,
        multiprocessing.get_context("spawn"),
        initializer=_run.be_quiet,
    ) as pool:
        each = ([n for n in group if n in wanted] for group in longest_first)
        tasks = [pool.submit(page.rows_of, some) for some in each]
        progress = tqdm(concurrent.futures.as_completed(tasks), total=len(tasks))
        for task in progress:
            found |= task.result()
            progress.set_postfix_str(next(iter(task.result())), refresh=True)
    return {name: found[name] for name in wanted}


def report(name: str, row: Row) -> str:
    """A row for the terminal."""
    lines = [f"{name}: {row.verdict}", f"  {row.claim}", f"  {row.experiment}"]
    for expected, measured, spread in zip(
        row.expected, row.measured, row.spread, strict=True
    ):
        *label, want = expected.rsplit(": ", 1)
        told = f", {spread}" if spread else ""
        lines.append(f"    {' '.join([*label, measured])} (expected {want}){told}")
    return "\n".join(lines)


def as_json(name: str, row: Row) -> dict[str, Any]:
    """A row for `metrics.jsonl`."""
    return {"name": name} | row._asdict()


def run(settings: Settings, out: _run.Out) -> None:
    """Measures, prints, and writes the page."""
    file = pathlib.Path(settings.page)
    if not settings.only and not file.parent.is_dir():
        raise ValueError(
            f"there is no directory {str(file.parent)!r} for the page: run in the root "
            "of the repository, or give another --page."
        )
    rows = measure(settings.only)
    print("\n\n".join(report(name, row) for name, row in rows.items()))
    out.jsonl(as_json(name, row) for name, row in rows.items())
    if settings.only:
        return
    file.write_text(page.render(rows), encoding="utf-8")
    folder = file.parent / "img"
    folder.mkdir(exist_ok=True)
    for name, _, draw in page.PICTURES.values():
        draw().savefig(folder / f"{name}.png", format="png", dpi=120)
    print(f"\nWrote {file} and its pictures.")


if __name__ == "__main__":
    _run.main(run, Settings)
