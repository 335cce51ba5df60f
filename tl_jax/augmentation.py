"""Random changes of training images on the accelerator, one PRNG key per example.

Every example depends on its own key alone, and all sums are exact integers, so that the result does
not depend on how a batch is split over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.errors import UserError

NAMES = ("none", "flip", "random_resized_crop")

# Draws of a crop that must fit into the image, as in torchvision; then the largest that fits.
_ATTEMPTS = 10
_BITS = 11


def augment(
    images: jax.Array,
    keys: jax.Array | None,
    name: str,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """Augment a batch; pure, for use under `jax.jit`.

    Args:
        images: uint8 [N, h, w, c].
        keys: typed PRNG keys [N], one per example (unused by "none").
        name: "none", "flip" (left to right with probability 1/2), or "random_resized_crop" (a
            random box resized bilinearly to the same size, then flip; arXiv:1409.4842).
        scale: least and largest share of the area in a crop. Training from scratch uses (0.08, 1);
            a pretrained trunk needs less, and small boxes of small images hold nothing.
        ratio: least and largest width / height of a crop, drawn uniformly in the logarithm.

    Returns:
        uint8 [N, h, w, c].

    Raises:
        UserError: an unknown name.
        ValueError: no keys for an augmentation that draws.
    """
    if name not in NAMES:
        raise UserError(f"augmentation {name!r} is not known; known are {', '.join(NAMES)}")
    if name == "none":
        return images
    if keys is None:
        raise ValueError(f"augmentation {name!r} needs one PRNG key per example")
    if name == "flip":
        return jax.vmap(_flip)(images, keys)

    def crop_and_flip(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        return _flip(_random_resized_crop(image, crop_key, scale, ratio), flip_key)

    return jax.vmap(crop_and_flip)(images, keys)


def _flip(image: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _random_resized_crop(
    image: jax.Array, key: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    height, width = image.shape[:2]
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (_ATTEMPTS,), jnp.float32, *scale) * (height * width)
    log_ratio = np.log(np.asarray(ratio, np.float32))
    shape = jnp.exp(jax.random.uniform(ratio_key, (_ATTEMPTS,), jnp.float32, *log_ratio))
    # The last entry always fits: the largest centred box with an allowed ratio.
    widest = min(width, round(height * ratio[1]))
    highest = min(height, round(width / ratio[0]))
    widths = jnp.append(jnp.round(jnp.sqrt(area * shape)).astype(jnp.int32), widest)
    heights = jnp.append(jnp.round(jnp.sqrt(area / shape)).astype(jnp.int32), highest)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    chosen = jnp.argmax(fits)
    box_width, box_height = widths[chosen], heights[chosen]
    top = jax.random.randint(top_key, (), 0, height - box_height + 1)
    left = jax.random.randint(left_key, (), 0, width - box_width + 1)
    rows = _bilinear(top, box_height, height)
    columns = _bilinear(left, box_width, width)
    x = _round(jnp.einsum("oi,iwc->owc", rows, image.astype(jnp.float32), precision="highest"))
    x = _round(jnp.einsum("oi,hic->hoc", columns, x, precision="highest"))
    return x.astype(jnp.uint8)


def _bilinear(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Weights [size, size] that stretch `length` pixels from `start` on to `size` pixels.

    In units of 2**-11, whole numbers: a byte times a weight and their sum are exact in float32.
    """
    one = 1 << _BITS
    # Divided before it is scaled, so that int32 holds it.
    whole, rest = jnp.divmod((2 * jnp.arange(size) + 1) * length, size)
    centers = whole * (one // 2) + rest * (one // 2) // size - one // 2
    centers = jnp.clip(centers, 0, (length - 1) * one) + start * one
    distance = jnp.abs(centers[:, None] - jnp.arange(size) * one)
    return jnp.maximum(one - distance, 0).astype(jnp.float32)


def _round(x: jax.Array) -> jax.Array:
    return jnp.floor(x * 2.0**-_BITS + 0.5)
