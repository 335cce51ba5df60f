"""Data sets as they are handed around: folders of images, the cats-and-dogs archive.

Everything read here is untrusted: sizes are checked before memory is taken, archive members and
symbolic links never lead out of what was named, and damaged images are named.
"""

import concurrent.futures
import functools
import hashlib
import io
import itertools
import os
import pathlib
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from PIL import Image

from tl_jax import image_files
from tl_jax.errors import NOT_UTF8, UserError, is_text

MAX_MEMBER_BYTES = 1 << 28
THREADS = 4
CATS_AND_DOGS = ("Cat", "Dog")
_CAT_OR_DOG = re.compile(r"PetImages/(Cat|Dog)/[0-9]+\.jpg")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Example(NamedTuple):
    """One example: an encoded image (JPEG or PNG), its label, and its file name ("" if none)."""

    image: bytes
    label: int
    filename: str = ""


class RawSplit(NamedTuple):
    """`size` examples of about `nbytes` together, read anew by every call of `examples`."""

    size: int
    nbytes: int
    examples: Callable[[], Iterator[Example]]


class RawDataset(NamedTuple):
    """What is to be prepared.

    Attributes:
      class_names: by label.
      image_shape: (height, width, channels); height and width None where images have many sizes.
      splits: by name.
      sha256: of everything that was read, so that equal data sets are known as such.
      notes: what the user should know about what was left out.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]
    splits: dict[str, RawSplit]
    sha256: str
    notes: tuple[str, ...] = ()


def read_image_folder(folder: pathlib.Path) -> RawDataset:
    """One sub-folder per class, or train/, validation/, test/ of those: as `folder:` reads it.

    Examples lie in the order in which `folder:` numbers them, so that splits hold the same images.
    JPEG and PNG keep their bytes unless they need turning, or another mode than the others.

    Raises:
      UserError: no classes, unreadable images (all named), links that leave the folder.
    """
    from tl_jax.folder_source import SPLIT_FOLDERS, folder_source

    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    split_up = "train" in names and any(p.is_dir() for p in (folder / "train").iterdir())
    wanted = [SPLIT_FOLDERS.get(name, name) for name in names] if split_up else ["train"]
    advice = "Mend or remove them."
    found = folder_source(str(folder), wanted, skip_unreadable=False, advice=advice)
    files = {
        split: [
            (pathlib.Path(os.fsdecode(path)), int(label))
            for path, label in zip(table.encoded(order), table.labels[order], strict=True)
        ]
        for split, table in found.tables.items()
        for order in [table.order()]
    }
    every = [path for rows in files.values() for path, _ in rows]
    headers = image_files.headers(every, whole=True, threads=THREADS)
    broken = [
        f"{path} ({header})"
        for path, header in zip(every, headers, strict=True)
        if isinstance(header, image_files.UnreadableImage)
    ]
    if broken:
        more = f" and {len(broken) - 20} more" if len(broken) > 20 else ""
        raise UserError(
            f"{len(broken)} of {len(every)} images in {folder} cannot be read: "
            f"{', '.join(broken[:20])}{more}. {advice}"
        )
    good = [header for header in headers if isinstance(header, image_files.Header)]
    channels = max(header.channels for header in good)
    height, width, _ = image_files.common_shape(good) or (None, None, channels)
    digest = hashlib.sha256(repr((found.class_names, height, width, channels)).encode())
    splits: dict[str, RawSplit] = {}
    for split, rows in sorted(files.items()):
        for path, label in rows:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{split} {label} {content}\n".encode())
        size = sum(path.stat().st_size for path, _ in rows)
        splits[split] = RawSplit(len(rows), size, _file_examples(rows, channels))
    return RawDataset(found.class_names, (height, width, channels), splits, digest.hexdigest())


def read_cats_vs_dogs(source: pathlib.Path) -> RawDataset:
    """Microsoft's PetImages: the zip archive as it is downloaded, or the folder unpacked from it.

    As TFDS's builder does, files without a JFIF header are left out (1,738 of 25,000), and so are
    those that cannot be decoded. The bytes of the others are kept (TFDS encodes them again). They
    are put in a fixed order that depends on their names alone.

    Raises:
      UserError: the archive is damaged, or Cat and Dog are not in it.
    """
    archive = source.is_file()
    try:
        entries = _zip_entries(source) if archive else _pet_entries(source)
        sizes = {name: 0 for name in entries}
        digest = hashlib.sha256()

        def checked(name: str) -> tuple[str, bytes, bool, bool]:
            content = entries[name]()
            try:
                image_files.header(content, whole=True)
            except image_files.UnreadableImage:
                return name, content, b"JFIF" in content[:512], False
            return name, content, b"JFIF" in content[:512], True

        left_out = damaged = 0
        for name, content, has_header, sound in in_order(checked, sorted(entries)):
            if not (has_header and sound):
                left_out += not has_header
                damaged += has_header
                del sizes[name]
                continue
            sizes[name] = len(content)
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError) as error:
        raise UserError(f"{source} is damaged ({error}). Download it again.") from error
    present = {name.split("/")[1] for name in sizes}
    if present != set(CATS_AND_DOGS):
        raise UserError(f"{source} holds no usable PetImages/Cat/*.jpg and PetImages/Dog/*.jpg.")
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())

    def stored_example(name: str) -> Example:
        label = CATS_AND_DOGS.index(name.split("/")[1])
        return Example(stored(entries[name](), 3), label, name)

    split = RawSplit(len(order), sum(sizes.values()), lambda: in_order(stored_example, order))
    note = f"{left_out:,} images without a JFIF header and {damaged:,} damaged ones were left out"
    return RawDataset(
        ("cat", "dog"), (None, None, 3), {"train": split}, digest.hexdigest(), (note,)
    )


def stored(encoded: bytes, channels: int) -> bytes:
    """The image as it is kept: its own bytes where all decoders agree on them, else a PNG."""
    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO(encoded), formats=image_files.FORMATS) as image:
        turned = image.format == "JPEG" and image.getexif().get(0x0112, 1) != 1
        plain = image.format in ("JPEG", "PNG") and image.mode == mode
        if plain and not turned and "transparency" not in image.info:
            return encoded
    return png(image_files.decode(encoded).convert(mode))


def png(image: Image.Image) -> bytes:
    """The image encoded without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(work, items)` by threads, only a few results ahead of the one that is asked for."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        remaining = iter(items)
        ahead = deque(pool.submit(work, item) for item in itertools.islice(remaining, 64))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in itertools.islice(remaining, 1))


def _file_examples(
    rows: list[tuple[pathlib.Path, int]], channels: int
) -> Callable[[], Iterator[Example]]:
    def example(row: tuple[pathlib.Path, int]) -> Example:
        return Example(stored(row[0].read_bytes(), channels), row[1])

    return lambda: in_order(example, rows)


def _zip_entries(path: pathlib.Path) -> dict[str, Callable[[], bytes]]:
    """Readers of the archive's images by name. Nothing is unpacked, so no name can lead away."""
    archive = zipfile.ZipFile(path)
    members = [info for info in archive.infolist() if _CAT_OR_DOG.fullmatch(info.filename)]
    if large := [info.filename for info in members if info.file_size > MAX_MEMBER_BYTES]:
        raise UserError(f"{path} holds files that are too large for images: {', '.join(large)}.")
    return {info.filename: functools.partial(archive.read, info) for info in members}


def _pet_entries(folder: pathlib.Path) -> dict[str, Callable[[], bytes]]:
    base = folder / "PetImages" if (folder / "PetImages").is_dir() else folder
    entries: dict[str, Callable[[], bytes]] = {}
    refused: list[str] = []
    for kind in CATS_AND_DOGS:
        for path in (base / kind).glob("*.jpg"):
            inside = path.resolve().is_relative_to(folder.resolve())
            if not (inside and path.is_file() and is_text(path.name)):
                refused.append(repr(str(path)))
            entries[f"PetImages/{kind}/{path.name}"] = path.read_bytes
    if refused:
        raise UserError(
            f"Links that leave the folder, what is no file, and names that are {NOT_UTF8} are "
            f"refused: {', '.join(refused[:20])}."
        )
    return entries
