"""The `ablate` section of a configuration: axes of values → the cells of a sweep.

A cell is the configuration that the section stands in, with a few fields changed. Every cell is
what the command line makes of it: `Cell.overrides` are `--config.FIELD=VALUE` options.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from tl_jax import config as config_lib
from tl_jax import config_checks, config_files, corruptions
from tl_jax.config import Config, Measure, option
from tl_jax.errors import UserError, nearest, printable

SEED = "seed"
RATE = "optimizer.learning_rate"
_OWN = ("name", "learning_rates")  # keys of a value that are no fields


@dataclasses.dataclass(frozen=True)
class Ablate:
    """How the cells of a sweep come about and where they run.

    Beside these fields stand `axes` and `keep`; `read` describes them.
    """

    combine: str = option("product", choices=("product", "list"))
    compare: str | None = None  # the axis that is compared; None: the first that is not the seed
    # Tried for each setting and strategy on validation, with the first seed; None: no search.
    learning_rates: tuple | None = None
    launcher: str = option("local", choices=("local", "ray"))
    jobs: int = option(1, at_least=1)  # cells at once (local)
    ray_address: str | None = None  # of a cluster; None: one on this machine
    cpus: float = option(1.0, above=0.0)  # of a cell (ray)
    gpus: float = option(0.0, at_least=0.0)
    retries: int = option(3, at_least=0)  # of a cell whose process or node died
    measure: Measure = dataclasses.field(default_factory=Measure)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of its directory, made of its values.
      values: name of its value on each axis.
      group: `name` without the seed: what shares a learning-rate search.
      overrides: fields and their values as on the command line, without the rate that is found.
      rates: learning rates that are tried for it; none where there is no search.
      config: what all that comes to.
    """

    name: str
    values: Mapping[str, str]
    group: str
    overrides: tuple[tuple[str, str], ...]
    rates: tuple[float, ...]
    config: Config


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, read and checked.

    Attributes:
      config_file: that it stands in.
      options: the section's fields.
      axes: names of the values of each axis, those in use, in order.
      compared: the axis whose values are compared.
      cells: in the order in which they run.
    """

    config_file: str
    options: Ablate
    axes: Mapping[str, tuple[str, ...]]
    compared: str
    cells: tuple[Cell, ...]

    @property
    def groups(self) -> dict[str, list[Cell]]:
        """Cells that differ in the seed alone, by the name that they share."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.group, []).append(cell)
        return found

    def identity(self) -> dict[str, Any]:
        """All that the results depend on."""
        return {
            "compared": self.compared,
            "cells": {
                cell.name: {
                    **config_lib.with_effect(cell.config),
                    "ablate.learning_rates": list(cell.rates),
                }
                for cell in self.cells
            },
            "measure": dataclasses.asdict(self.options.measure),
        }


def is_sweep(fields: Mapping[str, Any]) -> bool:
    """Whether a config file's fields hold an `ablate` section."""
    return isinstance(fields.get("ablate"), Mapping)


def read(
    config_file: str, fields: Mapping[str, Any], overrides: Sequence[tuple[str, str]]
) -> Sweep:
    """The sweep that a config file describes.

    `ablate.axes` is a sequence of pairs of an axis's name and its values, or a mapping, in which
    dotted names are nested (`{"freeze": {"strategy": …}}`: a ConfigDict takes no dots). The name is
    that of a field (`seed`, `freeze.strategy`); or any word, if all values are dicts. A value is a
    field's value, or a dict of fields with "name" for what it is called and "learning_rates" for
    those to be tried for it (as many as elsewhere: budgets are matched). `ablate.combine` says
    whether every value meets every other ("product") or the axes run side by side ("list").
    `ablate.keep`, a function of a cell's fields with their values, drops the cells for which it is
    false.

    Args:
      config_file: path of the file.
      fields: that it sets.
      overrides: of the command line, over all cells.

    Raises:
      UserError: names every problem: unknown fields, an empty product, cells of the same name.
    """
    section = _plain(fields["ablate"])
    base = {name: value for name, value in fields.items() if name != "ablate"}
    mine = [(name, text) for name, text in overrides if name.startswith("ablate.")]
    others = [(name, text) for name, text in overrides if not name.startswith("ablate.")]
    axes, problems = _axes(section.pop("axes", None))
    keep = section.pop("keep", None)
    if keep is not None and not callable(keep):
        problems.append(f"config.ablate.keep: {keep!r} is no function of a cell's fields")
    problems += _effect_problems(axes, others)
    options, found = config_files.section(Ablate, section, mine, "ablate.")
    problems += found
    if not problems:
        problems += _option_problems(options, axes)
        if options.learning_rates is not None and RATE in dict(others):
            problems.append(f"config.{RATE}: is without effect, as ablate.learning_rates are tried")
    if problems:
        _refuse(problems)
    drawn = list(_combine(axes, options.combine))
    kept = [values for values in drawn if keep is None or _asked(keep, _fields(values.values()))]
    if not kept:
        dropped = f": ablate.keep drops all {len(drawn)}" if drawn else ": an axis has no value"
        raise UserError(f"config.ablate: the sweep has no cell{dropped}")
    compared = options.compare or next((name for name in axes if name != SEED), SEED)
    cells, problems = [], []
    for values in kept:
        try:
            cells.append(_cell(values, compared, options, base, others))
        except UserError as error:
            problems += str(error).split("\n  ")[1:] or [str(error)]
    problems += _alike(cells) + _unpaired(cells, compared)
    if problems:
        _refuse(problems)
    in_use = {axis: tuple(dict.fromkeys(cell.values[axis] for cell in cells)) for axis in axes}
    return Sweep(config_file, options, in_use, compared, tuple(cells))


