"""Augmentations: per example, whatever the split over devices; boxes that stay inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tl_jax.augmentation import _bilinear
from tl_jax.augmentation import augment as plain_augment
from tl_jax.errors import UserError

augment = jax.jit(plain_augment, static_argnames=("name", "scale", "ratio"))


def batch(count: int, height: int, width: int, channels: int = 3) -> tuple[jax.Array, jax.Array]:
    shape = (count, height, width, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return jnp.asarray(images), jax.random.split(jax.random.key(1), count)


def test_none_changes_nothing_and_needs_no_keys():
    images, _ = batch(2, 5, 7)
    assert plain_augment(images, None, "none") is images


def test_an_unknown_name_lists_the_known():
    images, keys = batch(1, 4, 4)
    with pytest.raises(UserError, match="none, flip, random_resized_crop"):
        augment(images, keys, "flipp")


def test_flip_mirrors_about_half_of_the_images():
    images, keys = batch(400, 3, 4, 1)
    flipped = np.asarray(augment(images, keys, "flip"))
    source = np.asarray(images)
    same = (flipped == source).all((1, 2, 3))
    mirrored = (flipped == source[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    # Four standard deviations of a binomial with p = 1/2.
    assert abs(mirrored.sum() - 200) <= 40


@pytest.mark.parametrize("name", ["flip", "random_resized_crop"])
def test_an_example_depends_on_its_own_key_alone(name):
    images, keys = batch(16, 29, 23)
    whole = np.asarray(augment(images, keys, name))
    assert (whole.dtype, whole.shape) == (np.uint8, images.shape)
    assert (whole != np.asarray(images)).any((1, 2, 3)).sum() >= 3
    for i in (0, 7):
        np.testing.assert_array_equal(augment(images[i:][:1], keys[i:][:1], name)[0], whole[i])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    on_devices = augment(jax.device_put(images, spread), jax.device_put(keys, spread), name)
    np.testing.assert_array_equal(on_devices, whole)
    mapped = jax.pmap(lambda x, k: plain_augment(x, k, name))(
        images.reshape(8, 2, *images.shape[1:]), keys.reshape(8, 2)
    )
    np.testing.assert_array_equal(mapped.reshape(whole.shape), whole)


@pytest.mark.parametrize("size", [(32, 32), (10, 90)])
def test_a_crop_has_the_area_and_the_ratio_asked_for(size):
    height, width = size
    count = 300
    # A ramp of rows and one of columns: a crop's ends tell the box that it came from.
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    images = jnp.asarray(np.broadcast_to(np.stack([y, x], -1), (count, height, width, 2)))
    keys = jax.random.split(jax.random.key(3), count)
    out = np.asarray(augment(images, keys, "random_resized_crop")).astype(int)
    tops, bottoms = out[:, 0, 0, 0], out[:, -1, 0, 0]
    columns = out[:, 0, :, 1]
    lefts, rights = columns.min(1), columns.max(1)
    heights, widths = bottoms - tops + 1, rights - lefts + 1
    area = heights * widths / (height * width)
    if max(size) <= 2 * min(size):
        assert 0.25 < area.min() < 0.5
        assert 0.8 < area.max() <= 1
    ratio = widths / heights
    assert ratio.min() > 0.6
    assert ratio.max() < 1.6
    assert len(set(zip(tops, lefts, strict=True))) > 10
    flips = columns[:, 0] > columns[:, -1]
    assert 100 < flips.sum() < 200
    # Both borders are reached: no off-by-one in where a box may lie.
    assert (tops == 0).any() and (bottoms == height - 1).any()
    assert (lefts == 0).any() and (rights == width - 1).any()


def test_the_whole_image_is_left_as_it_is():
    images, keys = batch(8, 24, 24)
    out = np.asarray(
        augment(images, keys, "random_resized_crop", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    )
    source = np.asarray(images)
    same = (out == source).all((1, 2, 3))
    mirrored = (out == source[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()


@pytest.mark.parametrize(("start", "length", "size"), [(0, 7, 7), (3, 10, 28), (5, 1, 9)])
def test_bilinear_weights_are_half_pixel_centred_whole_numbers(start, length, size):
    weights = np.asarray(_bilinear(jnp.int32(start), jnp.int32(length), size))
    assert (weights.sum(1) == 2048).all()
    assert (weights == weights.round()).all()
    centers = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1) + start
    np.testing.assert_allclose(weights @ np.arange(size) / 2048, centers, atol=1 / 1024)


def test_bilinear_weights_of_large_images_do_not_overflow():
    weights = np.asarray(_bilinear(jnp.int32(0), jnp.int32(2100), 2100))
    assert (weights.argmax(1) == np.arange(2100)).all()
