"""A config file and the command line's overrides → a checked, frozen `Config`.

A config file defines `get_config()` and returns a `ConfigDict` (or a plain dict) with the fields
it cares about; the rest is filled from the schema. `resolve` lays the command line's overrides
over it and answers with a `Config`, or with one error that names every misspelt, ill-typed or
impossible field.
"""

import dataclasses
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from tl_jax import config_checks, config_fields, recipes, strategies
from tl_jax.config import Config, Freeze, flatten, to_dict
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
    fixed = config_fields.schema()
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
    config = config_fields.build(
        Config, {name: value for name, value in values.items() if name in fixed}
    )
    taken = {name.removeprefix("freeze."): values[name] for name in options}
    config = dataclasses.replace(config, freeze=dataclasses.replace(config.freeze, options=taken))
    named = {problem.partition(":")[0] for problem in problems}  # once is enough
    for problem in (*config_checks.of_freeze(config.freeze), *config_checks.between_fields(config)):
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
    schema = config_fields.schema(kind, prefix)
    flat = dict(flatten(fields, prefix))
    values, problems = _checked(flat, overrides, schema, lambda name: [_no_field(name, schema)])
    return config_fields.build(kind, values, prefix), problems


def known_fields() -> list[str]:
    """Every field that a configuration may have, options of all strategies included."""
    return list(
        dict.fromkeys(
            [*config_fields.schema(), *(o for s in strategies.STRATEGIES for o in _options(s))]
        )
    )


def _checked(
    flat: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
    schema: Mapping[str, tuple[Any, Mapping]],
    unknown: Callable[[str], list[str]],
) -> tuple[dict[str, Any], list[str]]:
    """Values by name, those of the command line over those of the file, and what is wrong."""
    texts = {
        n: config_fields.parse(text, schema[n][0]) if n in schema else text for n, text in overrides
    }
    values, problems = {}, []
    for name, value in {**flat, **texts}.items():
        if name not in schema:
            problems += [f"config.{name}: {problem}" for problem in unknown(name)]
            continue
        annotation, limits = schema[name]
        value = config_fields.coerce(value, annotation)
        wrong = [f"config.{name}: {p}" for p in config_fields.check(value, annotation, limits)]
        if not wrong:
            values[name] = value
        problems += wrong
    return values, problems


def _options(strategy: str) -> dict[str, tuple[Any, Mapping, Any]]:
    """Annotation, limits and default of a strategy's options by their dotted names."""
    if not isinstance(strategy, str) or strategy not in strategies.STRATEGIES:
        return {}
    return {f"freeze.{name}": found for name, found in recipes.options_of(strategy).items()}


def _no_field(name: str, schema: Mapping[str, Any]) -> str:
    if inside := [field for field in schema if field.startswith(f"{name}.")]:
        return f"is a section; its fields are {', '.join(inside)}"
    return f"no such field{nearest(name, schema)}"


def _unknown(name: str, strategy: str, schema: Mapping[str, Any]) -> list[str]:
    """What to say of a field that is not in the schema."""
    of_others = {option for other in strategies.STRATEGIES for option in _options(other)}
    if name not in of_others:
        return [_no_field(name, {**schema, **dict.fromkeys(of_others)})]
    if strategy not in strategies.STRATEGIES:
        return []  # that is said already
    takes = [option.removeprefix("freeze.") for option in _options(strategy)]
    hint = f"; it takes {', '.join(takes)}" if takes else ""
    return [f"the strategy {strategy} takes no such option{hint}"]
