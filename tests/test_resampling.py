"""The device's resize equals Pillow's bit for bit."""

import jax
import numpy as np
import PIL.Image
import pytest

from tl_jax import resampling

SIZES = [
    ((28, 28), (64, 64)),
    ((64, 64), (28, 28)),
    ((37, 53), (64, 31)),
    ((61, 20), (17, 90)),
    ((17, 17), (17, 40)),
    ((17, 17), (40, 17)),
    ((100, 70), (11, 7)),
    ((2, 3), (7, 5)),
    ((1, 1), (5, 4)),
]
# Pillow 13 goes vertically first where the height shrinks by more than twice what the width does.
VERTICAL_FIRST = [((90, 30), (12, 25)), ((100, 100), (50, 80)), ((40, 20), (39, 30))]


def images(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    black_and_white = np.where(noise > 127, 255, 0).astype(np.uint8)
    return np.concatenate([noise, black_and_white, noise // 128 + 200])


def assert_equals_pillow(size_in, size_out, resample):
    batch = images(*size_in)
    got = np.asarray(jax.jit(lambda x: resampling.resize(x, size_out, resample))(batch))
    expected = np.stack(
        [np.asarray(PIL.Image.fromarray(i).resize(size_out[::-1], resample)) for i in batch]
    )
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


CASES = [(*sizes, resample) for resample in (2, 3) for sizes in SIZES]
CASES += [(*sizes, resample) for resample in (0, 1, 4, 5) for sizes in SIZES[2:6]]


@pytest.mark.parametrize(("size_in", "size_out", "resample"), CASES)
def test_equals_pillow(size_in, size_out, resample):
    assert_equals_pillow(size_in, size_out, resample)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13's order of passes")
@pytest.mark.parametrize(("size_in", "size_out"), VERTICAL_FIRST)
@pytest.mark.parametrize("resample", [2, 3])
def test_the_order_of_the_passes_is_pillows(size_in, size_out, resample):
    assert_equals_pillow(size_in, size_out, resample)


def test_many_taps_stay_within_one_level():
    batch = images(500, 40)
    got = np.asarray(resampling.resize(jax.numpy.asarray(batch), (5, 40), resampling.LANCZOS))
    expected = [np.asarray(PIL.Image.fromarray(i).resize((40, 5), 1)) for i in batch]
    assert np.abs(got.astype(int) - np.stack(expected)).max() <= 1


def test_names_are_pillows_numbers():
    for number, name in enumerate(resampling.NAMES):
        assert PIL.Image.Resampling[name.upper()] == number


def test_the_batch_does_not_matter():
    batch = images(31, 47)
    whole = np.asarray(jax.jit(lambda x: resampling.resize(x, (64, 64), 3))(batch))
    for i in range(3):
        one = jax.jit(lambda x: resampling.resize(x, (64, 64), 3))(batch[i : i + 1])
        np.testing.assert_array_equal(one[0], whole[i])


def test_products_ask_for_full_precision():
    text = jax.jit(lambda x: resampling.resize(x, (64, 64), 3)).lower(images(28, 28)).as_text()
    assert "dot_general" in text
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]")
