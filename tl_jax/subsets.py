"""Nested, stratified subsets of a split: so many examples, or such a share, of each class."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tl_jax.datasets import Examples
from tl_jax.errors import UserError
from tl_jax.records import Record, Records, fingerprint

CHUNK = 4096  # records that are read at a time for their labels
_NAMED = 10  # classes that are too small are named up to so many
_labels_of: dict[tuple[str, int], np.ndarray] = {}  # read once a process


class ChosenRecords:
    """Some of a split's records.

    Args:
      records: of the whole split.
      rows: int64 [n], positions in it.
    """

    def __init__(self, records: Records, rows: np.ndarray):
        self._records, self._rows = records, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at `indices`, in their order."""
        return self._records.read(self._rows[np.asarray(indices, np.int64)].tolist())


def of_each_class(
    examples: Examples,
    seed: int,
    *,
    examples_per_class: int | None = None,
    fraction: float | None = None,
) -> Examples:
    """The first n of a random permutation of each class, in the order of the split.

    The permutation is of (seed, class, number of its examples) alone, so that the subset for n
    lies within that for any m > n of the same split and seed, and a fraction's subset is that for
    n = max(1, round(fraction × examples of the class)).

    Args:
      examples: of the split.
      seed: of the permutations.
      examples_per_class: n of every class.
      fraction: of each class, 0 < fraction ≤ 1; a class without examples stays so.

    Returns:
      The split itself where neither is given.

    Raises:
      UserError: a class has fewer than n examples, or a label is no class.
    """
    if examples_per_class is None and fraction is None:
        return examples
    found = labels(examples)
    counts = np.bincount(found, minlength=len(examples.class_names))
    if examples_per_class is not None:
        _check_counts(examples, counts, examples_per_class)
        taken = np.full(len(counts), examples_per_class)
        text = f"{examples_per_class} of each class"
    else:
        assert fraction is not None
        taken = np.minimum(counts, [max(1, round(fraction * int(n))) for n in counts])
        text = f"{fraction:g} of each class"
    rows = [
        np.flatnonzero(found == label)[_order(seed, label, count)[:n]]
        for label, (count, n) in enumerate(zip(counts, taken, strict=True))
    ]
    return dataclasses.replace(
        examples,
        split=f"{examples.split}, {text} by seed {seed}",
        fingerprint=fingerprint("subset", examples.fingerprint, seed, examples_per_class, fraction),
        drawn_from=examples.fingerprint,
        records=ChosenRecords(examples.records, np.sort(np.concatenate(rows))),
    )


def first(examples: Examples, count: int) -> Examples:
    """The first `count` examples of a split, or all where it has fewer."""
    if count >= len(examples):
        return examples
    return dataclasses.replace(
        examples,
        split=f"{examples.split}, the first {count}",
        fingerprint=fingerprint("first", examples.fingerprint, count),
        records=ChosenRecords(examples.records, np.arange(count)),
    )


def labels(examples: Examples) -> np.ndarray:
    """The label of each example, int64 [n]; no image is decoded.

    Raises:
      UserError: a label is no class.
    """
    key = (examples.fingerprint, len(examples))
    if key not in _labels_of:
        numbers = range(len(examples))
        found = np.array(
            [
                record.label
                for start in numbers[::CHUNK]
                for record in examples.records.read(numbers[start : start + CHUNK])
            ],
            np.int64,
        )
        wrong = np.flatnonzero((found < 0) | (found >= len(examples.class_names)))
        if len(wrong):
            examples[int(wrong[0])]  # says what is wrong with it
        _labels_of[key] = found
    return _labels_of[key]


def _order(seed: int, label: int, count: int) -> np.ndarray:
    """The class's permutation; legacy NumPy, frozen for ever."""
    return np.random.RandomState([seed, label]).permutation(count)


def _check_counts(examples: Examples, counts: np.ndarray, asked: int) -> None:
    small = [
        f"{name!r} has {n}"
        for name, n in zip(examples.class_names, counts, strict=True)
        if n < asked
    ]
    if small:
        more = f", and {len(small) - _NAMED} classes more" if len(small) > _NAMED else ""
        raise UserError(
            f"config.data.examples_per_class: {asked} of each class are asked for; of the examples "
            f"in {examples.split!r} of {examples.name} {', '.join(small[:_NAMED])}{more}"
        )
