import numpy as np
import pytest

from examples import _common


def images_of(count=100, shape=(2, 3)):
    images = np.arange(count)[:, None, None] + np.zeros(shape)
    return {"images": images.astype(np.uint8), "labels": np.arange(count) % 10}


def test_images_of_a_file(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **images_of())
    images, labels = _common.load_digits(str(path))
    assert images.shape == (100, 6) and images.dtype == np.float32
    np.testing.assert_allclose(images[:, 5], np.linspace(-1, 1, 100), atol=1e-6)
    np.testing.assert_array_equal(labels, np.arange(100) % 10)
    assert labels.dtype == np.int32


BAD = {
    "missing": (None, "cannot read .*No such file"),
    "text": (b"images", "is no .npz file with arrays named images and labels"),
    "names": ({"x": np.ones(3)}, "is no .npz file with arrays named images and labels"),
    "pickle": ({"images": np.array([{}])}, "is no .npz file with arrays"),
    "shape": ({"images": np.ones(100)}, r"got \[100\] and \[100\]"),
    "count": ({"labels": np.ones(99, int)}, r"got \[100, 2, 3\] and \[99\]"),
    "few": (images_of(99), r"100 or more, got \[99, 2, 3\] and \[99\]"),
    "classes": ({"labels": np.arange(100)}, "labels of .* whole numbers from 0 to 9"),
    "float": ({"labels": np.ones(100)}, "labels of .* whole numbers from 0 to 9"),
    "alike": ({"images": np.ones((100, 4))}, "must be numbers, and not all alike"),
    "nan": ({"images": np.full((100, 4), np.nan)}, "must be numbers, and not all al"),
    "huge": ({"images": 1e300 * images_of()["images"]}, "must be numbers, and not al"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_images_that_are_none(tmp_path, content, message):
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **(content if "x" in content else images_of() | content))
    with pytest.raises(ValueError, match=message):
        _common.load_digits(str(path))
