"""MNIST's idx files, plain or compressed, checked as untrusted input.

Format: http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import hashlib
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tl_jax.errors import UserError
from tl_jax.raw_datasets import Example, RawDataset, RawSplit, in_order, png

IDX_SPLITS = {"train": "train", "t10k": "test"}
MAX_IDX_BYTES = 1 << 33
BLOCK = 1 << 20  # bytes


def has_idx_files(folder: pathlib.Path) -> bool:
    """Whether the folder holds files named as MNIST's."""
    return any(re.search(r"-(images|labels)[-.]idx[0-9]-ubyte", p.name) for p in folder.iterdir())


def read_idx(folder: pathlib.Path) -> RawDataset:
    """Four idx files named as MNIST's are: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].

    Images uint8 [n, h, w] become PNG in the order of the files; classes are named by their number.

    Raises:
      UserError: files are missing, truncated, no idx, or do not fit each other.
    """
    parts = [
        (prefix, kind, dims)
        for prefix in IDX_SPLITS
        for kind, dims in (("images", 3), ("labels", 1))
    ]
    paths = {(p, kind): _idx_file(folder, f"{p}-{kind}-idx{dims}-ubyte") for p, kind, dims in parts}
    missing = [f"{p}-{k}-idx{d}-ubyte[.gz]" for p, k, d in parts if paths[p, k] is None]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}.")
    arrays: dict[tuple[str, str], np.ndarray] = {}
    problems: list[str] = []
    for prefix, kind, dims in parts:
        path = paths[prefix, kind]
        assert path is not None
        try:
            arrays[prefix, kind] = _read_idx_file(path, folder, dims)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            problems.append(f"{path}: {error}")
    for prefix in IDX_SPLITS if not problems else ():
        images, labels = arrays[prefix, "images"], arrays[prefix, "labels"]
        if len(images) != len(labels):
            problems.append(
                f"{paths[prefix, 'images']} holds {len(images):,} images, "
                f"{paths[prefix, 'labels']} {len(labels):,} labels"
            )
        elif images.size == 0:
            problems.append(f"{paths[prefix, 'images']} holds no images")
        elif images.shape[1:] != arrays["train", "images"].shape[1:]:
            problems.append(f"{paths[prefix, 'images']}: its images have another size than train's")
    if problems:
        raise UserError(f"The idx files cannot be used: {'; '.join(problems)}.")
    digest = hashlib.sha256()
    splits: dict[str, RawSplit] = {}
    for prefix, split in IDX_SPLITS.items():
        images, labels = arrays[prefix, "images"], arrays[prefix, "labels"]
        for array in (images, labels):
            digest.update(f"{split} {array.shape} ".encode() + array.tobytes())
        splits[split] = RawSplit(len(images), images.size, _idx_examples(images, labels))
    count = 1 + max(int(arrays[prefix, "labels"].max()) for prefix in IDX_SPLITS)
    shape = (*arrays["train", "images"].shape[1:], 1)
    return RawDataset(tuple(map(str, range(count))), shape, splits, digest.hexdigest())


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The plain or compressed file; some copies write a dot before "idx"."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def _read_idx_file(path: pathlib.Path, folder: pathlib.Path, dims: int) -> np.ndarray:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a symbolic link that leaves the folder is refused")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.read(4 + 4 * dims)
        if len(header) < 4 + 4 * dims or header[:3] != b"\0\0\x08" or header[3] != dims:
            raise ValueError(f"it does not begin as an idx{dims}-ubyte file")
        shape = struct.unpack(f">{dims}I", header[4:])
        size = int(np.prod(shape, dtype=object))
        if size > MAX_IDX_BYTES:
            raise ValueError(f"{list(shape)} is more than {MAX_IDX_BYTES:,} bytes")
        # In blocks, so that memory is taken for what is there; one more, to see what is too much.
        content = bytearray()
        while block := file.read(min(BLOCK, size + 1 - len(content))):
            content += block
    if len(content) != size:
        fewer = f"only {len(content):,}" if len(content) < size else "more"
        raise ValueError(f"it should hold {list(shape)} = {size:,} bytes and holds {fewer}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_examples(images: np.ndarray, labels: np.ndarray) -> Callable[[], Iterator[Example]]:
    def example(index: int) -> Example:
        return Example(png(Image.fromarray(images[index])), int(labels[index]))

    return lambda: in_order(example, range(len(images)))
