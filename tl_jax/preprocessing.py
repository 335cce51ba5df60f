"""From uint8 images to what the network expects, as the checkpoint's image processor does it.

The values come from a `preprocessor_config.json`, of today's form or of the Hub's older files. They
are applied on the accelerator to images of one size (`Preprocessing.device`), or by Pillow on the
host to images of many sizes (`Preprocessing.host`, then `after_host().device`). The pixels are
those of transformers' PIL image processors.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import processor_files, resampling
from tl_jax.augmentation import augment
from tl_jax.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Preprocessing", "augment"]

# A resized image beyond this comes from a strip such as 1 x 10000, not from a photograph.
_MAX_PIXELS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, rescale, normalise; None leaves a step out. Hashable plain values.

    Attributes:
        channels: of the network's input, 1 or 3 (grayscale is repeated, RGB becomes Pillow's L).
        resize: (height, width), or an int: the shorter edge, the other keeps the proportions.
        crop: (height, width) of the centre crop; a smaller image is padded with zeros.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic, …).
        rescale_factor: multiplies the bytes, usually 1/255.
        mean: per channel, in units of the rescaled image; std likewise. Both or neither.
        std: see mean.
    """

    channels: int
    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def from_processor(
        cls,
        processor: dict[str, Any],
        num_channels: int,
        image_size: int | None = None,
        *,
        model_type: str | None = None,
    ) -> Self:
        """Read the content of a `preprocessor_config.json`.

        Args:
            processor: the file's content; a missing field has the default of transformers' class.
            num_channels: channels of the network's input.
            image_size: resize straight to this height and width and do not crop.
            model_type: says which class an old file without a type means ("resnet", "vit").

        Raises:
            UserError: naming every value that makes no sense or is not supported.
        """
        return cls(**processor_files.read(processor, num_channels, image_size, model_type))

    def to_processor(self) -> dict[str, Any]:
        """A `preprocessor_config.json` with which transformers makes the same pixels."""
        return processor_files.write(dataclasses.asdict(self))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what `host` and `device` return."""
        if self.crop is not None:
            return self.crop
        if not isinstance(self.resize, tuple):
            raise UserError(
                "the preprocessing gives images of many sizes: set config.model.image_size"
            )
        return self.resize

    def after_host(self) -> Self:
        """What is left to do on the device after `host`: its images already have `output_size`."""
        return dataclasses.replace(self, resize=self.output_size, crop=None)

    def host(self, image: "PIL.Image.Image") -> np.ndarray:
        """Convert, resize and crop one image with Pillow.

        Args:
            image: of any mode. Transparency is laid on white, as transformers does. The EXIF
                orientation is not applied, which is what transformers' processors do with an
                opened image (Hugging Face `datasets` has applied it already).

        Returns:
            uint8 [H, W, channels], H and W being `output_size`.

        Raises:
            UserError: the image is a strip so thin that its resized form would be huge.
        """
        image = _convert(image, self.channels)
        height, width = self._resized_size(image.height, image.width)
        array = np.asarray(image.resize((width, height), resample=self.resample))
        array = array.reshape(height, width, self.channels)
        return _center_crop(array[None], self.crop, np.pad)[0]

    def device(self, images: jax.Array) -> jax.Array:
        """Preprocess a batch on the accelerator; pure, for use under `jax.jit`.

        Args:
            images: uint8 [N, h, w, c], c being `channels`, 1 or 3.

        Returns:
            float32 [N, H, W, channels], H and W being `output_size`.

        Raises:
            UserError: another dtype, or channels that the network cannot take.
        """
        if images.dtype != jnp.uint8 or images.ndim != 4:
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}; needed are uint8 [N, h, w, c]"
            )
        if images.shape[-1] == 3 and self.channels == 1:
            images = _luma(images)
        if images.shape[-1] not in (1, self.channels):
            raise UserError(
                f"images have {images.shape[-1]} channels, the network takes {self.channels}: "
                "convert the data set to grayscale or RGB"
            )
        size = self._resized_size(*images.shape[1:3])
        images = resampling.resize(images, size, self.resample)
        images = _center_crop(images, self.crop, jnp.pad)
        x = jnp.broadcast_to(images, (*images.shape[:3], self.channels)).astype(jnp.float32)
        high, low, shift = self._affine()
        return x * high + (x * low + shift)

    def _affine(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x * rescale_factor - mean) / std as x * (high + low) + shift, float32 [channels] each.

        A byte times 16 bits is exact, so that no compiler's choice of fused multiply-adds changes
        a bit: every program and every backend gives the same pixels.
        """
        std = np.asarray(self.std or [1.0], np.float32).astype(np.float64)
        mean = np.asarray(self.mean or [0.0], np.float32).astype(np.float64)
        factor = (1.0 if self.rescale_factor is None else self.rescale_factor) / std
        high = _first_16_bits(factor)
        return high, _first_16_bits(factor - high), (-mean / std).astype(np.float32)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        new_short, new_long = self.resize, int(self.resize * long / short)
        if new_short * new_long > _MAX_PIXELS:
            raise UserError(
                f"an image of {height} x {width} pixels would become {new_short} x {new_long}: "
                "leave it out, or set config.model.image_size"
            )
        return (new_long, new_short) if width <= height else (new_short, new_long)


def _convert(image: "PIL.Image.Image", channels: int) -> "PIL.Image.Image":
    """To L or RGB, transparency laid on white (as transformers' `convert_to_rgb`)."""
    if channels not in (1, 3):
        raise UserError(f"image files hold 1 or 3 channels, the network takes {channels}")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        import PIL.Image

        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _first_16_bits(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) & 0xFFFFFF00).view(np.float32)


def _luma(images: jax.Array) -> jax.Array:
    """Pillow's conversion from RGB to L: ITU-R 601-2 in 16-bit fixed point; uint8 [..., 1]."""
    rgb = images.astype(jnp.int32)
    luma = (rgb[..., 0] * 19595 + rgb[..., 1] * 38470 + rgb[..., 2] * 7471 + 0x8000) >> 16
    return luma.astype(jnp.uint8)[..., None]


def _center_crop(images: Any, crop: tuple[int, int] | None, pad: Any) -> Any:
    """Crop [N, h, w, C] as transformers does: what is missing is zero, the odd one before."""
    if crop is None:
        return images
    for axis, size in zip((1, 2), crop, strict=True):
        excess = images.shape[axis] - size
        start = max(excess // 2, 0)
        images = images[(slice(None),) * axis + (slice(start, start + size),)]
        if excess < 0:
            widths = [(0, 0)] * 4
            widths[axis] = ((1 - excess) // 2, -excess // 2)
            images = pad(images, widths)
    return images
