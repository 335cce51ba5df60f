"""A run, from its configuration to its results: read it from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tl_jax import (
    batch_norm,
    cache_choice,
    cache_folder,
    certificate,
    display,
    feature_cache,
    lora,
    memory,
    parallel,
    param_tree,
    plan_display,
    probe,
    probe_features,
    recipes,
    results,
    stages,
)
from tl_jax import config as config_lib
from tl_jax import job as job_lib
from tl_jax import train_step as steps
from tl_jax.cache_choice import Choice
from tl_jax.checkpointing import Checkpoints
from tl_jax.config import Config
from tl_jax.errors import NotFinite, RunFailed, UserError
from tl_jax.evaluation import Evaluation
from tl_jax.evaluator import Evaluator
from tl_jax.feature_cache import Inputs
from tl_jax.job import Job
from tl_jax.metrics import Meter
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage
from tl_jax.profiling import Profile
from tl_jax.runner import Runner, training_batches
from tl_jax.step_cost import step_cost
from tl_jax.train_step import Frozen, TrainState
from tl_jax.workdir import MetricsLog, WorkDir


def train(config: Config, path: Any, command: str | None = None) -> dict[str, Any]:
    """Trains, evaluates and exports; continues where an earlier start was cut off.

    Args:
      config: the run.
      path: its work directory.
      command: that repeats it, for the model card; None: this process's command line.

    Returns:
      The content of `summary.json`.

    Raises:
      UserError: something that the user can mend.
      RunFailed: the loss is not finite, or what was to stay frozen moved.
    """
    started = time.perf_counter()
    workdir = WorkDir(path)
    workdir.claim(config)
    finished = workdir.finished()
    if finished is not None:
        _check_finished(config, finished, workdir)
        display.console.print(f"{workdir.path} holds this run, finished:")
        return _judged(finished)
    parallel.check_batch_size(config.data.batch_size, config.train.gradient_accumulation)
    workdir.check_writable()
    memory.reset_peak()
    if config.cache == "disk":
        cache_folder.check(config.cache_dir)
    with workdir.lock() if parallel.is_first() else contextlib.nullcontext():
        return _judged(_train(config, workdir, started, command))


def _train(config: Config, workdir: WorkDir, started: float, command: str | None) -> dict[str, Any]:
    asked, devices = config, DataParallel(config.parallel)
    found, features = probe_features.look(config, workdir, devices)
    if "chosen" in found:
        config = probe.with_setting(config, found["chosen"])
    job = _on_host(job_lib.prepare(config))
    description = job.describe_plan()
    display.console.print(plan_display.plan_table(description))
    choices = (
        [cache_choice.choose(job, stage) for stage in job.stages]
        if features is None
        else [features.choice]
    )
    cost = step_cost(job)

    evaluator = Evaluator(job, devices)
    ends = [job.stages[0].last] if job.recipe.interpolate else []
    with Checkpoints(workdir.path / "checkpoints", keep=ends) as checkpoints:
        _check_same_run(results.identity(job), checkpoints)
        if parallel.is_first():
            workdir.write_json("plan.json", description)
            workdir.write_json("config.json", config_lib.to_dict(asked))
        log, meter, proofs = _fit(
            job, workdir, checkpoints, devices, choices, evaluator, started, features
        )
        best, variables, path = _choose(job, checkpoints, evaluator.split)
    if config.freeze.batch_norm == "reestimate" and config.freeze.reestimate == "after":
        variables = _reestimate(job, devices, variables)
    splits = [split for split in ("validation", "test") if split in job.examples]
    evaluations = {split: evaluator.split(variables, split) for split in splits}
    before = certificate.fingerprint(job.plan, job.pretrained.variables)
    whole = certificate.certify(job.plan, before, variables)
    whole["ok"] = whole["ok"] and all(proof["ok"] for proof in proofs)
    if len(proofs) > 1 or config.freeze.batch_norm == "reestimate":
        whole["phases"] = proofs
    summary = {
        **results.facts(job, description, whole),
        "metrics": {split: found.summary() for split, found in evaluations.items()},
        "steps": {
            "trained": job.total_steps,
            "best": best,
            "best_phase": job.stage_at(best).plan.phase,
        },
        **path,
        "cost": {**cost, **meter.timing, "peak_memory_bytes": memory.peak()},
        "cache": [choice.describe() for choice in choices],
        "config_hash": config_lib.config_hash(asked),
    }
    if found:
        summary["probe"] = found
    if parallel.is_first():
        merged = stages.host(lora.merge(job.plan.adapters, variables))
        trained = dataclasses.replace(job.pretrained, variables=merged)
        results.write(workdir, job, trained, log.records, evaluations, summary, command)
    return summary


def _fit(
    job: Job,
    workdir: WorkDir,
    checkpoints: Checkpoints,
    devices: DataParallel,
    choices: list[Choice],
    evaluator: Evaluator,
    started: float,
    features: Inputs | None,
) -> tuple[MetricsLog, Meter, list[dict[str, Any]]]:
    """Trains to the last step, phase by phase, from the newest checkpoint if there is one.

    `choices` become those that there was room for.

    Returns:
      The log, the meter, and each phase's certificate.
    """
    config, start = job.config, job.pretrained.variables
    position: dict[str, Any] = {"phase": 0, "timing": {}, "proofs": []}
    if checkpoints.last is None:
        if config.freeze.batch_norm == "reestimate" and config.freeze.reestimate == "before":
            start = _reestimate(job, devices, start)
        state, frozen = stages.begin(job, start)
        position["before"] = certificate.fingerprint(job.stages[0].plan, start, steps=True)
    else:
        state, frozen, position = _restore(job, checkpoints, checkpoints.last)
        display.console.print(f"Resuming from step {int(state.step)} of {job.total_steps}.")
    phases = list(zip(job.stages, choices, strict=True))[position["phase"] :]
    if features is None:
        feature_cache.check_room(job, phases, _variables(state, frozen))
    step, proofs = int(state.step), list(position["proofs"])
    log = MetricsLog(workdir, step, writes=parallel.is_first())
    timing = position["timing"]
    every, identity = config.logging.every_steps, results.identity(job)
    meter = Meter(config.data.batch_size, job.learning_rate, every, started, timing)

    with (
        display.Progress(step, job.total_steps, job.steps_per_epoch) as bar,
        Profile(workdir, step, config.logging.profile_steps) as profile,
    ):

        def record(step: int, split: str, figures: Mapping[str, Any]) -> None:
            epoch = step / job.steps_per_epoch
            log.write({"step": step, "epoch": epoch, "split": split, **figures})
            bar.show(step, figures, split)

        for number in range(position["phase"], len(job.stages)):
            stage, before = job.stages[number], position["before"]
            if number > position["phase"]:
                state, frozen = stages.follow(job, number, state, frozen, start["params"])
                frozen = stages.host(frozen)
                whole = _variables(state, frozen)
                before = certificate.fingerprint(stage.plan, whole, steps=True)
            state, runner = devices.replicate(state), None
            if step < stage.last:
                inputs = features or meter.aside(
                    _fill, job, stage, choices[number], devices, _variables(state, frozen), bar
                )
                choices[number] = inputs.choice
                meter.filled(
                    number,
                    inputs.seconds,
                    inputs.unseen_seconds,
                    inputs.watched_seconds,
                    inputs.wait_seconds,
                    inputs.compile_seconds,
                )
                runner = Runner(job, stage, devices, inputs, state, frozen, meter)
            while runner and step < stage.last:
                profile.before(step + 1)
                stop = job.next_stop(step, runner.longest)
                state, step = runner.advance(state, step, stop), stop
                epoch_ends, save = job.stops_at(step)
                if save or step % every == 0:
                    try:  # before a checkpoint, so that none holds what is not finite
                        intervals = meter.read()
                    except NotFinite as error:
                        raise NotFinite(f"{error}; {_last_good(checkpoints)}") from None
                    for end, figures in intervals:
                        record(end, "train", figures)
                accuracy = None
                if epoch_ends:
                    record(step, "epoch", meter.epoch(step))
                if epoch_ends and "validation" in inputs.rows:
                    variables = _variables(state, runner.on_devices(frozen))
                    rows, first = inputs.rows["validation"], inputs.choice.first
                    found = meter.aside(
                        evaluator.rows, variables, rows, first, stage, runner.below
                    ).summary()
                    accuracy = found["accuracy"]
                    record(step, "validation", found)
                if epoch_ends:
                    bar.end_epoch(step)
                if save:
                    if not parallel.replicas_agree((state.trainable, state.statistics)):
                        raise RunFailed(
                            f"the devices differ at step {step}: a bug, please report it"
                        )
                    kept = {
                        "phase": number,
                        "before": before,
                        "proofs": proofs,
                        "timing": meter.position,
                        **identity,
                        "plan": {p: group.name for p, group in stage.plan.groups.items()},
                    }
                    keep = stages.kept(job, number, state, frozen)
                    meter.aside(checkpoints.save, step, keep, kept, accuracy)
            if runner:  # what lay on the devices, not what was kept here
                frozen = runner.after(frozen)
            whole = _variables(state, frozen)
            proof = certificate.certify(stage.plan, before, whole, steps=True)
            proofs = [*proofs, {"phase": stage.plan.phase, **proof}]
    checkpoints.wait()
    return log, meter, proofs


def _fill(
    job: Job,
    stage: Stage,
    choice: Choice,
    devices: DataParallel,
    variables: Any,
    bar: display.Progress,
) -> Inputs:
    choice = feature_cache.with_room(job, stage, choice, variables)
    bar.say(f"cache {choice.kind}: {choice.reason}")
    try:
        return feature_cache.fill(job, stage, choice, devices, variables, bar.filling)
    except cache_folder.NoRoom as error:  # less than there was when it was asked for
        if job.config.cache != "auto" or jax.process_count() > 1:
            raise
        choice = feature_cache.without(str(error))
    bar.say(f"cache {choice.kind}: {choice.reason}")
    return feature_cache.fill(job, stage, choice, devices, variables, bar.filling)


def _on_host(job: Job) -> Job:
    """The job with its weights as NumPy arrays, so that devices hold what a phase runs alone."""
    network, variables = job.pretrained, stages.host(job.pretrained.variables)
    return dataclasses.replace(job, pretrained=dataclasses.replace(network, variables=variables))


def _variables(state: TrainState, frozen: Frozen) -> dict[str, Any]:
    return steps.variables_of(state.trainable, state.statistics, frozen)


def _restore(
    job: Job, checkpoints: Checkpoints, step: int
) -> tuple[TrainState, Frozen, dict[str, Any]]:
    """State, what is frozen, and position of a checkpoint."""
    number, start = checkpoints.position(step)["phase"], job.pretrained.variables
    restored, position = checkpoints.restore(step, like=stages.shapes(job, number, start))
    state, frozen = stages.resume(job, number, restored, start)
    return state, frozen, position


def _choose(
    job: Job, checkpoints: Checkpoints, evaluate: Callable[[Any, str], Evaluation]
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Step and variables of what is evaluated and exported, and how it was chosen.

    That is the best checkpoint by validation, else the last; or, for a strategy that interpolates,
    the coefficient that is best on validation (without one, the nearest to 0.5, as its authors
    advise).
    """
    if not job.recipe.interpolate:
        state, frozen, _ = _restore(job, checkpoints, checkpoints.best)
        return checkpoints.best, _variables(state, frozen), {}
    last = job.total_steps
    probe, end = (
        _variables(*_restore(job, checkpoints, step)[:2]) for step in (job.stages[0].last, last)
    )
    grid: list[dict[str, Any]] = []
    for coefficient in job.recipe.interpolate:
        between = param_tree.interpolate(probe, end, coefficient)
        found = {
            split: evaluate(between, split).summary()
            for split in ("validation", "test")
            if split in job.examples
        }
        grid.append({"coefficient": coefficient, **found})
    chosen = min(job.recipe.interpolate, key=lambda c: abs(c - 0.5))
    if "validation" in job.examples:
        best = max(grid, key=lambda row: row["validation"]["accuracy"])
        chosen = best["coefficient"]
    variables = param_tree.interpolate(probe, end, chosen)
    return last, variables, {"interpolation": {"coefficient": chosen, "grid": grid}}


