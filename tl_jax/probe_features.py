"""Before the run: what a probe's features tell, by a grid of heads and by baselines."""

from typing import Any

from tl_jax import cache_choice, display, feature_baselines, feature_cache, parallel, probe
from tl_jax.cache_choice import Choice
from tl_jax.config import Config, config_hash
from tl_jax.errors import UserError
from tl_jax.feature_cache import Inputs
from tl_jax.job import Job, prepare
from tl_jax.parallel import DataParallel
from tl_jax.workdir import WorkDir


def choose(config: Config) -> tuple[Job, Choice]:
    """The job whose head sees all that a grid's heads do, and where its features shall be kept.

    Raises:
      UserError: there are none that could be kept.
    """
    job = prepare(probe.widened(config))
    probe.check(job)
    splits = [*cache_choice.SPLITS, *(["test"] if config.probe.baselines else [])]
    choice = cache_choice.choose(job, job.stages[0], needed=True, splits=splits)
    if not choice.first:
        raise UserError(f"config.probe: needs cached features; {choice.reason}")
    return job, choice


def look(
    config: Config, workdir: WorkDir, devices: DataParallel
) -> tuple[dict[str, Any], Inputs | None]:
    """What a probe's features tell: of a grid of heads the best one, and baselines.

    Returns:
      The content of `probe.json`, nothing where nothing is asked; and the features of the head that
      is to be trained, None where the file was there.

    Raises:
      UserError: there are no features that could be kept.
    """
    if not probe.wanted(config):
        return {}, None
    key, baselines = config_hash(config), config.probe.baselines
    found = workdir.read_json("probe.json")
    if found is not None and found.get("config_hash") == key:
        return found, None
    job, choice = choose(config)
    stage = job.stages[0]
    variables = devices.replicate(job.pretrained.variables)
    with display.Progress(0, job.total_steps, job.steps_per_epoch) as bar:
        choice = feature_cache.with_room(job, stage, choice, variables, needed=True)
        bar.say(f"cache {choice.kind}: {choice.reason}")
        inputs = feature_cache.fill(job, stage, choice, devices, variables, bar.filling)
    found, head = {"config_hash": key}, config.head.input
    if probe.has_grid(config):
        inputs = feature_cache.on_devices(inputs, devices)
        found |= probe.search(job, inputs, devices)
        display.console.print(display.grid_table(found, len(job.class_names)))
        head = found["chosen"]["input"]
    inputs = probe.narrowed(inputs, job.pretrained, head, devices)
    if baselines:
        splits_of = {role: probe.features(rows) for role, rows in inputs.rows.items()}
        found["baselines"] = feature_baselines.run(baselines, splits_of, len(job.class_names))
        display.console.print(display.baselines_table(found["baselines"]))
    if parallel.is_first():
        workdir.write_json("probe.json", found)
    return found, inputs
