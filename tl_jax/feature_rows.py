"""Activations of a split by row, in the memory of this process or mapped into it."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from tl_jax.input_pipeline import Indices

Leaves = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationRows:
    """Rows {"activations": what a block takes, "label": int32 [b], "index": int32 [b]}.

    View v of example i is row v · len(labels) + i.

    Attributes:
      name: split and data set, for messages.
      shards: the leaves of each shard, [rows of a shard, …].
      structure: of the tree that the leaves make up.
      labels: int32 [N], by example.
      seconds: that making them took the run that did.
    """

    name: str
    shards: Sequence[Leaves]
    structure: Any
    labels: np.ndarray
    seconds: float = 0.0

    cheap = True  # see `input_pipeline.Rows`

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Indices, views: np.ndarray | None = None) -> dict[str, Any]:
        """See `input_pipeline.Rows`."""
        index = np.asarray(indices, np.int32)
        rows = index.astype(np.int64)
        if views is not None:
            rows = rows + views.astype(np.int64) * len(self.labels)
        leaves = [self._take(number, rows) for number in range(len(self.shards[0]))]
        return {
            "activations": jax.tree.unflatten(self.structure, leaves),
            "label": self.labels[index],
            "index": index,
        }

    def _take(self, leaf: int, rows: np.ndarray) -> np.ndarray:
        first = self.shards[0][leaf]
        if len(self.shards) == 1:
            return first[rows]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for place, (shard, row) in enumerate(zip(*divmod(rows, len(first)), strict=True)):
            taken[place] = self.shards[shard][leaf][row]
        return taken

    def tree(self) -> Any:
        """All rows: leaves [views · N, …]."""
        leaves = [
            parts[0] if len(parts) == 1 else np.concatenate(parts)
            for parts in zip(*self.shards, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a cache will hold.

    Attributes:
      name: split and data set, for messages.
      rows: examples × views.
      examples: rows of one view.
      shapes: tree of the activations of a batch: shapes [b, …] with dtype.
    """

    name: str
    rows: int
    examples: int
    shapes: Any

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        leaves = jax.tree.leaves(self.shapes)
        return sum(int(np.prod(x.shape[1:], dtype=np.int64)) * x.dtype.itemsize for x in leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def structure(self) -> Any:
        """Of the tree of activations."""
        return jax.tree.structure(self.shapes)

    def empty(self, rows: int) -> list[np.ndarray]:
        """Leaves for so many rows, to be filled."""
        return [np.empty((rows, *x.shape[1:]), x.dtype) for x in jax.tree.leaves(self.shapes)]


Pieces = Iterable[tuple[Leaves, np.ndarray]]  # leaves and labels of consecutive rows


class Produce(Protocol):
    """What gives the rows of a split, and the seconds since it was called."""

    def __call__(self) -> Pieces: ...  # noqa: D102

    def seconds(self) -> float: ...  # noqa: D102


def in_memory(layout: Layout, produce: Produce) -> ActivationRows:
    """The rows in the host's memory."""
    leaves, labels, done = layout.empty(layout.rows), np.empty(layout.rows, np.int32), 0
    for parts, found in produce():
        for leaf, part in zip(leaves, parts, strict=True):
            leaf[done : done + len(found)] = part
        labels[done : done + len(found)] = found
        done += len(found)
    assert done == layout.rows
    by_example, took = labels[: layout.examples], produce.seconds()
    return ActivationRows(layout.name, [leaves], layout.structure, by_example, took)
