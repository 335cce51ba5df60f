"""What a run would do and cost, shown before it starts: `--mode plan`."""

from typing import Any

from tl_jax import (
    cache_choice,
    display,
    feature_cache,
    figures,
    parallel,
    plan_display,
    probe,
    probe_features,
)
from tl_jax import job as job_lib
from tl_jax.config import Config
from tl_jax.workdir import WorkDir


def plan(config: Config, path: Any) -> dict[str, Any]:
    """Resolves, prints and draws the plan (beside no other run's); nothing is trained.

    Args:
      config: the run.
      path: its work directory.

    Returns:
      The content of `plan.json`.

    Raises:
      UserError: the run could not be.
    """
    parallel.check_batch_size(config.data.batch_size, config.train.gradient_accumulation)
    job = job_lib.prepare(config)
    description, needed = job.describe_plan(), probe.wanted(config)
    seen, choices = job, [] if needed else [cache_choice.choose(job, s) for s in job.stages]
    if needed:
        seen = probe_features.widest(config)
        choices = [probe_features.choose(seen)]
    variables, phases = seen.pretrained.variables, list(zip(seen.stages, choices, strict=True))
    feature_cache.check_room(seen, phases, variables)
    choices = [
        feature_cache.with_room(seen, stage, choice, variables, needed=needed)
        for stage, choice in phases
    ]
    display.console.print(plan_display.plan_table(description))
    display.console.print(plan_display.plan_tree(description))
    for stage, choice in zip(job.stages, choices, strict=True):
        phase = f" in {stage.plan.phase}" if len(choices) > 1 else ""
        text = f"cache{phase} {choice.kind}: {choice.reason}"
        display.console.print(text, markup=False, highlight=False, soft_wrap=True)
    if probe.has_grid(config):
        count = len(probe.settings(config))
        display.console.print(f"grid of {count} heads: validation chooses which is the run's")
    if config.control is not None:
        display.console.print(f"control {config.control}: runs beside it, with as many steps")
    workdir = WorkDir(path)
    if parallel.is_first() and not workdir.differences(config):
        workdir.write_json("plan.json", description)
        workdir.write_bytes("figures/plan.png", figures.plan(description))
    return description
