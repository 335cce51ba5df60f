"""What is wrong with a configuration although each of its fields is right by itself."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from tl_jax import config_fields, strategies
from tl_jax.config import Config, Data, Freeze, Optimizer, steps_of
from tl_jax.errors import nearest


def of_freeze(freeze: Freeze) -> list[str]:
    """What is wrong with the strategy and with what goes with any of them."""
    problems = []
    if freeze.strategy not in strategies.STRATEGIES:
        known = ", ".join(strategies.STRATEGIES)
        hint = nearest(freeze.strategy, strategies.STRATEGIES)
        problems.append(f"config.freeze.strategy: {freeze.strategy!r} is none of {known}{hint}")
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
    schema = config_fields.schema(Optimizer) | {"epochs": (float, {"at_least": 0.0})}
    problems = []
    for name, value in phase.items():
        if name not in schema:
            problems.append(f".{name}: no such field{nearest(str(name), schema)}")
            continue
        annotation, limits = schema[name]
        problems += [
            f".{name}: {p}"
            for p in config_fields.check(
                config_fields.coerce(value, annotation), annotation, limits
            )
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


SOURCES = "tfds:NAME, hf:OWNER/NAME, folder:PATH"


def is_source(text: str) -> bool:
    """Whether it names a kind of data and something of that kind."""
    return re.match(r"(tfds|hf|folder):.", text) is not None


def between_fields(config: Config) -> list[str]:
    """Problems that lie between fields."""
    problems = []
    if not config.model.pretrained and not config.init_from:
        problems.append("config.model.pretrained: name a Hub id or a folder")
    if not is_source(config.data.source):
        problems.append(f"config.data.source: {config.data.source!r} is none of {SOURCES}")
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
    if config.cache in ("host", "disk") and (drawn := draws_anew(config.data)):
        problems.append(f"config.cache: {config.cache!r} cannot be: {drawn}; leave it at 'auto'")
    if config.cache_dir in ("", "None"):
        problems.append(
            f"config.cache_dir: {config.cache_dir!r} is no folder; config.cache=off keeps nothing"
        )
    problems += _probe_problems(config)
    if any(vars(config.probe.grid).values()) or config.probe.baselines:
        problems += [f"config.probe: {problem}" for problem in of_probe(config)]
    for problem in _duration_problems(config.optimizer.warmup):
        problems.append(f"config.optimizer.warmup: {problem}")
    return problems


def draws_anew(data: Data) -> str | None:
    """Why what the network sees of an image differs from step to step, where it does."""
    if data.augmentation == "none" or data.views is not None:
        return None
    return (
        f"data.augmentation={data.augmentation} draws anew at each step "
        "(data.views=K draws K times and for all)"
    )


def of_probe(config: Config) -> list[str]:
    """What of a configuration does not go with a grid of heads, or with baselines."""
    grid, head, data, problems = config.probe.grid, config.head, config.data, []
    if config.freeze.batch_norm != "frozen":
        problems.append(f"freeze.batch_norm={config.freeze.batch_norm} changes the features")
    if config.cache == "off":
        problems.append("needs cached features, and config.cache is off")
    if drawn := draws_anew(data):
        problems.append(f"needs cached features, and {drawn}")
    if data.splits.validation is None:
        problems.append("validation chooses: set config.data.splits.validation")
    if config.probe.baselines and data.splits.test is None:
        problems.append("baselines are judged on test: set config.data.splits.test")
    subset = {"examples_per_class": data.examples_per_class, "fraction": data.fraction}
    by_seed = [f"the subset of data.{name}" for name, value in subset.items() if value is not None]
    by_seed = ["data.views"] if data.views else by_seed
    if grid.seed and by_seed:
        problems.append(f"seed: {by_seed[0]} would change with it, too")
    if len(grid.input or ()) > 1:
        if head.last_blocks > 1 and "pooled" in (grid.input or ()):
            problems.append("input: of several last_blocks only cls and cls+mean go together")
        elif head.kind == "mlp" and head.hidden is None:
            problems.append("input: give an MLP that sees several inputs its width, head.hidden")
    return problems


_INPUTS = ("default", "pooled", "cls", "cls+mean")
_GRID_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda x: _is_real(x) and x > 0, "numbers above 0"),
    "weight_decay": (lambda x: _is_real(x) and x >= 0, "numbers from 0"),
    "seed": (lambda x: type(x) is int and 0 <= x < 2**31, "whole numbers from 0 to 2,147,483,647"),
    "input": (lambda x: x in _INPUTS, f"some of {', '.join(_INPUTS)}"),
}
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_BASELINES = ("logistic_regression", "nearest_neighbours")


def _is_real(value: Any) -> bool:
    """Whether it is a number that float32, in which heads are trained, can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= _FLOAT32_MAX  # false of nan


def _probe_problems(config: Config) -> list[str]:
    problems = []
    for name, (fits, what) in _GRID_VALUES.items():
        values = getattr(config.probe.grid, name)
        if values is None:
            continue
        if not values or not all(map(fits, values)) or len(set(values)) < len(values):
            problems.append(f"config.probe.grid.{name}: {values!r}: give {what}, each once")
    inputs = config.probe.grid.input or ()
    if len(inputs) > 1 and "default" in inputs:
        problems.append(
            f"config.probe.grid.input: {inputs!r}: 'default' is one of the others: name which, cls "
            "of a vit, pooled of a resnet"
        )
    wrong = [name for name in config.probe.baselines if name not in _BASELINES]
    for name in wrong:
        problems.append(f"config.probe.baselines: {name!r} is none of {', '.join(_BASELINES)}")
    if not wrong and len(set(config.probe.baselines)) < len(config.probe.baselines):
        problems.append(f"config.probe.baselines: {config.probe.baselines!r}: give each once")
    return problems
