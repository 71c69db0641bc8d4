import math

import jax
import numpy as np
import pytest
from runs import without_norms

from examples import _run, federated

SMALL = federated.Settings(clients=6, seldom=2, period=8, max_ratio=8.0, rounds=120)


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def scores(method, **given):
    server = {"max_norm": 0.1, "rate": 10.0, "corrupt": 0.02, "noise": 0.0} | given
    server = federated.Server(**{k: np.float32(x) for k, x in server.items()})
    data = federated.load_data(SMALL, 0)
    curves = federated.train(
        data, server, jax.random.key(0), method=method, settings=SMALL
    )
    return federated.score(curves)


def test_clients_hold_two_digits_each_the_seldom_ones_rare_ones():
    labels = federated.load_data(SMALL, 0).labels
    assert labels.shape == (6, 40)
    assert all(len(np.unique(row)) == 2 for row in labels)
    assert np.isin(labels[:2], federated.RARE).all()
    assert not np.isin(labels[2:], federated.RARE).any()


@pytest.mark.full
def test_a_clip_cuts_seldom_clients_and_error_feedback_gives_it_back():
    clip, feedback = scores("clip"), scores("feedback")
    # Without a clip, spoiled messages are too much for any rate.
    none = [scores("none", rate=rate) for rate in (0.01, 0.1, 1.0)]
    assert clip["on 7 to 9"] < 0.3
    assert feedback["on 7 to 9"] > 0.6
    assert feedback["accuracy"] > clip["accuracy"] + 0.1
    assert feedback["accuracy"] > max(x["accuracy"] for x in none) + 0.1


@pytest.mark.full
def test_end_to_end(tmp_path, capsys):
    given = ["--rounds=3", "--runs=2", "--rates=1", "--max_norms=0.1", "--clients=6"]
    given += ["--seldom=2", f"--out={tmp_path}"]
    _run.launch(federated.run, federated.Settings, given)
    rows = without_norms(tmp_path, runs=2)  # two servers may go without a clip
    assert [row["seed"] for row in rows] == [0, 1] * 8  # noise goes with a clip only
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "federated.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "epsilon is" in printed
    assert " times as long with feedback." in printed


def test_somebody_has_to_train_in_every_round(tmp_path):
    given = ["--clients=4", "--seldom=4", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match=r"--seldom=4 leaves none of --clients=4 that"):
        _run.launch(federated.run, federated.Settings, given)