def _refuse(problems: Sequence[str]) -> None:
    each = list(dict.fromkeys(problems))
    raise UserError("the configuration has problems:\n  " + "\n  ".join(each))


def _plain(value: Any) -> Any:
    """The value with Python's numbers and lists in the place of NumPy's."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _axes(given: Any) -> tuple[dict[str, tuple[dict[str, Any], ...]], list[str]]:
    """Each axis's values as dicts of fields with "name"; and problems."""
    if isinstance(given, Mapping):
        given = list(config_files.flatten(given))
    listed = given if _is_list(given) else ()
    pairs = [pair for pair in listed if _is_list(pair) and len(pair) == 2]
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
        if not _is_list(values) or not values:
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
        if name == SEED and any(_fields([value]).keys() != {SEED} for value in axes[name]):
            problems.append(
                f"{where}: its values count as seeds of one thing, so it sets the seed and nothing "
                "else: call an axis of other fields otherwise"
            )
    setters: dict[str, str] = {}
    for axis, values in axes.items():
        for field in _fields(values):
            if (other := setters.setdefault(field, axis)) != axis:
                problems.append(
                    f"config.ablate.axes: {field}: both {other} and {axis} set it: a field belongs "
                    "to one axis"
                )
    return axes, problems


def _effect_problems(
    axes: Mapping[str, Sequence[Mapping]], overrides: Sequence[tuple[str, str]]
) -> list[str]:
    """Fields that are without effect in a sweep."""
    overridden, problems = {name for name, _ in overrides}, []
    set_by_axes = set().union(*(_fields(values) for values in axes.values()))
    if "control" in overridden | set_by_axes:
        problems.append(
            "config.control: is without effect in a sweep: let an axis set freeze.strategy to it"
        )
    for name in sorted(overridden):
        every = [axis for axis, values in axes.items() if values and all(name in v for v in values)]
        if every:
            problems.append(f"config.{name}: is without effect, as the axis {every[0]} sets it")
    return problems


def _value(axis: str, value: Any) -> dict[str, Any]:
    """A value as a dict of fields with "name"."""
    if not isinstance(value, Mapping):
        return {"name": _safe(value), axis: value}
    fields = {name: each for name, each in value.items() if name not in _OWN}
    called = value.get("name") or "+".join(_safe(each) for each in fields.values())
    return {**value, "name": _safe(called)}


def _safe(value: Any) -> str:
    """A value as part of a file's name."""
    text = PurePath(value).name if isinstance(value, str) and "/" in value else str(value)
    return re.sub(r"[^\w.+-]+", "_", printable(text)).strip("_.") or "_"


