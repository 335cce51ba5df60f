"""A config file and the command line's overrides → a checked, frozen `Config`.

A config file defines `get_config()` and returns a `ConfigDict` (or a plain dict) with the fields
it cares about; the rest is filled from the schema. `resolve` lays the command line's overrides
over it and answers with a `Config`, or with one error that names every misspelt, ill-typed or
impossible field.
"""

import ast
import dataclasses
import math
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from tl_jax import recipes, strategies
from tl_jax.config import Config, Freeze, Optimizer, flatten, steps_of, to_dict
from tl_jax.errors import UserError, nearest


def load_config(path: str) -> dict[str, Any]:
    """The fields that `get_config()` in the Python file `path` sets.

    Raises:
      UserError: no such file, or it fails, or it does not define `get_config`.
    """
    if not Path(path).is_file():
        known = sorted(str(file) for file in Path(path).parent.glob("*.py"))
        raise UserError(
            f"no config file {path!r}" + (f"; there are {', '.join(known)}" * bool(known))
        )
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)  # for modules that lie beside it
    try:
        fields = runpy.run_path(path)["get_config"]()
        if not isinstance(fields, ConfigDict | Mapping):
            raise TypeError(f"get_config() returns {fields!r:.40}, not a ConfigDict")
        return fields.to_dict() if isinstance(fields, ConfigDict) else dict(fields)
    except KeyError as error:
        if error.args == ("get_config",):
            raise UserError(f"{path} does not define get_config()") from None
        raise UserError(f"{path} fails: KeyError: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)


def resolve(
    fields: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    recorded: bool = False,
) -> Config:
    """Fields of a config file with overrides laid over them, checked.

    Args:
      fields: nested dict; what it leaves out takes the schema's default.
      overrides: pairs of a dotted field name and its value as text, as on the command line.
      recorded: the fields are those of a run that was made, whose strategy may be its own config
        file's: then that and its options are taken as they are.

    Raises:
      UserError: names every unknown, ill-typed or impossible field.
    """
    flat = dict(flatten(fields))
    fixed = _schema()
    chosen = dict(overrides).get(_STRATEGY, flat.get(_STRATEGY, Freeze.strategy))
    if chosen != flat.get(_STRATEGY, Freeze.strategy):
        # The options in the file were written for the file's strategy.
        flat = {n: v for n, v in flat.items() if n in fixed or not n.startswith("freeze.")}
    options = _options(chosen)
    recorded = recorded and chosen not in strategies.STRATEGIES
    if recorded:
        own = {n: v for n, v in flat.items() if n.startswith("freeze.") and n not in fixed}
        options = {name: (Any, {}, value) for name, value in own.items()}
    schema = fixed | {name: (hint, limits) for name, (hint, limits, _) in options.items()}
    checked, problems = _checked(flat, overrides, schema, lambda n: _unknown(n, chosen, schema))
    values = {name: default for name, (_, _, default) in options.items()} | checked
    config = _build(Config, {name: value for name, value in values.items() if name in fixed})
    taken = {name.removeprefix("freeze."): values[name] for name in options}
    config = dataclasses.replace(config, freeze=dataclasses.replace(config.freeze, options=taken))
    named = {problem.partition(":")[0] for problem in problems}  # once is enough
    for problem in (*_check_freeze(config.freeze), *_check_whole(config)):
        said = problem.partition(":")[0] in named or (recorded and _STRATEGY in problem)
        if not said:
            problems.append(problem)
    if problems:
        raise UserError("the configuration has problems:\n  " + "\n  ".join(problems))
    return config


def with_strategy(config: Config, strategy: str) -> Config:
    """The same run with a control's strategy, and the BatchNorm policy nearest to the run's."""
    fields = to_dict(config)
    legal = {("random_trunk", "batch"): "frozen", ("from_scratch", "stats_only"): "batch"}
    policy = config.freeze.batch_norm
    fields["freeze"] = {
        "strategy": strategy,
        "batch_norm": legal.get((strategy, policy), policy),
        "reestimate": config.freeze.reestimate,
    }
    fields["init_from"] = None  # a control knows nothing of other runs
    return resolve(fields)


_STRATEGY = "freeze.strategy"
_Section = TypeVar("_Section")


def section(
    kind: type[_Section],
    fields: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
    prefix: str,
) -> tuple[_Section, list[str]]:
    """A section that is read apart from the run's configuration, and what is wrong with it.

    Args:
      kind: a dataclass, nested ones included, of fields with defaults.
      fields: nested dict of those that are set.
      overrides: pairs of a dotted name, `prefix` included, and a value as text.
      prefix: what the names of its fields begin with, "ablate." for instance.
    """
    schema = _schema(kind, prefix)
    flat = dict(flatten(fields, prefix))
    values, problems = _checked(
        flat, overrides, schema, lambda name: [f"no such field{nearest(name, schema)}"]
    )
    return _build(kind, values, prefix), problems


def known_fields() -> list[str]:
    """Every field that a configuration may have, options of all strategies included."""
    return list(
        dict.fromkeys([*_schema(), *(o for s in strategies.STRATEGIES for o in _options(s))])
    )


def _checked(
    flat: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
    schema: Mapping[str, tuple[Any, Mapping]],
    unknown: Callable[[str], list[str]],
) -> tuple[dict[str, Any], list[str]]:
    """Values by name, those of the command line over those of the file, and what is wrong."""
    texts = {n: _parse(text, schema[n][0]) if n in schema else text for n, text in overrides}
    values, problems = {}, []
    for name, value in {**flat, **texts}.items():
        if name not in schema:
            problems += [f"config.{name}: {problem}" for problem in unknown(name)]
            continue
        annotation, limits = schema[name]
        value = _coerce(value, annotation)
        wrong = [f"config.{name}: {p}" for p in _check(value, annotation, limits)]
        if not wrong:
            values[name] = value
        problems += wrong
    return values, problems


def _options(strategy: str) -> dict[str, tuple[Any, Mapping, Any]]:
    """Annotation, limits and default of a strategy's options by their dotted names."""
    if not isinstance(strategy, str) or strategy not in strategies.STRATEGIES:
        return {}
    return {f"freeze.{name}": found for name, found in recipes.options_of(strategy).items()}


def _unknown(name: str, strategy: str, schema: Mapping[str, Any]) -> list[str]:
    """What to say of a field that is not in the schema."""
    if inside := [field for field in schema if field.startswith(f"{name}.")]:
        return [f"is a section; its fields are {', '.join(inside)}"]
    of_others = {option for other in strategies.STRATEGIES for option in _options(other)}
    if name not in of_others:
        return [f"no such field{nearest(name, {**schema, **dict.fromkeys(of_others)})}"]
    if strategy not in strategies.STRATEGIES:
        return []  # that is said already
    takes = [option.removeprefix("freeze.") for option in _options(strategy)]
    hint = f"; it takes {', '.join(takes)}" if takes else ""
    return [f"the strategy {strategy} takes no such option{hint}"]


def _check_freeze(freeze: Freeze) -> list[str]:
    """What is wrong with the strategy and with what goes with any of them."""
    problems = []
    if freeze.strategy not in strategies.STRATEGIES:
        known = ", ".join(strategies.STRATEGIES)
        hint = nearest(freeze.strategy, strategies.STRATEGIES)
        problems.append(f"config.{_STRATEGY}: {freeze.strategy!r} is none of {known}{hint}")
    if freeze.discriminative is not None:
        numbers = [v for v in freeze.discriminative if type(v) in (int, float) and 0 < v < math.inf]
        if len(numbers) != 2 or len(freeze.discriminative) != 2:
            problems.append(
                f"config.freeze.discriminative: {freeze.discriminative!r} is no pair of a lowest "
                "and a highest multiplier above 0"
            )
        if freeze.layer_decay is not None:
            problems.append(
                "config.freeze.discriminative: goes without freeze.layer_decay: both say how the "
                "rate falls with depth"
            )
    if freeze.reestimate == "after" and freeze.batch_norm != "reestimate":
        problems.append("config.freeze.reestimate: goes with freeze.batch_norm=reestimate only")
    for number, phase in enumerate(freeze.phases or ()):
        where = f"config.freeze.phases[{number}]"
        problems += [f"{where}{problem}" for problem in _phase_problems(phase)]
    return problems


def _phase_problems(phase: Any) -> list[str]:
    """What is wrong with one entry of `freeze.phases`."""
    if not isinstance(phase, Mapping):
        return [f": {phase!r} is no dict of epochs and fields of the optimizer"]
    schema = _schema(Optimizer) | {"epochs": (float, {"at_least": 0.0})}
    problems = []
    for name, value in phase.items():
        if name not in schema:
            problems.append(f".{name}: no such field{nearest(str(name), schema)}")
            continue
        annotation, limits = schema[name]
        problems += [
            f".{name}: {p}" for p in _check(_coerce(value, annotation), annotation, limits)
        ]
        if name == "warmup":
            problems += [f".{name}: {problem}" for problem in _duration_problems(value)]
    return problems


def _duration_problems(value: Any) -> list[str]:
    try:
        steps_of(value, steps_per_epoch=1, total_steps=100)
    except ValueError as error:
        return [str(error)]
    return []


def _check_whole(config: Config) -> list[str]:
    """Problems that lie between fields."""
    problems = []
    if not config.model.pretrained and not config.init_from:
        problems.append("config.model.pretrained: name a Hub id or a folder")
    if not re.match(r"(tfds|hf|folder):.", config.data.source):
        problems.append(
            f"config.data.source: {config.data.source!r} is none of "
            "tfds:NAME, hf:OWNER/NAME, folder:PATH"
        )
    if config.data.batch_size % config.train.gradient_accumulation:
        problems.append(
            f"config.data.batch_size: {config.data.batch_size} does not divide into "
            f"train.gradient_accumulation = {config.train.gradient_accumulation} micro-batches"
        )
    if config.data.fraction is not None and config.data.fraction > 1:
        problems.append(f"config.data.fraction: {config.data.fraction} of a class is more than all")
    if config.data.fraction is not None and config.data.examples_per_class is not None:
        problems.append(
            "config.data.fraction: goes without data.examples_per_class: both say how much of the "
            "training split is used"
        )
    if config.data.views is not None and config.data.augmentation == "none":
        problems.append(
            f"config.data.views: {config.data.views} draws of data.augmentation, which is 'none'"
        )
    if config.head.hidden is not None and config.head.kind != "mlp":
        problems.append(
            f"config.head.hidden: {config.head.hidden} is the width of an MLP, and head.kind is "
            f"{config.head.kind!r}"
        )
    problems += _probe_problems(config)
    for problem in _duration_problems(config.optimizer.warmup):
        problems.append(f"config.optimizer.warmup: {problem}")
    return problems


_GRID_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda x: _is_real(x) and x > 0, "numbers above 0"),
    "weight_decay": (lambda x: _is_real(x) and x >= 0, "numbers from 0"),
    "seed": (lambda x: type(x) is int and 0 <= x < 2**31, "whole numbers from 0"),
    "input": (lambda x: x in ("default", "pooled", "cls", "cls+mean"), "words of head.input"),
}
_BASELINES = ("logistic_regression", "nearest_neighbours")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _probe_problems(config: Config) -> list[str]:
    problems = []
    for name, (fits, what) in _GRID_VALUES.items():
        values = getattr(config.probe.grid, name)
        if values is None:
            continue
        if not values or not all(map(fits, values)) or len(set(values)) < len(values):
            problems.append(f"config.probe.grid.{name}: {values!r}: give {what}, each once")
    for name in config.probe.baselines:
        if name not in _BASELINES:
            problems.append(f"config.probe.baselines: {name!r} is none of {', '.join(_BASELINES)}")
    return problems


