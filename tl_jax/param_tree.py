"""Paths in a nested dict of arrays: `{"a": {"b": leaf}}` has the one path `a/b`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

Tree = Mapping[str, Any]
SEPARATOR = "/"


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in the order of the sorted paths."""
    flat = traverse_util.flatten_dict(tree, sep=SEPARATOR)
    return {path: flat[path] for path in sorted(flat)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `flatten` is `flat`."""
    return traverse_util.unflatten_dict(dict(flat), sep=SEPARATOR)


def split(tree: Tree, belongs: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trees: the leaves whose path belongs, and the rest. `merge` puts them together again."""
    flat = flatten(tree)
    inside = {path: leaf for path, leaf in flat.items() if belongs(path)}
    outside = {path: leaf for path, leaf in flat.items() if path not in inside}
    return unflatten(inside), unflatten(outside)


def merge(*trees: Tree) -> dict[str, Any]:
    """One tree with the leaves of all.

    Raises:
      ValueError: two trees hold the same path.
    """
    merged: dict[str, Any] = {}
    for tree in trees:
        flat = flatten(tree)
        if shared := merged.keys() & flat.keys():
            raise ValueError(f"in two trees: {sorted(shared)}")
        merged |= flat
    return unflatten(merged)


def overlay(tree: Tree, upper: Tree) -> dict[str, Any]:
    """The tree with the leaves of `upper` in the place of its own."""
    return unflatten({**flatten(tree), **flatten(upper)})


def interpolate(first: Tree, last: Tree, coefficient: float) -> dict[str, Any]:
    """(1 − c) θ₀ + c θ₁ in float32; a leaf that did not move keeps its bits."""

    def between(a, b):
        a, b = np.asarray(a), np.asarray(b)
        if a.tobytes() == b.tobytes():
            return a
        mixed = (1 - coefficient) * a.astype(np.float32) + coefficient * b.astype(np.float32)
        return mixed.astype(a.dtype)

    upper = flatten(last)
    return unflatten({path: between(leaf, upper[path]) for path, leaf in flatten(first).items()})


def size(leaves: Iterable[Any]) -> int:
    """Number of elements in all leaves (arrays or shapes with dtype)."""
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def nbytes(leaves: Iterable[Any]) -> int:
    """Bytes in all leaves (arrays or shapes with dtype)."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
