"""The axes of a sweep: what a config file declares → values, each a dict of fields with a name."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from tl_jax import config_files
from tl_jax.errors import nearest, printable

SEED = "seed"
NAME, RATES = "name", "learning_rates"  # keys of a value that are no fields

Axes = Mapping[str, Sequence[Mapping[str, Any]]]


def read(given: Any) -> tuple[dict[str, tuple[dict[str, Any], ...]], list[str]]:
    """Each axis's values as dicts of fields with "name", in order; and what is wrong, a line each.

    Args:
      given: `config.ablate.axes`, as `ablation_config.read` describes it.
    """
    if isinstance(given, Mapping):
        given = list(config_files.flatten(given))
    listed = given if is_list(given) else ()
    pairs = [pair for pair in listed if is_list(pair) and len(pair) == 2]
    if not pairs or len(pairs) < len(listed):
        said = 'give pairs of an axis\'s name and its values, as in (("seed", (0, 1)),)'
        return {}, [f"config.ablate.axes: {given!r}: {said}"]
    axes: dict[str, tuple[dict[str, Any], ...]] = {}
    problems = []
    for name, values in pairs:
        where = f"config.ablate.axes: {name}"
        if not isinstance(name, str) or not name:
            problems.append(f"config.ablate.axes: {name!r} is no axis's name: give a field's")
            continue
        if name in axes:
            problems.append(f"{where}: stands there twice")
            continue
        if not is_list(values) or not values:
            problems.append(f"{where}: {values!r} is no tuple of values, one or more")
            continue
        dicts = [value for value in values if isinstance(value, Mapping)]
        wrong = [key for value in dicts for key in value if not isinstance(key, str)]
        wrong += [v["name"] for v in dicts if not isinstance(v.get("name", ""), str)]
        if wrong:
            problems.append(f"{where}: {wrong[0]!r} is no name")
            continue
        labelled = len(dicts) == len(values)
        if not labelled and name not in config_files.known_fields():
            problems.append(
                f"{where}: no such field, and an axis of another name takes dicts of fields"
                f"{nearest(str(name), config_files.known_fields())}"
            )
            continue
        axes[name] = tuple(_value(name, value) for value in values)
        if name == SEED and any(value.keys() - {NAME} != {SEED} for value in axes[name]):
            problems.append(
                f"{where}: its values count as seeds of one thing, so it sets the seed and nothing "
                "else: call an axis of other fields otherwise"
            )
    setters: dict[str, str] = {}
    for axis, values in axes.items():
        for field in fields_of(values):
            if (other := setters.setdefault(field, axis)) != axis:
                problems.append(
                    f"config.ablate.axes: {field}: both {other} and {axis} set it: a field belongs "
                    "to one axis"
                )
    return axes, problems


def _value(axis: str, value: Any) -> dict[str, Any]:
    """A value as a dict of fields with "name"."""
    if not isinstance(value, Mapping):
        return {"name": safe(value), axis: value}
    fields = {name: each for name, each in value.items() if name not in (NAME, RATES)}
    called = value.get("name") or "+".join(safe(each) for each in fields.values())
    return {**value, "name": safe(called)}


def without_effect(axes: Axes, overrides: Sequence[tuple[str, str]]) -> list[str]:
    """What is wrong with the command line's fields beside the axes: those without effect."""
    overridden, problems = {name for name, _ in overrides}, []
    set_by_axes = set().union(*(fields_of(values) for values in axes.values()))
    if "control" in overridden | set_by_axes:
        problems.append(
            "config.control: is without effect in a sweep: let an axis set freeze.strategy to it"
        )
    for name in sorted(overridden):
        every = [axis for axis, values in axes.items() if values and all(name in v for v in values)]
        if every:
            problems.append(f"config.{name}: is without effect, as the axis {every[0]} sets it")
    return problems


def combine(axes: Axes, how: str) -> Iterator[dict[str, Mapping]]:
    """By axis its value, a cell each: every value with every other ("product"), or side by side."""
    rows = (
        itertools.product(*axes.values()) if how == "product" else zip(*axes.values(), strict=True)
    )
    for row in rows:
        yield dict(zip(axes, row, strict=True))


def fields_of(values: Iterable[Mapping]) -> dict[str, Any]:
    """All fields that some values set."""
    return {n: v for value in values for n, v in value.items() if n not in (NAME, RATES)}


def safe(value: Any) -> str:
    """A value as part of a file's name."""
    text = PurePath(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "_", printable(text)).strip("_.") or "_"


def is_list(value: Any) -> bool:
    """Whether it is several values and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def plain(value: Any) -> Any:
    """The value with Python's numbers and lists in the place of NumPy's."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