def _reestimate(job: Job, devices: DataParallel, variables: Any) -> dict[str, Any]:
    """The variables with BatchNorm statistics measured in one pass over the training data."""
    module = job.pretrained.module.clone(axis_name=parallel.AXIS)
    step = batch_norm.make_statistics_step(module, job.preprocess, len(job.plan.blocks))
    compiled = devices.compile(step, arguments=1, donate=False)
    merged = devices.replicate(lora.merge(job.plan.adapters, variables))
    batches = map(devices.shard, training_batches(job, job.rows("train"), epochs=1))
    found = batch_norm.reestimate(compiled, merged, batches)
    return {**variables, "batch_stats": stages.host(found["batch_stats"])}


def _check_same_run(now: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """A checkpoint goes on only with the weights, data and configuration that it was made with."""
    if checkpoints.last is None:
        return
    then = checkpoints.position(checkpoints.last)
    different = []
    if then["trunk"]["sha256"] != now["trunk"]["sha256"]:
        different.append(f"the weights of {now['trunk']['source']}")
    if then["data"] != now["data"]:
        different.append("the data")
    made_of = then.get("made_of", now["made_of"])
    for what in ("network", "preparation of images"):
        if made_of.get(what) != now["made_of"][what]:
            different.append(f"the {what} that {now['trunk']['source']} describes")
    if then["config_hash"] != now["config_hash"]:
        different.append("the configuration")
    elif then["plan_sha256"] != now["plan_sha256"]:
        different.append("what the strategy's function makes of the same configuration")
    if then.get("order") != now["order"]:
        different.append("how the order of the examples is drawn (by another version of tl_jax)")
    if different:
        raise UserError(
            f"not as this run was started with, by the hashes in {checkpoints.folder}: "
            f"{', '.join(different)}. Bring them back, or give another --workdir."
        )


def _check_finished(config: Config, finished: Mapping[str, Any], workdir: WorkDir) -> None:
    """A finished run is this one where its hashes are; its config.json, if any, was compared."""
    lost = workdir.read_json("config.json") is None
    different = lost and finished.get("config_hash") != config_lib.config_hash(config)
    if not different and recipes.is_own(config.freeze.strategy):
        chosen = finished.get("probe", {}).get("chosen")
        now = config if chosen is None else probe.with_setting(config, chosen)
        different = finished.get("plan_sha256") != job_lib.prepare(now).plan_sha256
    if different:
        raise UserError(
            f"{workdir.path} holds a finished run of another configuration or strategy, by the "
            "hashes in its summary.json: give another --workdir"
        )


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    if checkpoints.last is None:
        return "there is no checkpoint before it. Try a lower optimizer.learning_rate."
    return f"the last good checkpoint is of step {checkpoints.last}, in {checkpoints.folder}"


def _judged(summary: dict[str, Any]) -> dict[str, Any]:
    if not summary["freeze"]["certificate"]["ok"]:
        raise RunFailed("certificate: what was to stay frozen moved; see summary.json")
    return summary
