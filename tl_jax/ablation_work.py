"""What the processes of a sweep do: estimate a run, search its learning rate, run it, measure it.

Each function stands alone: it takes what can be sent to another machine, reads the configuration
there, and leaves its results in a work directory, where a later start finds them.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tl_jax import config_files, process
from tl_jax.ablation_config import RATE
from tl_jax.config import Config, Measure
from tl_jax.errors import DAMAGE, NotFinite, UserError
from tl_jax.workdir import WorkDir

Overrides = Sequence[tuple[str, str]]
_SHELF_SHARE = 0.1  # of the memory that is free: features that wait for another run
_PROGRAMS = 100  # that wait for another run
_UNSEEN = "images of test"  # by a search


@functools.cache
def _fields(config_file: str) -> Mapping[str, Any]:
    fields = config_files.load_config(config_file)
    return {name: value for name, value in fields.items() if name != "ablate"}


def _config(config_file: str, overrides: Overrides) -> Config:
    """The configuration, in a process that is ready to compute."""
    config = config_files.resolve(_fields(config_file), overrides)
    _start(config.logging.compilation_cache)
    return config


@functools.cache
def _start(compilation_cache: str | None) -> None:
    process.start(compilation_cache)
    from tl_jax import display

    display.console.quiet = True  # of many runs only the sweep speaks


def estimate(config_file: str, overrides: Overrides, measure: Measure) -> dict[str, Any]:
    """What one run takes, without running it; and whether it can be measured so.

    Returns:
      "boundary": name of the first block that trains; "prefix": what identifies the frozen prefix
      and its images, "" without one; "cache": kind and reason by phase; "trainable": parameters;
      "flops": least, of training, the prefix counted once where it is cached; "shared": those of
      them that make the frozen prefix; "by_seed": whether each seed has a prefix of its own;
      "made_of": as `results.made_of` has it.

    Raises:
      UserError: the run, or one of its measures, cannot be.
    """
    config = _config(config_file, overrides)
    with _sharing():
        return _estimate(config, measure)


def _estimate(config: Config, measure: Measure) -> dict[str, Any]:
    from tl_jax import (
        cache_choice,
        feature_measures,
        job,
        probe,
        probe_features,
        results,
        step_cost,
    )

    found = job.prepare(config)
    feature_measures.check(found, measure)
    if probe.wanted(config):
        probe_features.widest(config)
    flops, shared, caches = 0.0, 0.0, []
    size = config.data.batch_size
    rows = len(found.examples["train"]) * (config.data.views or 1)
    for stage, least in zip(found.stages, step_cost.least(found), strict=True):
        choice = cache_choice.choose(found, stage)
        below = cache_choice.prefix_share(found, stage) if choice.first else 0.0
        flops += least * ((stage.last - stage.first) * (1 - below) + below * rows / size)
        if stage is found.stages[0]:
            shared = least * below * rows / size
        caches.append({"kind": choice.kind, "first": choice.first, "reason": choice.reason})
    stage, first = found.stages[0], caches[0]["first"]
    examples = found.examples["train"]
    data = config.data
    drawn = data.examples_per_class is not None or data.fraction is not None or bool(data.views)
    prefix = f"{found.pretrained.checkpoint.sha256} {first} {examples.fingerprint}"
    return {
        "boundary": stage.plan.blocks[found.plan.boundary],
        "prefix": f"{prefix} {config.model} {found.plan.trunk}" if first else "",
        "cache": caches,
        "trainable": sum(
            leaf["parameters"]
            for leaf in found.describe_plan()["leaves"]
            if leaf["group"] != "frozen"
        ),
        "flops": flops,
        "shared": shared,
        "by_seed": drawn or found.plan.trunk == "random",
        "made_of": results.made_of(found),
    }


def is_estimate(found: Any) -> bool:
    """Whether the content of a file is what `estimate` of this version returns."""
    words = {"boundary": str, "prefix": str}
    numbers = {"trainable": int, "flops": float, "shared": float, "by_seed": bool}
    caches = {"kind": str, "first": int, "reason": str}
    return (
        _kinds(found) == words | numbers | {"cache": list, "made_of": dict}
        and all(_kinds(cache) == caches for cache in found["cache"])
        and set(_kinds(found["made_of"]).values()) == {str}
        and all(0 <= found[name] < math.inf for name in numbers)
    )


def _kinds(found: Any) -> dict[str, type]:
    return {name: type(value) for name, value in found.items()} if isinstance(found, dict) else {}


def otherwise_made(
    then: Mapping[str, Any], now: Mapping[str, str], *, searched: bool = False
) -> list[str]:
    """Names of what is not as it was when something was found.

    Args:
      then: the "made_of" that lies beside it.
      now: that of an estimate.
      searched: it is a search's, which never sees the test images.
    """
    return [
        what for what in now if then.get(what) != now[what] and not (searched and what == _UNSEEN)
    ]


def speed(config_file: str, overrides: Overrides) -> float:
    """FLOPs a second of one forward pass of the network here: what an estimate of time rests on."""
    config = _config(config_file, overrides)
    import jax
    import jax.numpy as jnp

    from tl_jax import costs, job, layer_forms

    network = job.prepare(config).pretrained
    height, width = network.preprocessing.output_size
    size = min(config.data.batch_size, 32)
    images = jnp.zeros((size, height, width, network.preprocessing.channels))

    @jax.jit
    def forward(variables, images):
        with layer_forms.suited():
            return network.module.apply(variables, images)

    jax.block_until_ready(forward(network.variables, images))
    started = time.perf_counter()
    jax.block_until_ready([forward(network.variables, images) for _ in range(3)])
    took = (time.perf_counter() - started) / 3
    return costs.product_flops(network.module.apply, network.variables, images) / took


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
      made_of: that of the estimate; trials from an earlier start must be of the same.

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
    of = {what: value for what, value in made_of.items() if what != _UNSEEN}
    found = {"trials": trials, "learning_rate": best, "at_edge": at_edge, "made_of": of}
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
    except (LookupError, TypeError, ValueError):
        return False
    kinds = _kinds(found)
    whole = kinds.get("at_edge") is bool and kinds.get("made_of") is dict
    return tried == list(rates) and best in rates and scored and whole


@functools.cache
def _shelf() -> Any:
    from tl_jax import memory, sharing

    return sharing.Shelf(_SHELF_SHARE * memory.host_available(), _PROGRAMS)


def _sharing() -> contextlib.AbstractContextManager[None]:
    """Features of frozen prefixes, and programs, are shared with other runs of this process."""
    from tl_jax import sharing

    return sharing.through(_shelf())


def command_of(config_file: str, overrides: Overrides, path: str) -> str:
    """The command that repeats a run of a sweep alone."""
    fields = dict(overrides)  # of one that stands there twice the last one counts
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    return shlex.join(["python", "run.py", f"--config={config_file}", *words, f"--workdir={path}"])


def _train(config: Config, path: str, command: str | None = None) -> dict[str, Any]:
    from tl_jax import trainer

    with _sharing():
        return trainer.train(config, path, command)


def _together(
    config_file: str,
    overrides: Overrides,
    rates: Sequence[float],
    path: str,
    made_of: Mapping[str, str],
) -> list[dict[str, Any]] | None:
    """All rates as one grid of heads; None where more than the head trains, or draws are random."""
    config = _config(config_file, overrides)
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
    config = _config(config_file, [*overrides, (RATE, repr(rate))])
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
    summary = _train(config, path)
    if other := otherwise_made(summary.get("made_of", {}), made_of, searched=True):
        raise UserError(
            f"{path} was made with other {', '.join(other)} than are there now: bring those back, "
            "or remove it, and start the sweep again"
        )
    return summary


def _outcome(rate: float, found: Mapping[str, Any] | None) -> dict[str, Any]:
    figures = {name: None if found is None else found[name] for name in ("accuracy", "loss")}
    return {"learning_rate": rate, **figures}


def run(config_file: str, overrides: Overrides, path: str, measure: Measure) -> dict[str, Any]:
    """Runs a cell to its end and measures its features.

    Args:
      config_file: of the sweep.
      overrides: of the cell.
      path: its work directory.
      measure: what to measure.

    Returns:
      The content of its `summary.json`.

    Raises:
      RunFailed: as `trainer.train` does.
    """
    config = _config(config_file, overrides)
    from tl_jax import feature_measures

    summary = _train(config, path, command_of(config_file, overrides, path))
    workdir, asked = WorkDir(path), dataclasses.asdict(measure)
    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in asked.items()}
    found = workdir.read_json("measures.json")
    if found is None or found.get("asked") != asked:
        with _sharing():
            found = feature_measures.measure(config, path, measure)
        workdir.write_json("measures.json", {"asked": asked, **found})
    return summary
