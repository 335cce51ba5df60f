"""What folders of images and data sets of the Hub have in common: tables of `datasets`, in order.

Such data often lie class by class, so each split on disk is put into one fixed order, a permutation
that depends on its length alone, before slicing.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.errors import UserError
from tl_jax.records import Record, Section, fingerprint

ORDER_SEED = 0
NAMED = 20  # this many of a long list are named


@dataclasses.dataclass(frozen=True)
class Table:
    """One split on disk: encoded images beside their labels.

    Attributes:
      images: `datasets.Dataset`.
      column: its column of undecoded images, {"bytes", "path"}.
      labels: int64 [n].
      identity: hash of what identifies the split.
      roots: where a path without bytes may lie; None when all paths were checked before.
    """

    images: Any
    column: str
    labels: np.ndarray
    identity: str
    roots: tuple[pathlib.Path, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, rows: np.ndarray | slice) -> list[bytes | str]:
        """Bytes, or the path, of the images in these rows.

        Raises:
          UserError: a path leads elsewhere than where the data set lies.
        """
        found = self.images[rows][self.column]
        encoded = [item["path"] if item["bytes"] is None else item["bytes"] for item in found]
        if self.roots is not None:
            for path in encoded:
                if isinstance(path, str) and not _below(path, self.roots):
                    raise UserError(f"An image's path leads out of the data set: {path}. Refused.")
        return encoded

    def order(self) -> np.ndarray:
        """The fixed permutation in which examples are numbered; legacy NumPy, frozen for ever."""
        return np.random.RandomState(ORDER_SEED).permutation(len(self))


@dataclasses.dataclass(frozen=True)
class TableSource:
    """The splits of a data set held by tables; the attributes are those of `records.Source`."""

    name: str
    version: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    tables: Mapping[str, Table]
    unreadable: int = 0

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of examples by split."""
        return {split: len(table) for split, table in self.tables.items()}

    def sections(self, split: str) -> list[Section]:
        """What a split specification such as "train[:90%]" selects, in order.

        Raises:
          ValueError: it cannot be parsed, or names a split that does not exist.
        """
        import datasets

        parts = datasets.ReadInstruction.from_spec(split).to_absolute(self.split_sizes)
        return [Section(part.splitname, part.from_, part.to) for part in parts]

    def records(self, split: str) -> "TableRecords":
        """Random access to the encoded examples that a split specification selects."""
        chosen = [
            (section.split, self.tables[section.split].order()[section.start : section.stop])
            for section in self.sections(split)
        ]
        self._check_labels(split, chosen)
        return TableRecords(self, chosen)

    def _check_labels(self, split: str, chosen: Sequence[tuple[str, np.ndarray]]) -> None:
        labels = np.concatenate([self.tables[name].labels[rows] for name, rows in chosen])
        wrong = labels[(labels < 0) | (labels >= len(self.class_names))]
        if len(wrong):
            raise UserError(
                f"{self.name}, split {split!r}: {len(wrong)} of {len(labels)} labels lie outside "
                f"0..{len(self.class_names) - 1} ({listed(map(str, np.unique(wrong)))}). A split "
                "without labels (often the test split) cannot be used."
            )

    def fingerprint(self, split: str) -> str:
        """SHA-256 over name, split, class names, labels, and files (folder) or commit (Hub)."""
        sections = self.sections(split)
        tables = [self.tables[section.split].identity for section in sections]
        return fingerprint(self.name, self.version, sections, self.class_names, tables)


class TableRecords:
    """Records of the chosen rows of one or more tables."""

    def __init__(self, source: TableSource, chosen: Sequence[tuple[str, np.ndarray]]):
        self._name, self._tables = source.name, source.tables
        self._splits = [split for split, _ in chosen]
        self._part = np.repeat(np.arange(len(chosen)), [len(rows) for _, rows in chosen])
        self._rows = np.concatenate([rows for _, rows in chosen])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at `indices`, in their order."""
        chosen = np.asarray(indices, np.int64)
        records: dict[int, Record] = {}
        for part in np.unique(self._part[chosen]):
            split = self._splits[part]
            table = self._tables[split]
            positions = np.flatnonzero(self._part[chosen] == part)
            rows = self._rows[chosen[positions]]
            encoded = table.encoded(rows)
            for position, row, image in zip(positions.tolist(), rows, encoded, strict=True):
                where = image if isinstance(image, str) else f"{self._name} {split} row {row}"
                records[position] = Record(image, int(table.labels[row]), where)
        return [records[position] for position in range(len(chosen))]


def _below(path: str, roots: Iterable[pathlib.Path]) -> bool:
    return any(pathlib.Path(path).resolve().is_relative_to(root) for root in roots)


def named_splits(source: str, wanted: Iterable[str], existing: Iterable[str]) -> list[str]:
    """The existing splits that split specifications name, in their order on disk.

    Raises:
      UserError: a specification names a split that does not exist.
    """
    existing = list(existing)
    parts = [part.strip() for text in wanted for part in text.split("+")]
    names = [re.split(r"[\[(]", part)[0].strip() for part in parts]
    if missing := [name for name in dict.fromkeys(names) if name not in existing]:
        raise UserError(
            f"{source} has no split {listed(map(repr, missing))}; its splits are: "
            f"{', '.join(existing)}."
        )
    return [name for name in existing if name in names]


def listed(items: Iterable[str]) -> str:
    """The items with semicolons between them, the end of a long list as a number."""
    items = list(items)
    more = f"; and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more
