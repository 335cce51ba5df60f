"""Encoded images → PIL images, and folders of image files → lists of what they hold.

Only raster formats that PIL decodes by itself are opened. Damaged files, decompression bombs and
symbolic links that leave the folder are refused by name.
"""

import concurrent.futures
import io
import os
import pathlib
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

from tl_jax.errors import NOT_UTF8, is_text

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".pgm",
    ".ppm",
)
GRAY = ("L", "1")
MAX_PIXELS = 1 << 27  # about 134 million, a 400 MB RGB image
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL_BYTES = 4096


class UnreadableImage(Exception):
    """An image that cannot be used; the message says why, without naming it."""


class Header(NamedTuple):
    """Size after turning upright, in pixels, and 1 (grayscale) or 3 channels."""

    height: int
    width: int
    channels: int


def decode(encoded: bytes | str | os.PathLike[str]) -> Image.Image:
    """The image in `encoded` (its bytes or its path), upright, in mode L or RGB.

    Transparency is laid on white, as transformers' image processors do.

    Raises:
      UnreadableImage: damaged, truncated, too large, or in a format that is not supported.
    """
    try:
        with _opened(encoded) as image:
            image.load()
            mode = "L" if image.mode in GRAY else "RGB"
            if _orientation(image) > 1:
                image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            return image if image.mode == mode else image.convert(mode)
    except UnreadableImage:
        raise
    except Exception as error:  # each of PIL's decoders raises what it likes
        raise UnreadableImage(_reason(error)) from error


def header(encoded: bytes | str | os.PathLike[str], whole: bool = False) -> Header:
    """Size and channels from the first bytes; all pixels are decoded where `whole`.

    A JPEG or PNG file without its end marker is decoded too, so that a truncated file shows.

    Raises:
      UnreadableImage: as `decode`.
    """
    try:
        with _opened(encoded) as image:
            if whole or not _ends(encoded, END_MARKERS.get(str(image.format), b"")):
                image.load()
            width, height = image.size
            if _orientation(image) >= 5:  # turned by 90 degrees
                width, height = height, width
            return Header(height, width, 1 if image.mode in GRAY else 3)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def _opened(encoded: bytes | str | os.PathLike[str]) -> Image.Image:
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    if not isinstance(file, io.BytesIO) and not stat.S_ISREG(os.stat(file).st_mode):
        raise UnreadableImage("not a regular file")  # a pipe would be waited for
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels: too large")
    if image.mode.startswith(("I", "F")):
        raise UnreadableImage(f"more than 8 bits a pixel (mode {image.mode})")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8. A PNG keeps it behind its pixels, and hardly ever has one."""
    if image.format == "PNG":
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _ends(encoded: bytes | str | os.PathLike[str], marker: bytes) -> bool:
    """Whether the end of the file holds the marker."""
    if isinstance(encoded, bytes):
        return marker in encoded[-TAIL_BYTES:]
    with open(encoded, "rb") as file:
        file.seek(-min(TAIL_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return marker in file.read()


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the caller gives
    return str(error) or type(error).__name__


def headers(
    images: Sequence[bytes | str | os.PathLike[str]], whole: bool = False, threads: int = 8
) -> list[Header | UnreadableImage]:
    """What `header` says of each image, or the error that it raised; read by threads."""

    def attempt(image: bytes | str | os.PathLike[str]) -> Header | UnreadableImage:
        try:
            return header(image, whole)
        except UnreadableImage as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(attempt, images, chunksize=64))


def common_shape(found: Iterable[Header]) -> tuple[int, int, int] | None:
    """The one (height, width, channels) of all, gray among colour counting as colour, or None."""
    distinct = set(found)
    if len({(item.height, item.width) for item in distinct}) != 1:
        return None
    height, width, channels = max(distinct, key=lambda item: item.channels)
    return height, width, channels


def _raise(error: OSError) -> None:
    raise error


def image_files(folder: pathlib.Path, root: pathlib.Path) -> tuple[list[str], list[str]]:
    """Paths of all image files below `folder`, relative to `root` with "/", sorted.

    Hidden files, and files whose name does not end as an image's, are passed over.

    Returns:
      The paths, and a list of problems: symbolic links to folders or out of `root`, and names that
      are not UTF-8.

    Raises:
      OSError: a folder cannot be read.
    """
    inside = root.resolve()
    paths: list[str] = []
    problems: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                problems.append(f"{os.path.join(parent, name)} is a symbolic link to a folder")
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = pathlib.Path(parent, name)
            if not is_text(str(path)):
                problems.append(f"{str(path)!r} has a name that is {NOT_UTF8}")
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                problems.append(f"{path} is a symbolic link out of {root}")
            paths.append(path.relative_to(root).as_posix())
    return sorted(paths), problems