def _option_problems(options: Ablate, axes: Mapping[str, Sequence[Mapping]]) -> list[str]:
    problems = []
    if options.compare is not None and options.compare not in axes:
        problems.append(
            f"config.ablate.compare: {options.compare!r} is none of the axes {', '.join(axes)}"
        )
    lengths = {name: len(values) for name, values in axes.items()}
    if options.combine == "list" and len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        problems.append(f"config.ablate.combine: side by side axes are of one length: {said}")
    searching = [name for name, values in axes.items() if any(_OWN[1] in v for v in values)]
    if len(searching) > 1:
        problems.append(
            f"config.ablate.learning_rates: the values of {' and '.join(searching)} have their "
            "own: let those of one axis have them"
        )
    own = [
        value["learning_rates"] for values in axes.values() for value in values if _OWN[1] in value
    ]
    rates = [*own, *([] if options.learning_rates is None else [options.learning_rates])]
    wrong = [given for given in rates if not _are_rates(given)]
    for given in wrong:
        problems.append(
            f"config.ablate.learning_rates: {given!r}: give a tuple of numbers above 0, each once"
        )
    if not wrong and len({len(given) for given in rates}) > 1:
        said = " and ".join(map(repr, dict.fromkeys(map(tuple, rates))))
        problems.append(
            f"config.ablate.learning_rates: {said}: budgets are matched, so as many trials "
            "everywhere"
        )
    if own and options.learning_rates is None:
        problems.append("config.ablate.learning_rates: give those of the other values, too")
    if rates and any(RATE in value for values in axes.values() for value in values):
        problems.append(f"config.ablate.learning_rates: without effect where an axis sets {RATE}")
    source = options.measure.source
    if source is not None and not config_checks.is_source(source):
        problems.append(
            f"config.ablate.measure.source: {source!r} is none of {config_checks.SOURCES}"
        )
    if options.measure.shifts and not options.measure.severities:
        problems.append("config.ablate.measure.severities: () leaves nothing of shifts")
    asked = {"shifts": corruptions.KINDS, "severities": corruptions.SEVERITIES}
    for name, known in asked.items():
        wrong = [value for value in getattr(options.measure, name) if value not in known]
        problems += [
            f"config.ablate.measure.{name}: {value!r} is none of {', '.join(map(str, known))}"
            for value in wrong
        ]
    return problems


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_rates(values: Any) -> bool:
    each = values if _is_list(values) else ()
    fit = all(type(value) in (int, float) and 0 < value < math.inf for value in each)
    return bool(each) and fit and len(set(each)) == len(each)


def _combine(axes: Mapping[str, Sequence[Mapping]], how: str) -> Iterator[dict[str, Mapping]]:
    rows = (
        itertools.product(*axes.values()) if how == "product" else zip(*axes.values(), strict=True)
    )
    for row in rows:
        yield dict(zip(axes, row, strict=True))


def _fields(values: Iterable[Mapping]) -> dict[str, Any]:
    """All fields that some values set."""
    return {n: v for value in values for n, v in value.items() if n not in _OWN}


def _asked(keep: Callable, fields: dict[str, Any]) -> bool:
    try:
        return bool(keep(fields))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"config.ablate.keep fails for {fields}: {type(error).__name__}: {error}"
        ) from error


def _cell(
    values: Mapping[str, Mapping],
    compared: str,
    options: Ablate,
    base: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
) -> Cell:
    changed = [(name, _text(value)) for name, value in _fields(values.values()).items()]
    whole = (*overrides, *changed, ("control", "None"))
    config = config_files.resolve(base, whole)
    names = {axis: value["name"] for axis, value in values.items()}
    words = {
        axis: f"{_safe(axis.rsplit('.', 1)[-1])}={name}"
        if axis != compared or name[0].isdigit()
        else name
        for axis, name in names.items()
    }
    own = [value[_OWN[1]] for value in values.values() if _OWN[1] in value]
    rates = own[0] if own else options.learning_rates or ()
    name = ",".join(words.values())
    if rates and not config.data.splits.validation:
        raise UserError(
            "config.ablate.learning_rates: validation chooses: set data.splits.validation"
        )
    if len(name.encode()) > 200:
        raise UserError(f"config.ablate.axes: {name[:60]}… is too long for a directory: give names")
    group = ",".join(word for axis, word in words.items() if axis != SEED) or "all"
    return Cell(name, names, group, whole, tuple(map(float, rates)), config)


def _text(value: Any) -> str:
    """A value as on the command line."""
    return value if isinstance(value, str) else repr(value)


def _unpaired(cells: Sequence[Cell], compared: str) -> list[str]:
    """Cells that are compared on different test examples."""
    tests: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for cell in cells:
        where = tuple(name for axis, name in cell.values.items() if axis != compared)
        data = cell.config.data
        own = (data.source, data.dir, data.splits.test)
        if tests.setdefault(where, own) != own:
            return [
                f"config.ablate.compare: along {compared} the test examples differ, and accuracies "
                "are compared on the same ones: compare another axis"
            ]
    return []


def _alike(cells: Sequence[Cell]) -> list[str]:
    """Cells of one name, and cells that are one run under two names: it would count twice."""
    names: dict[str, Cell] = {}
    runs: dict[str, Cell] = {}
    problems = []
    for cell in cells:
        if names.setdefault(cell.name, cell) is not cell:
            problems.append(
                f"config.ablate.axes: two cells are called {cell.name!r}: give their values a "
                '"name" each, or leave one out'
            )
            continue
        run = json.dumps([config_lib.to_dict(cell.config), cell.rates], sort_keys=True)
        if (other := runs.setdefault(run, cell)) is not cell:
            problems.append(
                f"config.ablate.axes: {other.name!r} and {cell.name!r} are the same run: leave "
                "one out"
            )
    return problems
