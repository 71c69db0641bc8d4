import ase
import ase.io
import jax
import numpy as np
import pytest
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from runs import without_norms

from examples import _run, potential

SMALL = potential.Settings(clusters=100, steps=150, width=8, batch=4, calm=10.0)


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_padding_and_places_in_space_change_no_energy():
    params = potential.init(SMALL, jax.random.key(0))
    places = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 2
    forces = np.zeros_like(places)
    small = potential.pad([(places, forces)])
    both = potential.pad([(places, forces), (np.zeros((6, 3)), np.zeros((6, 3)))])
    assert both.places.shape == (2, 6, 3)
    energy_of = jax.jit(potential.energy)
    energy = energy_of(params, small.places[0], small.there[0])
    padded = energy_of(params, both.places[0], both.there[0])
    np.testing.assert_allclose(energy, padded, rtol=1e-5)
    turned = small.places[0] @ np.linalg.qr(np.eye(3) + places[:3])[0] + 1
    there = energy_of(params, turned.astype(np.float32), small.there[0])
    np.testing.assert_allclose(energy, there, rtol=1e-4)
    found = jax.jit(potential.forces)(params, both.places[0], both.there[0])
    assert np.isfinite(found).all()
    assert not found[4:].any()


@pytest.mark.full
def test_close_contacts_ruin_a_batch_and_not_a_clip_of_each_cluster():
    clusters = potential.make_clusters(SMALL, 0)

    def calm_error(method, rate):
        data = potential.split(clusters, method, SMALL, 0)
        key, rate = jax.random.key(0), np.float32(rate)
        seen = potential.train(data, rate, key, method=method, settings=SMALL)
        return potential.score(seen, data, SMALL)

    none = [calm_error("none", rate) for rate in (0.001, 0.01, 0.03)]
    bounded = calm_error("per_example", 0.03)
    assert max(row["largest norm"] for row in none) > 1e4
    assert bounded["largest norm"] <= SMALL.max_norm
    assert bounded["calm error"] < 0.7 * bounded["calm force"]
    assert bounded["calm error"] < 0.7 * min(row["calm error"] for row in none)


def write(path, count=12, pbc=False, symbols="Cu3", forces=True):
    rng = np.random.default_rng(0)
    clusters = []
    for k in range(count):
        atoms = ase.Atoms(symbols if k else "Cu2", cell=[20, 20, 20], pbc=pbc)
        atoms.positions = 2.6 * rng.permutation(4)[: len(atoms), None] + np.zeros(3)
        atoms.calc = LennardJones(sigma=4.0, rc=9.0)
        found = atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, forces=found) if forces else None
        clusters.append(atoms)
    ase.io.write(path, clusters, format="extxyz")
    return str(path), clusters


def test_files_of_clusters(tmp_path):
    path, clusters = write(tmp_path / "own.extxyz")
    read = potential.read_clusters(path)
    assert read.there.sum(1).tolist() == [2, *[3] * 11]
    np.testing.assert_allclose(read.forces[3], clusters[3].get_forces(), atol=1e-4)


BAD = {
    "few": ({"count": 3}, "has 3 clusters, and 10 are the least"),
    "periodic": ({"pbc": True}, "has periodic cells"),
    "elements": ({"symbols": "CuAg2"}, "atoms of one element only"),
    "no forces": ({"forces": False}, "has clusters without forces"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_files(tmp_path, given, message):
    path, _ = write(tmp_path / "bad.extxyz", **given)
    with pytest.raises(ValueError, match=message):
        potential.read_clusters(path)


def test_no_file_of_clusters(tmp_path):
    (tmp_path / "a.extxyz").write_text("what\n")
    with pytest.raises(ValueError, match="ASE cannot read"):
        potential.read_clusters(str(tmp_path / "a.extxyz"))
    with pytest.raises(OSError):
        potential.read_clusters(str(tmp_path / "none.extxyz"))


@pytest.mark.full
def test_end_to_end_with_a_file_of_ones_own(tmp_path, capsys):
    path, _ = write(tmp_path / "own.extxyz")
    given = ["--steps=2", "--runs=1", "--rates=0.01", f"--data={path}", "--calm=1e9"]
    given += ["--clip=none,per_example", f"--out={tmp_path / 'out'}"]
    _run.launch(potential.run, potential.Settings, given)
    rows = without_norms(tmp_path / "out")
    assert [row["method"] for row in rows] == ["none", "per_example"]
    picture = tmp_path / "out" / "potential.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Forces of 0 everywhere" in capsys.readouterr().out
