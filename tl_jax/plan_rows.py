"""The leaves of a plan as they are shown: by group, and in runs of neighbouring blocks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Leaf = Mapping[str, Any]


def by_group(leaves: Iterable[Leaf], *, numbered: bool = True) -> dict[str, list[Leaf]]:
    """The leaves of each group, the frozen ones first, then from the stem up.

    Groups that differ by their block alone (`trunk/layer_3`, where the rate falls with depth) are
    one, `trunk/…`.

    Args:
      leaves: of a phase, or of all.
      numbered: False brings groups that differ by a number alone (`trunk/2`) together too.
    """
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        name = _without_block(leaf)
        head, slash, number = name.rpartition("/")
        if slash and number.isdecimal() and not numbered:
            name = head
        found.setdefault(name, []).append(leaf)
    named = {}
    for name, group in sorted(found.items(), key=lambda item: _place(*item)):
        alone = len({leaf["group"] for leaf in group}) == 1
        named[_without_block(group[0]) if alone else f"{name}/…"] = group
    return named


def _without_block(leaf: Leaf) -> str:
    return leaf["group"].removesuffix(f"/{leaf['block']}")


def _place(name: str, leaves: Sequence[Leaf]) -> tuple[bool, int, str]:
    return name != "frozen", min(leaf["block_index"] for leaf in leaves), name


def parameters(leaves: Iterable[Leaf]) -> int:
    """How many numbers they hold."""
    return sum(leaf["parameters"] for leaf in leaves)


def runs(blocks: Iterable[int], filled: Sequence[int], alike: Mapping[int, Any]) -> list[list[int]]:
    """Indices of blocks, cut where neighbours are missing or not alike.

    Args:
      blocks: some of `filled`.
      filled: all that hold parameters; what has none parts nobody.
      alike: a value for each of them, the same for those that may share a run.
    """
    place = {block: number for number, block in enumerate(sorted(filled))}
    found: list[list[int]] = []
    for block in sorted(blocks):
        last = found[-1][-1] if found else None
        if last is not None and place[block] == place[last] + 1 and alike[block] == alike[last]:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def span(values: Iterable[float]) -> str:
    """`0.1`, or `0.01–0.1` from the lowest to the highest."""
    low, high = min(values := list(values)), max(values)
    texts = [f"{value:.4g}" for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else f"{low:.3g}–{high:.3g}"
