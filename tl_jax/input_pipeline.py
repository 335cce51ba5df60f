"""Examples → batches on the host: order, shard by process, batch, pad, prefetch; restartable.

The order of an epoch is a permutation of (seed, epoch) alone: with any number of processes the
global batches hold the same examples in the same order, and process p reads rows
[p · b, (p + 1) · b) of each, b = batch_size // process_count. Images stay uint8.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from tl_jax.config import Data
from tl_jax.datasets import Examples
from tl_jax.errors import UserError
from tl_jax.preprocessing import Preprocessing

THREADS = 8
ORDER = "philox"  # names how an epoch's order is drawn: a run goes on only in its own
SMALL = 64 * 64  # pixels; below this Python itself is the cost, and threads wait for each other
Batch = dict[str, Any]
Indices = Sequence[int] | np.ndarray


class Rows(Protocol):
    """What the batches of a split are made of: a row for each of its examples."""

    @property
    def name(self) -> str:
        """Split and data set, for messages."""

    @property
    def cheap(self) -> bool:
        """Whether reading rows is so quick that threads would wait for each other."""

    def __len__(self) -> int: ...

    def load(self, indices: Indices, views: np.ndarray | None = None) -> Batch:
        """The rows at these indices: leaves [b, …].

        Args:
          indices: positions in the split; none at all gives leaves [0, …].
          views: int32 [b], which of its views each example shows, where it has several.
        """


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Rows {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int32 [b]}.

    Attributes:
      examples: the split.
      preprocessing: its `host` makes one size of images of many sizes; otherwise unused.
    """

    examples: Examples
    preprocessing: Preprocessing

    @property
    def name(self) -> str:
        """See `Rows`."""
        return f"{self.examples.split!r} of {self.examples.name}"

    @property
    def cheap(self) -> bool:
        """See `Rows`."""
        shape = self.examples.image_shape
        return shape is not None and shape[0] * shape[1] <= SMALL

    def __len__(self) -> int:
        return len(self.examples)

    def load(self, indices: Indices, views: np.ndarray | None = None) -> Batch:
        """See `Rows`; a view is the device's to draw, so it is passed on as "view"."""
        shape = self.examples.image_shape
        found = self.examples.get(list(indices))
        images = [example["image"] for example in found]
        if shape is None:
            images = [self.preprocessing.host(image) for image in images]
            shape = (*self.preprocessing.output_size, self.preprocessing.channels)
        batch = {
            "image": np.stack(images) if images else np.zeros((0, *shape), np.uint8),
            "label": np.array([example["label"] for example in found], np.int32),
            "index": np.array(indices, np.int32),
        }
        return batch if views is None else {**batch, "view": views}


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples the training batches of this process hold, one epoch after the other.

    Every epoch has its own order, uses an example at most once, and drops what is left over after
    examples // batch_size batches. In epoch e example i shows view (i + e) mod `views`, so that in
    so many epochs it shows each of them once.

    Attributes:
      examples: in the split.
      batch_size: of all processes together.
      seed: of the order.
      views: how many an example has; None where it has but one.
      process_index: of this process.
      process_count: number of processes.
    """

    examples: int
    batch_size: int
    seed: int
    views: int | None = None
    process_index: int = 0
    process_count: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Full batches."""
        return self.examples // self.batch_size

    def batch(self, number: int) -> Batch:
        """Those of batch `number` (from 0 on): "index" int32 [b] (and "view")."""
        local = _local_size(self.batch_size, self.process_index, self.process_count)
        epoch, place = divmod(number, self.steps_per_epoch)
        start = place * self.batch_size + self.process_index * local
        index = permutation(self.examples, self.seed, epoch)[start : start + local]
        if self.views is None:
            return {"index": index}
        return {"index": index, "view": ((index + epoch) % self.views).astype(np.int32)}

    def batches(self, start: int, stop: int) -> Batch:
        """Those of batches `start` to `stop`: "index" (and "view") int32 [b, stop - start]."""
        found = [self.batch(number) for number in range(start, stop)]
        return {name: np.stack([batch[name] for batch in found], axis=1) for name in found[0]}


