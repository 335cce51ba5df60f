"""What every source of data has in common: its records, sections of splits, and fingerprints."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Record(NamedTuple):
    """One example, not yet decoded: bytes or path of the image, label, and words to name it by."""

    image: bytes | str
    label: int
    where: str


class Section(NamedTuple):
    """Examples start ≤ i < stop of one split on disk."""

    split: str
    start: int
    stop: int


class Records(Protocol):
    """Random access to encoded examples."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at `indices`, in their order."""


class Source(Protocol):
    """A data set: what `tfds_source` and `table_source` provide."""

    @property
    def name(self) -> str:
        """Of the data set."""

    @property
    def version(self) -> str:
        """Of the data set, "" where it has none."""

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of examples by split on disk."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of all images, None when they have many sizes."""

    @property
    def unreadable(self) -> int:
        """Number of images that were left out since they cannot be read."""

    def sections(self, split: str) -> list[Section]:
        """What a split specification selects; ValueError where it is wrong."""

    def records(self, split: str) -> Records:
        """The examples that a split specification selects."""

    def fingerprint(self, split: str) -> str:
        """SHA-256 of what identifies these examples, cheap to compute."""


def fingerprint(*parts: object) -> str:
    """SHA-256 (hex) of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content(path: Any) -> str:
    """SHA-256 of a file's size and bytes: all to 64 MiB, beyond 16 pieces spread over it."""
    piece = 2**22
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        file.seek(0)
        if size <= 16 * piece:
            digest.update(file.read())
        else:
            for i in range(16):
                file.seek((size - piece) * i // 15)
                digest.update(file.read(piece))
    return digest.hexdigest()