def _schema(section: type = Config, prefix: str = "") -> dict[str, tuple[Any, Mapping]]:
    """Annotation and limits of every field by its dotted name."""
    fields: dict[str, tuple[Any, Mapping]] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
        if typing.get_origin(annotation) is Mapping:
            continue  # the strategy's own options, which it declares itself
        if dataclasses.is_dataclass(annotation):
            fields |= _schema(typing.cast(type, annotation), f"{name}.")
        else:
            fields[name] = (annotation, field.metadata)
    return fields


def _build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(section)
    chosen = {}
    for field in dataclasses.fields(section):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(annotation):
            chosen[field.name] = _build(typing.cast(type, annotation), values, f"{name}.")
        elif name in values:
            chosen[field.name] = values[name]
    return section(**chosen)


def _kinds(annotation: Any) -> tuple[type, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _parse(text: str, annotation: Any) -> Any:
    """A command line's text as the field's type; left as it is where it does not fit."""
    kinds = _kinds(annotation)
    if text in ("None", "none", "null") and type(None) in kinds:
        return None
    if text.lower() in ("true", "false") and bool in kinds:
        return text.lower() == "true"
    if kinds == (str,) or kinds == (str, type(None)):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return float(text) if float in kinds and text.lower() in ("nan", "inf", "-inf") else text


def _coerce(value: Any, annotation: Any) -> Any:
    """What is harmless: an int where a float is meant, a list where a tuple is."""
    kinds = _kinds(annotation)
    if float in kinds and int not in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    return value


def _check(value: Any, annotation: Any, limits: Mapping) -> list[str]:
    kinds = _kinds(annotation)
    if annotation is Any:
        return []
    if type(value) not in kinds:
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        return [f"{value!r} is {type(value).__name__}, not {names}"]
    if value is None:
        return []
    choices = limits.get("choices") or ()
    if choices and value not in choices:
        return [f"{value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{value} is not finite"]
    problems = []
    if limits.get("at_least") is not None and value < limits["at_least"]:
        problems.append(f"{value} is less than {limits['at_least']}")
    if limits.get("above") is not None and value <= limits["above"]:
        problems.append(f"{value} is not more than {limits['above']}")
    if limits.get("below") is not None and value >= limits["below"]:
        problems.append(f"{value} is not less than {limits['below']}")
    if "check" in limits:
        problems += limits["check"](value)
    return problems
