"""The configuration: one typed schema with its defaults; checks report every problem at once.

A config file defines `get_config()` and returns a `ConfigDict` (or a plain dict) with the fields
it cares about; the rest is filled from the schema below. `resolve` lays the command line's
overrides over it and answers with a frozen `Config`, or with one error that names every misspelt,
ill-typed or impossible field.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import re
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tl_jax.errors import UserError


def _option(default: Any, *, choices: Sequence[str] = (), at_least=None, above=None, below=None):
    """A field with its default and the values that it accepts."""
    limits = {"choices": tuple(choices), "at_least": at_least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Model:
    """The pretrained network."""

    pretrained: str = ""  # a Hub id, or a folder in the Hub's format
    revision: str | None = None  # a branch, tag or commit of the Hub
    image_size: int | None = _option(None, at_least=1)  # None: as the checkpoint's processor says
    dtype: str = _option("float32", choices=("float32", "bfloat16"))  # of the computation
    # Of float32 products: on a GPU "tensorfloat32" is faster, and errs by about 1e-3.
    precision: str = _option("float32", choices=("float32", "tensorfloat32"))


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which examples serve for what, in TensorFlow Datasets' slicing syntax."""

    train: str = "train"
    validation: str | None = None
    test: str | None = "test"


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples, and how they become batches."""

    source: str = ""  # tfds:NAME, hf:OWNER/NAME or folder:PATH
    dir: str | None = None  # TensorFlow Datasets' data directory
    splits: Splits = Splits()
    image_column: str | None = None  # None: found by its type
    label_column: str | None = None
    batch_size: int = _option(256, at_least=1)  # over all devices and processes
    augmentation: str = _option("none", choices=("none", "flip", "random_resized_crop"))
    skip_unreadable: bool = False  # leave unreadable images of a folder out instead of stopping
    threads: int = _option(8, at_least=1)  # that read and decode


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and on which loss."""

    epochs: int = _option(10, at_least=1)
    label_smoothing: float = _option(0.0, at_least=0.0, below=1.0)
    gradient_clip_norm: float | None = _option(None, above=0.0)  # over the trainable part
    gradient_accumulation: int = _option(1, at_least=1)  # micro-batches a step
    checkpoint_every_steps: int | None = _option(None, at_least=1)  # besides each epoch's end


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule; a strategy multiplies the learning rate group by group."""

    name: str = _option("sgd", choices=("sgd", "adam", "adamw"))
    learning_rate: float = _option(0.1, above=0.0)
    weight_decay: float = _option(0.0, at_least=0.0)  # on kernels; coupled (L2) but for adamw
    momentum: float = _option(0.9, at_least=0.0, below=1.0)  # of sgd
    schedule: str = _option("cosine", choices=("constant", "cosine", "linear"))
    warmup: str | int = 0  # steps, or "5%", "2 epochs", "100 steps"


@dataclasses.dataclass(frozen=True)
class Freeze:
    """The strategy and its options; None stands for the strategy's own default."""

    strategy: str = "linear_probe"
    k: int | None = _option(None, at_least=1)  # top_k: blocks that train
    patterns: tuple | None = None  # patterns: ((regex, "frozen" | "train" | multiplier), …)
    batch_norm: str = _option("frozen", choices=("frozen", "batch"))


STRATEGY_OPTIONS = ("k", "patterns")


@dataclasses.dataclass(frozen=True)
class Logging:
    """What is written down while training."""

    every_steps: int = _option(50, at_least=1)
    profile_steps: int = _option(0, at_least=0)  # so many steps are traced by jax.profiler
    compilation_cache: str | None = "~/.cache/tl_jax/compilation"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    freeze: Freeze = Freeze()
    logging: Logging = Logging()
    parallel: str = _option("pmap", choices=("pmap", "shard_map"))
    cache: str = _option("off", choices=("off",))  # of the frozen prefix: not built yet
    control: str | None = _option(None, choices=("random_trunk", "from_scratch"))  # run beside
    seed: int = _option(0, at_least=0, below=2**31)


# What changes the speed, the log or the place of a run, but not its result.
WITHOUT_EFFECT = (
    "parallel",
    "cache",
    "control",
    "logging",
    "data.dir",
    "data.threads",
    "train.checkpoint_every_steps",
)


def default_config() -> ConfigDict:
    """The schema's defaults, to be changed field by field in a config file."""
    # Not type-safe: `resolve` checks, and a field may take several types ("5%" where 0 stands).
    return ConfigDict(dataclasses.asdict(Config()), type_safe=False)


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
    checks: Sequence[Callable[["Config"], list[str]]] = (),
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
    flat = {name: value for name, value in _flatten(fields)}
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


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as written to `config.json`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Config) -> str:
    """SHA-256 of all that changes the result (what `WITHOUT_EFFECT` names is left out)."""
    return hashlib.sha256(json.dumps(with_effect(config), sort_keys=True).encode()).hexdigest()


def with_effect(config: Config) -> dict[str, Any]:
    """The fields that change a run's result, by dotted name."""
    return {
        name: value
        for name, value in _flatten(to_dict(config))
        if not any(name == left or name.startswith(f"{left}.") for left in WITHOUT_EFFECT)
    }


def differences(ours: Config, theirs: Mapping[str, Any]) -> list[str]:
    """One line for each field with effect in which `theirs` (a `to_dict`) differs from `ours`."""
    left = with_effect(ours)
    # A field that is younger than their file had its default there.
    right = with_effect(Config()) | {name: v for name, v in _flatten(theirs) if name in left}
    return [
        f"config.{name}: {right.get(name)!r} there, {left[name]!r} here"
        for name in left
        if left[name] != right.get(name)
    ]


def steps_of(duration: str | int, *, steps_per_epoch: int, total_steps: int) -> int:
    """A duration in steps: 100, "100 steps", "2 epochs", "5%" (of the whole training).

    Raises:
      ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%|)\s*", str(duration))
    if not match:
        raise ValueError(f'{duration!r} is no duration: write 100, "100 steps", "2 epochs" or "5%"')
    number, unit = float(match[1]), match[2].rstrip("s")
    return round(
        number * {"": 1, "step": 1, "epoch": steps_per_epoch, "%": total_steps / 100}[unit]
    )


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


def _flatten(fields: Mapping[str, Any], prefix: str = ""):
    for name, value in fields.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from _flatten(dict(value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' for the nearest known name; by its last part where the whole is far."""
    known = list(known)
    initials = {"".join(word[0] for word in k.rsplit(".", 1)[-1].split("_")): k for k in known}
    if (last := name.rsplit(".", 1)[-1]) in initials:  # lr
        return f"; did you mean {initials[last]}?"
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    near = near or [
        by_last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1)
    ]
    return f"; did you mean {near[0]}?" if near else ""
