import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import without_norms

from examples import _run, boxes

SMALL = boxes.Settings(images=600, width=16, steps=300, batch=8)
RIGHT = jnp.array([0.2, 0.2, 0.4, 0.6])


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_losses_of_two_boxes():
    exact = boxes.compare(jnp.array([0.3, 0.4, 0.2, 0.4]), RIGHT)
    np.testing.assert_allclose(exact, (1, 0, 0, 0), atol=1e-5)
    # Twice as wide, to the right by half of that: a half is shared.
    pair = boxes.compare(jnp.array([0.4, 0.4, 0.4, 0.4]), RIGHT)
    ratio = 4 / np.pi**2 * (np.arctan(1) - np.arctan(0.5)) ** 2
    want = 0.5, 0, 0.1**2 / (0.4**2 + 0.4**2), ratio
    np.testing.assert_allclose(pair, want, rtol=1e-5, atol=1e-6)
    assert boxes.overlap_loss(pair, "log") == pytest.approx(np.log(2), rel=1e-5)
    far = boxes.compare(jnp.array([0.8, 0.8, 0.2, 0.2]), RIGHT)
    assert boxes.overlap_loss(far, "giou") > 1.5
    assert boxes.overlap_loss(far, "ciou") > 1.4


def test_a_degenerate_box_explodes_the_gradient_of_the_logarithm_alone():
    def size(loss, side):
        of = lambda found: boxes.overlap_loss(boxes.compare(found, RIGHT), loss)
        return jnp.abs(jax.grad(of)(jnp.array([0.3, 0.4, side, 0.3]))).max()

    assert size("log", 0.002) == pytest.approx(500, rel=1e-3)
    assert size("log", 0.02) == pytest.approx(50, rel=1e-3)
    assert size("giou", 0.002) < 10


def test_images_have_a_digit_in_their_box():
    data = boxes.make_data(boxes.Settings(images=30), 0)
    assert data.test_images.shape == (10, boxes.CANVAS**2)
    for image, box in zip(data.images, data.boxes, strict=True):
        left, top, right, bottom = np.round(box * boxes.CANVAS).astype(int)
        image = image.reshape(boxes.CANVAS, boxes.CANVAS)
        inside = image[top:bottom, left:right]
        assert inside.size >= 4
        assert inside.mean() > 0.2
        assert abs(image.sum() - inside.sum()) < 10  # the rest is noise


@pytest.mark.full
def test_the_logarithm_loses_boxes_and_a_clip_keeps_them():
    def mean(method, rate):
        seen = [
            boxes.train(
                boxes.make_data(SMALL, seed), np.float32(rate), jax.random.key(seed),
                loss="log", method=method, settings=SMALL,
            )
            for seed in range(2)
        ]  # fmt: skip
        return np.mean([x["iou"].mean() for x in seen])

    none = [mean("none", rate) for rate in (0.0003, 0.003, 0.03)]
    assert none[-1] < 0.05
    assert mean("global", 0.03) > max(none) + 0.05


@pytest.mark.full
def test_end_to_end(tmp_path):
    given = ["--steps=20", "--runs=2", "--rates=0.01", "--images=30", "--width=4"]
    given += ["--loss=giou", "--clip=none,value", f"--out={tmp_path}"]
    _run.launch(boxes.run, boxes.Settings, given)
    rows = without_norms(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("none", 0), ("none", 1), ("value", 0), ("value", 1),
    ]  # fmt: skip
    assert (tmp_path / "boxes.png").read_bytes().startswith(b"\x89PNG")
