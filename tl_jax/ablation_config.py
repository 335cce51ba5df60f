"""The `ablate` section of a configuration: axes of values → the cells of a sweep.

A cell is the configuration that the section stands in, with a few fields changed. Every cell is
what the command line makes of it: `Cell.overrides` are `--config.FIELD=VALUE` options.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tl_jax import ablation_axes, config_checks, config_files, corruptions
from tl_jax import config as config_lib
from tl_jax.ablation_axes import RATES, SEED, Axes, fields_of, is_list, safe
from tl_jax.config import Config, Measure, option
from tl_jax.errors import UserError

RATE = "optimizer.learning_rate"


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
    section = ablation_axes.plain(fields["ablate"])
    base = {name: value for name, value in fields.items() if name != "ablate"}
    mine = [(name, text) for name, text in overrides if name.startswith("ablate.")]
    others = [(name, text) for name, text in overrides if not name.startswith("ablate.")]
    axes, problems = ablation_axes.read(section.pop("axes", None))
    keep = section.pop("keep", None)
    if keep is not None and not callable(keep):
        problems.append(f"config.ablate.keep: {keep!r} is no function of a cell's fields")
    problems += ablation_axes.without_effect(axes, others)
    options, found = config_files.section(Ablate, section, mine, "ablate.")
    problems += found
    if not problems:
        problems += _option_problems(options, axes)
        if options.learning_rates is not None and RATE in dict(others):
            problems.append(f"config.{RATE}: is without effect, as ablate.learning_rates are tried")
    if problems:
        _refuse(problems)
    drawn = list(ablation_axes.combine(axes, options.combine))
    kept = [values for values in drawn if keep is None or _asked(keep, fields_of(values.values()))]
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


def _option_problems(options: Ablate, axes: Axes) -> list[str]:
    problems = []
    if options.compare is not None and options.compare not in axes:
        problems.append(
            f"config.ablate.compare: {options.compare!r} is none of the axes {', '.join(axes)}"
        )
    lengths = {name: len(values) for name, values in axes.items()}
    if options.combine == "list" and len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        problems.append(f"config.ablate.combine: side by side axes are of one length: {said}")
    searching = [name for name, values in axes.items() if any(RATES in v for v in values)]
    if len(searching) > 1:
        problems.append(
            f"config.ablate.learning_rates: the values of {' and '.join(searching)} have their "
            "own: let those of one axis have them"
        )
    own = [
        value["learning_rates"] for values in axes.values() for value in values if RATES in value
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
    if options.learning_rates is None and any(
        RATES in value and not all(RATES in other for other in values)
        for values in axes.values()
        for value in values
    ):
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
        given = getattr(options.measure, name)
        wrong = [v for v in given if v not in known or type(v) is not type(known[0])]
        problems += [
            f"config.ablate.measure.{name}: {value!r} is none of {', '.join(map(str, known))}"
            for value in wrong
        ]
    return problems


def _are_rates(values: Any) -> bool:
    each = values if is_list(values) else ()
    fit = all(type(value) in (int, float) and 0 < value < math.inf for value in each)
    return bool(each) and fit and len(set(each)) == len(each)


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
    changed = [(name, _text(value)) for name, value in fields_of(values.values()).items()]
    whole = (*overrides, *changed, ("control", "None"))
    config = config_files.resolve(base, whole)
    names = {axis: value["name"] for axis, value in values.items()}
    words = {
        axis: f"{safe(axis.rsplit('.', 1)[-1])}={name}"
        if axis != compared or name[0].isdigit()
        else name
        for axis, name in names.items()
    }
    own = [value[RATES] for value in values.values() if RATES in value]
    rates = own[0] if own else options.learning_rates or ()
    name = ",".join(words.values())
    if rates and not config.data.splits.validation:
        raise UserError(
            "config.ablate.learning_rates: validation chooses: set data.splits.validation"
        )
    if rates and (setters := _sets_rate(config)):
        raise UserError(
            f"config.ablate.learning_rates: without effect on {name}, as {' and '.join(setters)} "
            "sets what counts there"
        )
    if config.probe.grid.seed:
        raise UserError("config.probe.grid.seed: in a sweep seeds are those of the axis seed")
    if not config.data.splits.test:
        raise UserError("config.data.splits.test: a sweep compares answers on it: set it")
    if len(name.encode()) > 200:
        raise UserError(f"config.ablate.axes: {name[:60]}… is too long for a directory: give names")
    group = ",".join(word for axis, word in words.items() if axis != SEED) or "all"
    return Cell(name, names, group, whole, tuple(map(float, rates)), config)


def _sets_rate(config: Config) -> list[str]:
    """What sets the learning rates of a run whatever `optimizer.learning_rate` is."""
    phases = config.freeze.phases or ()
    setters = {
        "probe.grid.learning_rate": bool(config.probe.grid.learning_rate),
        "freeze.phases": bool(phases) and all("learning_rate" in phase for phase in phases),
    }
    return [name for name, sets in setters.items() if sets]


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
