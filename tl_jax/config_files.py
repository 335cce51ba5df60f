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
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tl_jax.config import STRATEGY_OPTIONS, Config, flatten, steps_of
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
    try:
        fields = runpy.run_path(path)["get_config"]()
        if not isinstance(fields, ConfigDict | Mapping):
            raise TypeError(f"get_config() returns {fields!r:.40}, not a ConfigDict")
        return fields.to_dict() if isinstance(fields, ConfigDict) else dict(fields)
    except KeyError as error:
        if error.args == ("get_config",):
            raise UserError(f"{path} does not define get_config()") from None
        raise UserError(f"{path} fails: KeyError: {error}") from error
    except Exception as error:
        raise UserError(f"{path} fails: {type(error).__name__}: {error}") from error


def resolve(
    fields: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] = (),
    checks: Sequence[Callable[[Config], list[str]]] = (),
) -> Config:
    """Fields of a config file with overrides laid over them, checked.

    Args:
      fields: nested dict; what it leaves out takes the schema's default.
      overrides: pairs of a dotted field name and its value as text, as on the command line.
      checks: what other modules have to say of a well-typed configuration.

    Raises:
      UserError: names every unknown, ill-typed or impossible field.
    """
    problems: list[str] = []
    flat = {name: value for name, value in flatten(fields)}
    schema = _schema()
    if dict(overrides).get("freeze.strategy", flat.get("freeze.strategy")) != flat.get(
        "freeze.strategy"
    ):  # the options in the file were written for the file's strategy
        for option in STRATEGY_OPTIONS:
            flat.pop(f"freeze.{option}", None)
    for name, text in overrides:
        if name in schema:
            flat[name] = _parse(text, schema[name][0])
        else:
            flat[name] = text
    values = {}
    for name, value in flat.items():
        if name not in schema:
            problems.append(f"config.{name}: no such field{nearest(name, schema)}")
        else:
            annotation, limits = schema[name]
            value = _coerce(value, annotation)
            wrong = [f"config.{name}: {p}" for p in _check(value, annotation, limits)]
            if not wrong:
                values[name] = value
            problems += wrong
    config = _build(Config, values)
    named = {problem.partition(":")[0] for problem in problems}  # once is enough
    for problem in (problem for check in (_check_whole, *checks) for problem in check(config)):
        if problem.partition(":")[0] not in named:
            problems.append(problem)
    if problems:
        raise UserError("the configuration has problems:\n  " + "\n  ".join(problems))
    return config


def _check_whole(config: Config) -> list[str]:
    """Problems that lie between fields."""
    problems = []
    if not config.model.pretrained:
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
    try:
        steps_of(config.optimizer.warmup, steps_per_epoch=1, total_steps=100)
    except ValueError as error:
        problems.append(f"config.optimizer.warmup: {error}")
    return problems


def _schema(section: type = Config, prefix: str = "") -> dict[str, tuple[Any, Mapping]]:
    """Annotation and limits of every field by its dotted name."""
    fields: dict[str, tuple[Any, Mapping]] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
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
    if float in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    return value


def _check(value: Any, annotation: Any, limits: Mapping) -> list[str]:
    kinds = _kinds(annotation)
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
    return problems
