"""Corruptions: bytes in and out, stronger with severity, the same in any batch."""

import jax
import numpy as np
import pytest
from image_fixtures import ROOT
from PIL import Image

from tl_jax import corruptions
from tl_jax.datasets import open_dataset


@pytest.fixture(scope="module")
def gray():
    """Clothes, uint8 [12, 28, 28, 1]."""
    data = str(ROOT / "quickstart" / "data")
    examples = open_dataset("tfds:fashion_sample", {"test": "test[:12]"}, data)["test"]
    return np.stack([example["image"] for example in examples.get(range(12))])


@pytest.fixture(scope="module")
def colour():
    """Smooth images of three channels and unequal sides, uint8 [6, 40, 56, 3]."""
    noise = np.random.RandomState(0).randint(0, 256, (6, 7, 9, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((56, 40), 3)) for x in noise])


def corrupted(images, kind, severity, index=None):
    index = np.arange(len(images), dtype=np.int32) if index is None else index
    return np.asarray(corruptions.corrupt(images, kind, severity, index))


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_severity_is_monotone(kind, gray, colour):
    for images in (gray, colour):
        found = [corrupted(images, kind, severity) for severity in corruptions.SEVERITIES]
        assert all(x.dtype == np.uint8 and x.shape == images.shape for x in found)
        far = [np.square(x.astype(float) - images).mean() for x in found]
        assert far[0] > 0 and far == sorted(set(far)), far


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_an_image_is_the_same_in_any_batch(kind, gray):
    whole = corrupted(gray, kind, 3)
    order = np.array([7, 2, 11], np.int32)
    assert (corrupted(gray[order], kind, 3, order) == whole[order]).all()
    with jax.default_device(jax.devices()[3]):
        assert (corrupted(gray, kind, 3) == whole).all()


def test_noise_belongs_to_example_and_severity(gray):
    same = np.repeat(np.full_like(gray[:1], 128), 2, axis=0)
    found = [corrupted(same, "gaussian_noise", s).astype(int) - 128 for s in (1, 2)]
    assert (found[0][0] != found[0][1]).any()
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] < 0.1


def test_noise_has_the_benchmarks_deviation():
    image = np.full((4, 100, 100, 1), 128, np.uint8)
    for severity, sigma in ((1, 0.08), (2, 0.12)):
        found = corrupted(image, "gaussian_noise", severity).astype(float) - 128
        assert abs(found.std() / (255 * sigma) - 1) < 0.02
        assert abs(found.mean()) < 0.5


def test_contrast_and_brightness_are_their_formulas(gray, colour):
    for images in (gray, colour):
        mean = images.mean((1, 2), keepdims=True)
        wanted = mean + 0.2 * (images - mean)
        assert np.abs(corrupted(images, "contrast", 3) - wanted).max() < 0.6
    assert (corrupted(gray, "brightness", 1) == np.minimum(gray.astype(int) + 26, 255)).all()
    import colorsys

    found = corrupted(colour, "brightness", 3)
    for pixel, brighter in zip(colour[0, 0], found[0, 0], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 76 / 255))
        assert np.abs(np.array(wanted) * 255 - brighter).max() < 0.6


@pytest.mark.parametrize("kind", ["gaussian_blur", "pixelate", "rotate", "translate"])
def test_an_even_image_stays_so(kind):
    even = np.full((2, 17, 23, 3), 201, np.uint8)
    for severity in (1, 5):
        assert (corrupted(even, kind, severity) == even).all()


def test_pixelate_is_the_mean_of_blocks(gray):
    found = corrupted(gray, "pixelate", 2)[..., 0]
    blocks = gray[..., 0].reshape(12, 14, 2, 14, 2).astype(float)
    wanted = blocks.mean((2, 4)).repeat(2, 1).repeat(2, 2)
    assert np.abs(found - wanted).max() <= 1  # rounded after columns and after rows


def test_directions():
    image = np.zeros((1, 100, 100, 1), np.uint8)
    image[0, 48:52, 80] = 255  # to the right of the centre
    y, x = np.nonzero(corrupted(image, "rotate", 5)[0, ..., 0])
    assert y.mean() < 40 and x.mean() < 80  # counter-clockwise is up
    y, x = np.nonzero(corrupted(image, "translate", 4)[0, ..., 0])
    assert (y.min(), y.max(), set(x)) == (58, 61, {90})


def test_wrong_severity(gray):
    with pytest.raises(ValueError, match="severity 6"):
        corrupted(gray, "contrast", 6)
