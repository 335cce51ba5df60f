"""The learning rate of a group of runs: each rate is tried, and validation chooses."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tl_jax.ablation_config import RATE
from tl_jax.ablation_work import Overrides, configuration, otherwise_made, train
from tl_jax.config import Config
from tl_jax.errors import DAMAGE, NotFinite, UserError
from tl_jax.workdir import WorkDir


def search(
    config_file: str,
    overrides: Overrides,
    rates: Sequence[float],
    path: str,
    made_of: Mapping[str, str],
) -> dict[str, Any]:
    """Tries learning rates on validation; the test split stays untouched.

    Rates of a head on a fixed trunk are tried as one program, others one after the other.

    Args:
      config_file: of the sweep.
      overrides: of the run whose rate is sought.
      rates: to try.
      path: directory of the search.
      made_of: that of the estimate of a search; trials of an earlier start must be of the same.

    Returns:
      The content of its `search.json`: "trials" ("learning_rate", "accuracy" and "loss" on
      validation, None where the loss did not stay finite), "learning_rate" (the best by accuracy,
      then by loss), "at_edge" (whether it is the lowest or highest of several), "made_of".

    Raises:
      NotFinite: no loss stayed finite.
      UserError: a trial is of other weights, images or of another strategy's function.
    """
    workdir = WorkDir(path)
    found = workdir.read_json("search.json")
    if is_search(found, rates):
        return dict(found or {})
    unseen = ("data.splits.test", "None"), ("probe.baselines", "()")
    apart = [*overrides, *unseen, ("logging.figures", "False")]
    trials = _together(config_file, apart, rates, path, made_of) or [
        _trial(config_file, apart, rate, f"{path}/learning_rate={rate!r}", made_of)
        for rate in rates
    ]
    finite = [trial for trial in trials if trial["accuracy"] is not None]
    if not finite:
        raise NotFinite("no loss stayed finite with any of the learning rates: try lower ones")
    best = max(finite, key=_rank)["learning_rate"]
    at_edge = len(rates) > 1 and best in (min(rates), max(rates))
    found = {
        "trials": trials,
        "learning_rate": best,
        "at_edge": at_edge,
        "made_of": dict(made_of),
    }
    workdir.write_json("search.json", found)
    return found


def _rank(trial: Mapping[str, Any]) -> tuple[float, float]:
    return trial["accuracy"], -trial["loss"]


def is_search(found: Any, rates: Sequence[float]) -> bool:
    """Whether the content of a `search.json` is of these learning rates."""
    try:
        best, tried = found["learning_rate"], [trial["learning_rate"] for trial in found["trials"]]
        scored = all(
            t["accuracy"] is None or (0 <= t["accuracy"] <= 1 and 0 <= t["loss"] < math.inf)
            for t in found["trials"]
        )
        finite = [trial for trial in found["trials"] if trial["accuracy"] is not None]
        scored = scored and max(finite, key=_rank)["learning_rate"] == best
        whole = type(found["at_edge"]) is bool and type(found["made_of"]) is dict
    except (LookupError, TypeError, ValueError):
        return False
    return tried == list(rates) and best in rates and scored and whole


def _together(
    config_file: str,
    overrides: Overrides,
    rates: Sequence[float],
    path: str,
    made_of: Mapping[str, str],
) -> list[dict[str, Any]] | None:
    """All rates as one grid of heads; None where more than the head trains, or draws are random."""
    config = configuration(config_file, overrides)
    from tl_jax import job, probe

    if probe.wanted(config):
        return None  # the configuration has a grid of its own
    grid = dataclasses.replace(config.probe.grid, learning_rate=tuple(rates))
    config = dataclasses.replace(config, probe=dataclasses.replace(config.probe, grid=grid))
    if not probe.is_possible(job.prepare(config)):
        return None
    summary = _searched(config, f"{path}/grid", made_of)
    with _damage_of(f"{path}/grid"):
        settings = summary["probe"]["settings"]
        return [_outcome(row["learning_rate"], row["validation"]) for row in settings]


def _trial(
    config_file: str, overrides: Overrides, rate: float, path: str, made_of: Mapping[str, str]
) -> dict[str, Any]:
    config = configuration(config_file, [*overrides, (RATE, repr(rate))])
    try:
        summary = _searched(config, path, made_of)
    except NotFinite:
        return _outcome(rate, None)
    with _damage_of(path):
        return _outcome(rate, summary["metrics"]["validation"])


@contextlib.contextmanager
def _damage_of(path: str) -> Iterator[None]:
    """What a summary from an earlier start does not hold is damage of its file."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(
            f"the summary.json in {path} is damaged ({type(error).__name__}: {error}): remove "
            f"{path} and start the sweep again"
        ) from error


def _searched(config: Config, path: str, made_of: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a search's run; it may have ended in an earlier start."""
    summary = train(config, path)
    if other := otherwise_made(summary.get("made_of", {}), made_of):
        raise UserError(
            f"{path} was made with other {', '.join(other)} than are there now: bring those back, "
            "or remove it, and start the sweep again"
        )
    return summary


def _outcome(rate: float, found: Mapping[str, Any] | None) -> dict[str, Any]:
    figures = {name: None if found is None else found[name] for name in ("accuracy", "loss")}
    return {"learning_rate": rate, **figures}
