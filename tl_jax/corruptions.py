"""Corruptions of uint8 images at five severities, in the manner of ImageNet-C (arXiv:1903.12261).

All arithmetic is in whole numbers, and noise belongs to the example (the kind, the severity and the
example's index): an image gives the same bytes in any batch, on any device and backend.

ImageNet-C defines its constants for images of 224 × 224 pixels with values in [0, 1]. Values here
are those constants times 255; lengths are the same share of the image's shorter side. `rotate` and
`translate` are not among its corruptions (its perturbations ImageNet-P have them): their severities
are this module's own.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224  # pixels, of the images that ImageNet-C's lengths are for
_program = functools.partial(jax.jit, static_argnums=1)
_BITS = 16  # weights of a resampling are whole numbers that sum to 2**16
_ONE = 1 << _BITS


def gaussian_noise(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """x + σ z, z standard normal; σ = 0.08, 0.12, 0.18, 0.26, 0.38 of the range of values.

    z is the middle of one of 2^16 equally probable parts of the distribution.
    """
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    middles = (np.arange(_ONE) + 0.5) / _ONE
    table = np.round(ndtri(middles) * sigma * 255 * 256).astype(np.int32)
    return _with_noise(images, np.int32(severity), index, table)


@jax.jit
def _with_noise(images, severity, index, table):
    key = jax.random.fold_in(jax.random.key(zlib.crc32(b"gaussian_noise")), severity)

    def draw(i):
        return jax.random.bits(jax.random.fold_in(key, i), images.shape[1:], np.uint16)

    noise = table[jax.vmap(draw)(index).astype(jnp.int32)]
    return _bytes((images.astype(jnp.int32) * 256 + noise + 128) >> 8)


@_program
def gaussian_blur(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """A Gaussian of σ = 1, 2, 3, 4, 6 pixels of 224, cut at 4 σ; the border's pixels go on.

    σ is at least 0.4, 0.6, 0.7, 0.8, 1 pixels, the benchmark's own figures for small images
    (CIFAR-10-C): less would leave them as they are.
    """
    side = min(images.shape[1:3])
    scaled = (1, 2, 3, 4, 6)[severity - 1] * side / _SIDE
    sigma = max(scaled, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])
    reach = max(1, int(4 * sigma + 0.5))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))

    def matrix(size):
        found = np.zeros((size, size))
        for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
            near = np.clip(np.arange(size) + offset, 0, size - 1)
            found[np.arange(size), near] += weight
        return found

    return _resampled(images, matrix)


@_program
def contrast(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """m + c (x − m), m the mean of the image's channel; c = 0.4, 0.3, 0.2, 0.1, 0.05."""
    share = round((0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * 1024)
    x = images.astype(jnp.int32)
    pixels = images.shape[1] * images.shape[2]
    whole, rest = jnp.divmod(x.sum((1, 2), keepdims=True), pixels)
    mean = whole * 256 + rest * 256 // pixels
    return _bytes((x * 256 * share + mean * (1024 - share) + (1 << 17)) >> 18)


@_program
def brightness(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """V + c in the hue, saturation, value of each pixel; c = 0.1, 0.2, 0.3, 0.4, 0.5 of the range.

    V is a pixel's largest channel, so that the channels grow in proportion up to V = 255.
    """
    added = round((0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1] * 255)
    x = images.astype(jnp.int32)
    value = x.max(-1, keepdims=True)
    raised = jnp.minimum(value + added, 255)
    divisor = jnp.maximum(value, 1)
    return _bytes(jnp.where(value > 0, (2 * x * raised + divisor) // (2 * divisor), raised))


@_program
def pixelate(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """Means over blocks, 0.6, 0.5, 0.4, 0.3, 0.25 times as many along a side as there are pixels.

    ImageNet-C shrinks and stretches with Pillow's box filter; here each pixel belongs to one block,
    so that blocks stay sharp in small images. Below about 20 pixels severities may coincide.
    """
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]

    def matrix(size):
        block = np.arange(size) * max(1, round(size * share)) // size
        same = block[:, None] == block[None, :]
        return same / same.sum(1, keepdims=True)

    return _resampled(images, matrix)


@_program
def rotate(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """Turned about its centre by 5, 10, 15, 20, 30 degrees, counter-clockwise."""
    angle = np.deg2rad((5, 10, 15, 20, 30)[severity - 1])
    height, width = images.shape[1:3]
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    down = np.cos(angle) * y + np.sin(angle) * x + (height - 1) / 2
    right = np.cos(angle) * x - np.sin(angle) * y + (width - 1) / 2
    return _from(images, down, right)


@_program
def translate(images: jax.Array, severity: int, index: jax.Array) -> jax.Array:
    """Moved down and right by 0.02, 0.04, 0.07, 0.1, 0.15 of its shorter side each."""
    height, width = images.shape[1:3]
    shift = (0.02, 0.04, 0.07, 0.1, 0.15)[severity - 1] * min(height, width)
    down, right = np.mgrid[:height, :width] - shift
    return _from(images, down, right)


CORRUPTIONS: dict[str, Callable[[jax.Array, int, jax.Array], jax.Array]] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "rotate": rotate,
    "translate": translate,
}
KINDS = tuple(CORRUPTIONS)


def corrupt(images: jax.Array, kind: str, severity: int, index: jax.Array) -> jax.Array:
    """The images with one corruption.

    Args:
      images: uint8 [n, h, w, c], c = 1 or 3.
      kind: one of `KINDS`.
      severity: one of `SEVERITIES`.
      index: int32 [n], the examples' numbers, by which noise is drawn.

    Returns:
      uint8 [n, h, w, c].
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} is none of {SEVERITIES}")
    return CORRUPTIONS[kind](images, severity, index)


def _from(images: jax.Array, down: np.ndarray, right: np.ndarray) -> jax.Array:
    """Pixel (i, j) is what lies at (down, right)[i, j], bilinear; the border's pixels go on."""
    height, width = images.shape[1:3]
    y, x = np.clip(down, 0, height - 1), np.clip(right, 0, width - 1)
    top, left = np.floor(y).astype(np.int32), np.floor(x).astype(np.int32)
    below, beside = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    # In 256ths: the product of two weights is a whole number of 2**16ths.
    dy, dx = np.round((y - top) * 256).astype(int), np.round((x - left) * 256).astype(int)
    corners = (
        (top, left, (256 - dy) * (256 - dx)),
        (top, beside, (256 - dy) * dx),
        (below, left, dy * (256 - dx)),
        (below, beside, dy * dx),
    )
    found = jnp.zeros(images.shape, jnp.int32)
    for i, j, weight in corners:
        found += images[:, i, j].astype(jnp.int32) * weight[..., None].astype(np.int32)
    return _bytes((found + _ONE // 2) >> _BITS)


def _resampled(images: jax.Array, matrix: Callable[[int], np.ndarray]) -> jax.Array:
    """Columns, then rows, weighed by `matrix(size)` [size, size], rows of which sum to 1."""
    # Sums of bytes times weights stay below 2**24: exact in float32 in whatever order.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    height, width = images.shape[1:3]
    x = product("ij,njwc->niwc", _whole(matrix(height)), images.astype(jnp.float32))
    x = jnp.floor((x + _ONE / 2) / _ONE)
    x = product("ij,nhjc->nhic", _whole(matrix(width)), x)
    return _bytes(jnp.floor((x + _ONE / 2) / _ONE))


def _whole(matrix: np.ndarray) -> np.ndarray:
    """Weights as whole numbers that sum to 2**16 in each row, float32."""
    found = np.floor(matrix * _ONE)
    found[np.arange(len(found)), matrix.argmax(1)] += _ONE - found.sum(1)
    return found.astype(np.float32)


def _bytes(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 255).astype(jnp.uint8)