@functools.lru_cache(maxsize=2)  # batches are read ahead into the next epoch
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples, int32 [count]."""
    # NumPy keeps the bits of its generators from release to release, not its `permutation`.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    order = np.argsort(bits, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def training_batches(
    rows: Rows,
    order: Order,
    *,
    num_epochs: int | None,
    start: int = 0,
    threads: int | None = None,
    workers: int = 0,
    prefetch: int = 16,
) -> grain.DatasetIterator:
    """Shuffled batches of this process.

    Args:
      rows: of the split to train on.
      order: says which of them make up a batch.
      num_epochs: number of epochs, None for no end.
      start: batches of all epochs to leave out, as they were used before.
      threads: batches that are read at the same time, None for a number that suits their size.
      workers: processes that read and decode, for images too large for the threads of one.
      prefetch: batches that may wait to be used.

    Returns:
      Iterator of what `rows` loads.

    Raises:
      UserError: the split is smaller than a batch, or a batch does not divide by the processes.
        The iterator raises it for an image that cannot be decoded.
    """
    _local_size(order.batch_size, order.process_index, order.process_count)
    if order.batch_size > len(rows):
        raise UserError(
            f"data.batch_size is {order.batch_size}, but the training split {rows.name} has only "
            f"{len(rows)} examples; take at most that."
        )

    def load(number: int, _: Any) -> Batch:
        batch = order.batch(number)
        return rows.load(batch["index"], batch.get("view"))

    epoch = grain.MapDataset.range(order.steps_per_epoch)
    batches = epoch.repeat(num_epochs).map_with_index(load)
    if start:
        batches = batches.slice(slice(start, None))
    return iter(_reading(batches, rows, threads, workers, prefetch))


def evaluation_batches(
    rows: Rows,
    *,
    batch_size: int,
    view: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    workers: int = 0,
    prefetch: int = 16,
) -> grain.DatasetIterator:
    """All rows once, in order; every process yields ceil(len(rows) / batch_size) batches.

    The last batch is padded: rows with mask 0 hold zeros, label 0 and index -1.

    Returns:
      Iterator of what `rows` loads (all of the same view, if one is given) and "mask": float32 [b];
      see `training_batches` for the rest.
    """
    local = _local_size(batch_size, process_index, process_count)

    def padded(step: int) -> Batch:
        start = step * batch_size + process_index * local
        real = range(min(start, len(rows)), min(start + local, len(rows)))
        views = None if view is None else np.full(len(real), view, np.int32)
        padding = local - len(real)
        batch = {**rows.load(real, views), "mask": np.ones(len(real), np.float32)}
        batch = jax.tree.map(
            lambda leaf: np.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)), batch
        )
        batch["index"][len(real) :] = -1
        return batch

    steps = -(-len(rows) // batch_size)
    batches = grain.MapDataset.range(steps).map(padded)
    return iter(_reading(batches, rows, threads, workers, prefetch))


def all_batches(rows: Rows, data: Data, *, view: int | None = None) -> grain.DatasetIterator:
    """`evaluation_batches` of this process, read as the configuration says."""
    return evaluation_batches(
        rows,
        batch_size=data.batch_size,
        view=view,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=data.threads,
        workers=data.workers,
    )


def _reading(
    batches: grain.MapDataset, rows: Rows, threads: int | None, workers: int, prefetch: int
) -> grain.IterDataset:
    """The batches in order, read ahead by threads, of this process or of workers."""
    usual = 2 if rows.cheap else THREADS
    options = grain.ReadOptions(num_threads=threads or usual, prefetch_buffer_size=prefetch)
    found = batches.to_iter_dataset(options)
    if not workers or rows.cheap:
        return found
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags, of which we have none
    return found.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size is {batch_size}; it must be positive and a multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    return batch_size // process_count
