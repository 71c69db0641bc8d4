import jax
import numpy as np
import pytest
from runs import without_norms

from examples import _run, boosting_loss

SMALL = boosting_loss.Settings(steps=300, width=8, wrong=0.15, spoiled=0.05)


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.full
def test_the_exponential_loss_explodes_and_a_clip_of_examples_holds_it():
    table = boosting_loss.load_table(None, None)

    def mean(method, rate):
        seen = [
            boosting_loss.train(
                boosting_loss.split(*table, SMALL, seed),
                np.float32(rate),
                jax.random.key(seed),
                loss="exponential",
                method=method,
                settings=SMALL,
            )
            for seed in range(3)
        ]
        return np.mean([x["accuracy"] for x in seen]), [max(x["norms"]) for x in seen]

    none, norms = zip(*(mean("none", rate) for rate in (1e-4, 1e-3, 1e-2)), strict=True)
    assert not np.max(norms) < 1e3  # or NaN
    bounded, norms = mean("per_example", 0.1)
    assert np.max(norms) <= SMALL.max_norm
    assert bounded > 0.9
    assert bounded > max(none) + 0.02


@pytest.mark.full
def test_end_to_end_with_a_table_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        f"{x:g},{'yes' if x > 0 else 'no'},{y:g}" for x, y in rng.normal(size=(60, 2))
    ]
    (tmp_path / "own.csv").write_text("\n".join(["a,is,b", *lines]))
    given = ["--steps=200", "--runs=2", "--rates=0.1", "--loss=logistic", "--wrong=0"]
    given += [f"--data={tmp_path / 'own.csv'}", "--label=is", f"--out={tmp_path / 'o'}"]
    _run.launch(boosting_loss.run, boosting_loss.Settings, [*given, "--spoiled=0"])
    assert all(row["accuracy"] > 0.75 for row in without_norms(tmp_path / "o"))
    picture = tmp_path / "o" / "boosting_loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("kind,x,y\nb,1,2\na,3,4\n")
    rows, labels = boosting_loss.load_table(str(path), "kind")
    assert (rows.tolist(), labels.tolist()) == ([[1, 2], [3, 4]], [1, -1])
    rows, labels = boosting_loss.load_table(str(save(tmp_path, "xy")), None)
    assert (rows.tolist(), labels.tolist()) == ([[0], [1]], [-1, 1])


def save(folder, names):
    arrays = dict(zip(names, ([[0], [1]], [4, 9]), strict=True))
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


BAD = {
    "numbers": ("x,y\n1,a\nz,b\n", None, "must hold numbers: could not convert"),
    "labels": ("x,y\n1,a\n2,a\n", None, "must have two labels, got 1"),
    "column": ("x,y\n1,a\n2,b\n", "z", "has no column 'z'"),
    "lengths": ("x,y\n1,a\n2\n", None, "has lines of different length"),
    "nan": ("x,y\nnan,a\n2,b\n", None, "one row of finite numbers for each label"),
    "empty": ("", None, "must have two labels, got 0"),
}


@pytest.mark.parametrize("text, label, message", BAD.values(), ids=BAD)
def test_bad_tables(tmp_path, text, label, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        boosting_loss.load_table(str(path), label)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"must hold arrays x and y, got \['u', 'v'\]"):
        boosting_loss.load_table(str(save(tmp_path, "uv")), None)
    with pytest.raises(ValueError, match=r"must be a \.csv or a \.npz file"):
        boosting_loss.load_table("a.txt", None)
