"""Pillow's 8-bit resize as matrix products on the accelerator, bit for bit.

Pillow resizes in two passes, one axis at a time, with fixed-point coefficients of 22 bits and with
rounding and clipping to 0..255 after each pass (`src/libImaging/Resample.c`). One pass in floating
point is up to 21/255 away from it on noise. Here every coefficient is split into a high and a low
part whose products with bytes sum exactly in float32, so that CPU, GPU and TPU agree with Pillow.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)
NAMES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

_PRECISION_BITS = 22
_LOW_BITS = 11


def _cubic(x: np.ndarray) -> np.ndarray:
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _hamming(x: np.ndarray) -> np.ndarray:
    # Pillow's constants are floats in C, the rest is double.
    window = np.float32(0.54) + np.float32(0.46) * np.cos(np.pi * x)
    return np.where(x < 1, np.sinc(x) * window, 0.0)


# Filters of the distance x >= 0 in source pixels, and the half width where they end.
_FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (lambda x: np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0), 3.0),
    BILINEAR: (lambda x: np.maximum(0.0, 1 - x), 1.0),
    BICUBIC: (_cubic, 2.0),
    BOX: (lambda x: np.where(x <= 0.5, 1.0, 0.0), 0.5),
    HAMMING: (_hamming, 1.0),
}


@functools.lru_cache(maxsize=64)
def coefficients(size_in: int, size_out: int, resample: int) -> np.ndarray:
    """The matrix of one pass, in units of 2**-22: int64 [size_out, size_in], not to be written to.

    Row i weighs the source pixels around (i + 1/2) * size_in / size_out; when the image shrinks
    the filter widens by the same factor (antialiasing). Rows sum to about 2**22.
    """
    scale = size_in / size_out
    matrix = np.zeros((size_out, size_in), np.int64)
    if resample == NEAREST:
        # Pillow walks by adding the step, so its rounding errors are kept too.
        positions = np.cumsum(np.r_[scale * 0.5, np.full(size_out - 1, scale)])
        inside = np.minimum(positions.astype(np.int64), size_in - 1)
        matrix[np.arange(size_out), inside] = 1 << _PRECISION_BITS
        matrix.setflags(write=False)
        return matrix
    stretch = max(scale, 1.0)
    weigh, half_width = _FILTERS[resample]
    support = half_width * stretch
    inverse = 1.0 / stretch
    for i in range(size_out):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size_in)
        x = (np.arange(last - first) + first - center + 0.5) * inverse
        weights = weigh(np.abs(x))
        if resample == BOX:
            weights[x == -0.5] = 0.0  # Pillow's box is open on the left
        total = math.fsum(weights)
        if total:
            weights = weights / total
        fixed = weights * (1 << _PRECISION_BITS)
        matrix[i, first:last] = np.trunc(np.where(fixed < 0, fixed - 0.5, fixed + 0.5))
    matrix.setflags(write=False)
    return matrix


def _one_pass(images: jax.Array, axis: int, size_out: int, resample: int) -> jax.Array:
    """Resize one of the two last axes of float32 [..., h, w] holding bytes; returns the same."""
    matrix = coefficients(images.shape[axis], size_out, resample)
    # A row of the matrix is zero but for a few neighbours: blocks of rows skip most zeros.
    rows = max(32, -(-size_out // 8))
    blocks = [
        _product(matrix[first : first + rows], images, axis) for first in range(0, size_out, rows)
    ]
    return jnp.concatenate(blocks, axis)


def _product(matrix: np.ndarray, images: jax.Array, axis: int) -> jax.Array:
    used = np.flatnonzero(matrix.any(axis=0))
    matrix = matrix[:, used[0] : used[-1] + 1]
    images = jax.lax.slice_in_dim(images, int(used[0]), int(used[-1]) + 1, axis=axis)
    half = 1 << (_LOW_BITS - 1)
    low = ((matrix + half) & ((1 << _LOW_BITS) - 1)) - half
    high = (matrix - low) >> _LOW_BITS
    equation = "oi,...hi->...ho" if axis == images.ndim - 1 else "oi,...iw->...ow"

    def product(part: np.ndarray) -> jax.Array:
        # HIGHEST: TF32 and bfloat16 would round the sums, which are exact integers in float32.
        sums = jnp.einsum(
            equation, part.astype(np.float32), images, precision=jax.lax.Precision.HIGHEST
        )
        return sums.astype(jnp.int32)

    total = product(high) << _LOW_BITS
    if low.any():
        total = total + product(low)
    rounded = (total + (1 << (_PRECISION_BITS - 1))) >> _PRECISION_BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.float32)


def resize(images: jax.Array, size: tuple[int, int], resample: int) -> jax.Array:
    """Resize as `PIL.Image.resize` (Pillow 13) does, on the device.

    Args:
        images: uint8 [N, h, w, C].
        size: (height, width) of the result.
        resample: Pillow's number of the filter (0..5, see `NAMES`).

    Returns:
        uint8 [N, H, W, C], equal to Pillow's result; filters of more than 64 taps (an image shrunk
        16 times by bicubic) may differ by 1 where a sum lies on a rounding boundary.
    """
    height, width = images.shape[1:3]
    if (height, width) == size:
        return images
    # Channels before rows make each pass one matrix product over the last two axes.
    x = jnp.moveaxis(images, -1, 1).astype(jnp.float32)
    passes = [(x.ndim - 1, width, size[1]), (x.ndim - 2, height, size[0])]
    if height - size[0] > max(0, 2 * (width - size[1])):
        passes.reverse()
    for axis, size_in, size_out in passes:
        if size_in != size_out:
            x = _one_pass(x, axis, size_out, resample)
    return jnp.moveaxis(x.astype(jnp.uint8), 1, -1)
