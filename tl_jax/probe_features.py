"""Before the run: what a probe's features tell, by a grid of heads and by baselines."""

import hashlib
import json
from typing import Any

from tl_jax import (
    cache_choice,
    display,
    feature_baselines,
    feature_cache,
    models,
    parallel,
    probe,
    results,
)
from tl_jax.cache_choice import Choice
from tl_jax.config import Config
from tl_jax.errors import UserError
from tl_jax.feature_cache import Inputs
from tl_jax.hub import open_checkpoint
from tl_jax.job import Job, prepare
from tl_jax.parallel import DataParallel
from tl_jax.workdir import WorkDir


def widest(config: Config) -> Job:
    """The job whose head sees all that a grid's heads do.

    Raises:
      UserError: there can be no such grid, or no such baselines.
    """
    _check_inputs(config)
    job = prepare(probe.widened(config))
    probe.check(job)
    return job


def _check_inputs(config: Config) -> None:
    """The widest head would say it of itself, which nobody asked for."""
    inputs = config.probe.grid.input
    if inputs is None or config.init_from is not None:
        return
    checkpoint = open_checkpoint(config.model.pretrained, config.model.revision)
    family = models.family_of(checkpoint.config, checkpoint.source)
    for name in inputs:
        if name not in ("default", *family.inputs):
            raise UserError(
                f"config.probe.grid.input: {name!r}: the head of a {family.model_type} can see "
                f"{', '.join(family.inputs)}"
            )


def choose(job: Job) -> Choice:
    """Where the features that its head sees shall be kept.

    Raises:
      UserError: there are none that could be kept.
    """
    splits = [*cache_choice.SPLITS, *(["test"] if job.config.probe.baselines else [])]
    choice = cache_choice.choose(job, job.stages[0], needed=True, splits=splits)
    if not choice.first:
        raise UserError(f"config.probe: needs cached features; {choice.reason}")
    return choice


def look(
    config: Config, workdir: WorkDir, devices: DataParallel
) -> tuple[dict[str, Any], Inputs | None]:
    """What a probe's features tell: of a grid of heads the best one, and baselines.

    Returns:
      The content of `probe.json`, nothing where nothing is asked; and the features of the head that
      is to be trained, None where the file was there and they can be had without the grid.

    Raises:
      UserError: there are no features that could be kept, or the file is of others.
    """
    if not probe.wanted(config):
        return {}, None
    job = widest(config)
    stage, made_of = job.stages[0], _made_of(job)
    known = workdir.read_json("probe.json") or {}
    if known and known.get("made_of") != made_of:
        raise UserError(
            f"{workdir.path}/probe.json: was found with other weights, images or another version "
            "of tl_jax. Bring them back, give another --workdir, or remove it to search anew."
        )
    if known and len(set(config.probe.grid.input or ())) < 2:
        return known, None
    variables, choice = devices.replicate(job.pretrained.variables), choose(job)
    with display.Progress(0, job.total_steps, job.steps_per_epoch) as bar:
        choice = feature_cache.with_room(job, stage, choice, variables, needed=True)
        bar.say(f"cache {choice.kind}: {choice.reason}")
        inputs = feature_cache.fill(job, stage, choice, devices, variables, bar.filling)
    if known:  # from the wide head's features, as before: a narrower network's have other bits
        return known, probe.narrowed(inputs, job.pretrained, known["chosen"]["input"], devices)
    found: dict[str, Any] = {"made_of": made_of}
    head = config.head.input
    if probe.has_grid(config):
        inputs = feature_cache.on_devices(inputs, devices)
        found |= probe.search(job, inputs, devices)
        display.console.print(display.grid_table(found, len(job.class_names)))
        head = found["chosen"]["input"]
    inputs = probe.narrowed(inputs, job.pretrained, head, devices)
    if config.probe.baselines:
        splits_of = {role: probe.features(rows) for role, rows in inputs.rows.items()}
        found["baselines"] = feature_baselines.run(
            config.probe.baselines, splits_of, len(job.class_names)
        )
        display.console.print(display.baselines_table(found["baselines"]))
    if parallel.is_first():
        workdir.write_json("probe.json", found)
    return found, inputs


def _made_of(job: Job) -> str:
    """SHA-256 of all that names the weights, the data, the configuration and their order."""
    return hashlib.sha256(json.dumps(results.identity(job), sort_keys=True).encode()).hexdigest()
