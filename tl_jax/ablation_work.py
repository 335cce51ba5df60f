"""What the processes of a sweep do: estimate a run, run it, measure it.

Each function stands alone: it takes what can be sent to another machine, reads the configuration
there, and leaves its results in a work directory, where a later start finds them.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tl_jax import config_files, process
from tl_jax.config import Config, Measure
from tl_jax.workdir import WorkDir

Overrides = Sequence[tuple[str, str]]
_SHELF_SHARE = 0.1  # of the memory that is free: features that wait for another run
_PROGRAMS = 100  # that wait for another run


@functools.cache
def _fields(config_file: str) -> Mapping[str, Any]:
    fields = config_files.load_config(config_file)
    return {name: value for name, value in fields.items() if name != "ablate"}


def configuration(config_file: str, overrides: Overrides) -> Config:
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
      "made_of": by name what identifies all that goes into a result: of a "run" as
      `results.made_of` has it, of a "search" without the test images that it never sees, and of
      "measures".

    Raises:
      UserError: the run, or one of its measures, cannot be.
    """
    config = configuration(config_file, overrides)
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
    measured = feature_measures.made_of(found, measure)
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
    run = results.made_of(found)
    search = {what: of for what, of in run.items() if what != "images of test"}
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
        "made_of": {"run": run, "search": search, "measures": measured},
    }


def is_estimate(found: Any) -> bool:
    """Whether the content of a file is what `estimate` of this version returns."""
    words = {"boundary": str, "prefix": str}
    numbers = {"trainable": int, "flops": float, "shared": float, "by_seed": bool}
    caches = {"kind": str, "first": int, "reason": str}
    return (
        _kinds(found) == words | numbers | {"cache": list, "made_of": dict}
        and all(_kinds(cache) == caches for cache in found["cache"])
        and _kinds(found["made_of"]) == dict.fromkeys(("run", "search", "measures"), dict)
        and all(type(of) is str for what in found["made_of"].values() for of in what.values())
        and all(0 <= found[name] < math.inf for name in numbers)
    )


def _kinds(found: Any) -> dict[str, type]:
    return {name: type(value) for name, value in found.items()} if isinstance(found, dict) else {}


def otherwise_made(then: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Names of what is not as it was when something was found.

    Args:
      then: the "made_of" that lies beside it.
      now: that of an estimate, of the same kind.
    """
    return [what for what in now if then.get(what) != now[what]]


def speed(config_file: str, overrides: Overrides) -> float:
    """FLOPs a second of one forward pass of the network here: what an estimate of time rests on."""
    config = configuration(config_file, overrides)
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


def train(config: Config, path: str, command: str | None = None) -> dict[str, Any]:
    """Trains a run of the sweep, see `trainer.train`; it shares what other runs here can use."""
    from tl_jax import trainer

    with _sharing():
        return trainer.train(config, path, command)


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
    config = configuration(config_file, overrides)
    from tl_jax import feature_measures

    summary = train(config, path, command_of(config_file, overrides, path))
    workdir = WorkDir(path)
    if not is_measured(workdir.read_json("measures.json"), measure):
        with _sharing():
            found = feature_measures.measure(config, path, measure)
        workdir.write_json("measures.json", {"asked": dataclasses.asdict(measure), **found})
    return summary


def is_measured(found: Any, measure: Measure) -> bool:
    """Whether the content of a `measures.json` is of this version, and of all that is asked."""
    asked = json.loads(json.dumps(dataclasses.asdict(measure)))
    kinds = _kinds(found)
    return kinds.get("made_of") is dict and found.get("asked") == asked
