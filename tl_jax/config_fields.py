"""One field of a configuration: its annotation and limits, and the values that fit them."""

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from tl_jax.config import Config
from tl_jax.errors import nearest


def schema(section: type = Config, prefix: str = "") -> dict[str, tuple[Any, Mapping]]:
    """Annotation and limits of every field by its dotted name."""
    fields: dict[str, tuple[Any, Mapping]] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
        if typing.get_origin(annotation) is Mapping:
            continue  # the strategy's own options, which it declares itself
        if dataclasses.is_dataclass(annotation):
            fields |= schema(typing.cast(type, annotation), f"{name}.")
        else:
            fields[name] = (annotation, field.metadata)
    return fields


def build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A section, nested ones included, with these values by dotted name; the rest as declared."""
    hints = typing.get_type_hints(section)
    chosen = {}
    for field in dataclasses.fields(section):
        name, annotation = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(annotation):
            chosen[field.name] = build(typing.cast(type, annotation), values, f"{name}.")
        elif name in values:
            chosen[field.name] = values[name]
    return section(**chosen)


def _kinds(annotation: Any) -> tuple[type, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def parse(text: str, annotation: Any) -> Any:
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


def coerce(value: Any, annotation: Any) -> Any:
    """What is harmless: an int where a float is meant, a list where a tuple is."""
    kinds = _kinds(annotation)
    if float in kinds and int not in kinds and type(value) is int:
        return float(value)
    if tuple in kinds and isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    return value


def check(value: Any, annotation: Any, limits: Mapping) -> list[str]:
    """What is wrong with one value: its type, choices, limits."""
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
