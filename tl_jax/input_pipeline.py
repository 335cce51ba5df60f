"""Examples → batches on the host: order, shard by process, batch, pad, prefetch; restartable.

The order of an epoch is a permutation of (seed, epoch) alone: with any number of processes the
global batches hold the same examples in the same order, and process p reads rows
[p · b, (p + 1) · b) of each, b = batch_size // process_count. Images stay uint8.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from tl_jax.datasets import Examples
from tl_jax.errors import UserError
from tl_jax.preprocessing import Preprocessing

THREADS = 8
SMALL = 64 * 64  # pixels; below this Python itself is the cost, and threads wait for each other


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Indices [b] → {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int32 [b]}."""

    examples: Examples
    preprocessing: Preprocessing

    def __call__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        found = self.examples.get(indices)
        images = [example["image"] for example in found]
        if self.examples.image_shape is None:
            images = [self.preprocessing.host(image) for image in images]
        return {
            "image": np.stack(images),
            "label": np.array([example["label"] for example in found], np.int32),
            "index": np.array(indices, np.int32),
        }


def training_batches(
    examples: Examples,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    prefetch: int = 16,
) -> grain.DatasetIterator:
    """Shuffled batches of this process, one epoch after the other.

    Every epoch has its own order, uses an example at most once, and drops what is left over after
    len(examples) // batch_size batches. `get_state()` and `set_state()` restore the position
    exactly; `grain.checkpoint` saves it with Orbax.

    Args:
      examples: the split to train on.
      preprocessing: its `host` makes one size of images of many sizes; otherwise unused.
      batch_size: of all processes together.
      seed: of the order.
      num_epochs: number of epochs, None for no end.
      process_index: of this process.
      process_count: number of processes.
      threads: batches that are read at the same time, None for a number that suits their size.
      prefetch: batches that may wait to be used.

    Returns:
      Iterator of {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int32 [b]}, `index`
      being the position in `examples`.

    Raises:
      UserError: the split is smaller than a batch, or a batch does not divide by the processes.
        The iterator raises it for an image that cannot be decoded.
    """
    local = _local_size(batch_size, process_index, process_count)
    if batch_size > len(examples):
        raise UserError(
            f"data.batch_size is {batch_size}, but the training split {examples.split!r} of "
            f"{examples.name} has only {len(examples)} examples; take at most that."
        )
    start = process_index * local
    batches = (
        grain.MapDataset.range(len(examples))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .map(lambda indices: indices[start : start + local])
        .map(_Loader(examples, preprocessing))
        .repeat(num_epochs)
    )
    return iter(batches.to_iter_dataset(_reading(examples, threads, prefetch)))


def evaluation_batches(
    examples: Examples,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    prefetch: int = 16,
) -> grain.DatasetIterator:
    """All examples once, in order; every process yields ceil(len(examples) / batch_size) batches.

    The last batch is padded: rows with mask 0 hold a zero image, label 0 and index -1.

    Returns:
      Iterator of {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int32 [b],
      "mask": float32 [b]}; see `training_batches` for the rest.
    """
    local = _local_size(batch_size, process_index, process_count)
    load = _Loader(examples, preprocessing)

    def padded(step: int) -> dict[str, np.ndarray]:
        start = step * batch_size + process_index * local
        real = range(min(start, len(examples)), min(start + local, len(examples)))
        batch = load(real) if real else _empty(examples, preprocessing)
        padding = local - len(real)
        mask = np.ones(len(real), np.float32)
        batch = {
            name: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1))
            for name, value in {**batch, "mask": mask}.items()
        }
        batch["index"][len(real) :] = -1
        return batch

    steps = -(-len(examples) // batch_size)
    batches = grain.MapDataset.range(steps).map(padded)
    return iter(batches.to_iter_dataset(_reading(examples, threads, prefetch)))


def _reading(examples: Examples, threads: int | None, prefetch: int) -> grain.ReadOptions:
    shape = examples.image_shape
    usual = 2 if shape is not None and shape[0] * shape[1] <= SMALL else THREADS
    return grain.ReadOptions(num_threads=threads or usual, prefetch_buffer_size=prefetch)


def _empty(examples: Examples, preprocessing: Preprocessing) -> dict[str, Any]:
    """A batch of no examples, for a process whose share of the last batch is all padding."""
    if examples.image_shape is None:
        shape = (*preprocessing.output_size, preprocessing.channels)
    else:
        shape = examples.image_shape
    return {
        "image": np.zeros((0, *shape), np.uint8),
        "label": np.zeros(0, np.int32),
        "index": np.zeros(0, np.int32),
    }


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size is {batch_size}; it must be positive and a multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    return batch_size // process_count
