"""A run, from its configuration to its results: read it from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import config as config_lib
from tl_jax import costs, display, evaluation, freezing, input_pipeline, parallel, results
from tl_jax import job as job_lib
from tl_jax import train_step as steps
from tl_jax.checkpointing import Checkpoints
from tl_jax.config import Config
from tl_jax.errors import RunFailed, UserError
from tl_jax.evaluation import Evaluation
from tl_jax.job import Job
from tl_jax.metrics import Meter
from tl_jax.parallel import DataParallel
from tl_jax.train_step import Frozen, TrainState
from tl_jax.workdir import MetricsLog, WorkDir


def plan(config: Config, path: Any) -> dict[str, Any]:
    """Resolves, prints and writes the plan (beside no other run's); nothing is trained."""
    parallel.check_batch_size(config.data.batch_size, config.train.gradient_accumulation)
    description = job_lib.prepare(config).describe_plan()
    display.console.print(display.plan_table(description))
    workdir = WorkDir(path)
    if parallel.is_first() and not workdir.differences(config):
        workdir.write_json("plan.json", description)
    return description


def train(config: Config, path: Any) -> dict[str, Any]:
    """Trains, evaluates and exports; continues where an earlier start was cut off.

    Args:
      config: the run.
      path: its work directory.

    Returns:
      The content of `summary.json`.

    Raises:
      UserError: something that the user can mend.
      RunFailed: the loss is not finite, or what was to stay frozen moved.
    """
    started = time.perf_counter()
    workdir = WorkDir(path)
    workdir.claim(config)
    finished = workdir.read_json("summary.json")
    if finished and (workdir.path / "export").exists():
        display.console.print(f"{workdir.path} holds this run, finished:")
        return _judged(finished)
    parallel.check_batch_size(config.data.batch_size, config.train.gradient_accumulation)
    workdir.check_writable()
    with workdir.lock() if parallel.is_first() else contextlib.nullcontext():
        return _judged(_train(config, workdir, started))


def _train(config: Config, workdir: WorkDir, started: float) -> dict[str, Any]:
    job = job_lib.prepare(config)
    description = job.describe_plan()
    display.console.print(display.plan_table(description))
    cost = step_cost(job)
    before = freezing.fingerprint(job.plan, job.pretrained.variables)
    devices = DataParallel(config.parallel)
    initial, frozen = steps.divide(job.plan, job.pretrained.variables, job.optimizer)
    initial, frozen = devices.replicate((initial, frozen))
    eval_step = _compile_eval_step(job, devices)

    def evaluate(state: TrainState, split: str) -> Evaluation:
        variables = steps.variables_of(state.trainable, state.statistics, frozen)
        return evaluate_split(job, devices, eval_step, variables, split)

    with Checkpoints(workdir.path / "checkpoints") as checkpoints:
        _check_same_run(results.identity(job), checkpoints)
        if parallel.is_first():
            workdir.write_json("plan.json", description)
            workdir.write_json("config.json", config_lib.to_dict(config))
        log, meter = _fit(job, workdir, checkpoints, devices, initial, frozen, evaluate, started)
        best, _ = checkpoints.restore(checkpoints.best, like=initial)
    state = devices.replicate(best)
    splits = [split for split in ("validation", "test") if split in job.examples]
    evaluations = {split: evaluate(state, split) for split in splits}
    variables = steps.variables_of(state.trainable, state.statistics, frozen)
    variables = jax.tree.map(np.asarray, variables)
    certificate = freezing.certificate(job.plan, before, variables)
    summary = {
        **results.facts(job, description, certificate),
        "metrics": {split: found.summary() for split, found in evaluations.items()},
        "steps": {"trained": job.total_steps, "best": int(state.step)},
        "cost": {
            **cost,
            **meter.timing,
            "cache_seconds": 0.0,
        },
    }
    if parallel.is_first():
        trained = dataclasses.replace(job.pretrained, variables=variables)
        results.write(workdir, job, trained, log.records, evaluations, summary)
    return summary


def _fit(
    job: Job,
    workdir: WorkDir,
    checkpoints: Checkpoints,
    devices: DataParallel,
    state: TrainState,
    frozen: Frozen,
    evaluate: Callable[[TrainState, str], Evaluation],
    started: float,
) -> tuple[MetricsLog, Meter]:
    """Trains to the last step, from the newest checkpoint if there is one."""
    config = job.config
    batches = _training_batches(job)
    spent: dict[str, Any] = {}
    if checkpoints.last is not None:
        state, position = checkpoints.restore(checkpoints.last, like=state)
        display.console.print(f"Resuming from step {int(state.step)} of {job.total_steps}.")
        state = devices.replicate(state)
        batches.set_state(position["input"])
        spent = position["timing"]
    first = int(state.step)
    log = MetricsLog(workdir, first, writes=parallel.is_first())
    meter = Meter(config.data.batch_size, job.schedule, started, spent)
    train_step = _compile_train_step(job, devices)
    save_every = config.train.checkpoint_every_steps

    with (
        display.Progress(first, job.total_steps, job.steps_per_epoch) as bar,
        Profile(workdir, first, config.logging.profile_steps) as profile,
    ):

        def record(step: int, split: str, figures: Mapping[str, Any]) -> None:
            epoch = step / job.steps_per_epoch
            log.write({"step": step, "epoch": epoch, "split": split, **figures})
            bar.show(step, figures, split)

        for step in range(first + 1, job.total_steps + 1):
            profile.before(step)
            batch = meter.next_batch(batches)
            state, metrics = meter.run(train_step, state, frozen, devices.shard(batch))
            meter.add(step, metrics)
            epoch_ends = step % job.steps_per_epoch == 0
            save = epoch_ends or (save_every is not None and step % save_every == 0)
            logs = step % config.logging.every_steps == 0
            if save or logs:
                try:  # before a checkpoint, so that none holds what is not finite
                    meter.read()
                except RunFailed as error:
                    raise RunFailed(f"{error}; {_last_good(checkpoints)}") from None
            if logs:
                record(step, "train", meter.interval(step))
            if epoch_ends:
                record(step, "epoch", meter.epoch(step))
            accuracy = None
            if epoch_ends and "validation" in job.examples:
                validation = meter.aside(evaluate, state, "validation").summary()
                accuracy = validation["accuracy"]
                record(step, "validation", validation)
            if epoch_ends:
                bar.end_epoch(step)
            if save:
                if not parallel.replicas_agree((state.trainable, state.statistics)):
                    raise RunFailed(f"the devices differ at step {step}: a bug, please report it")
                position = {
                    "input": batches.get_state(),
                    "timing": meter.position,
                    **results.identity(job),
                    "plan": {path: group.name for path, group in job.plan.groups.items()},
                }
                meter.aside(checkpoints.save, state, position, accuracy)
    checkpoints.wait()
    return log, meter


def evaluate_split(
    job: Job, devices: DataParallel, eval_step: Callable, variables: Any, split: str
) -> Evaluation:
    """Runs the compiled step over all examples of a split."""
    batches = input_pipeline.evaluation_batches(
        job.examples[split],
        job.pretrained.preprocessing,
        batch_size=job.config.data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=job.config.data.threads,
    )
    return evaluation.evaluate(eval_step, variables, map(devices.shard, batches))


def step_cost(job: Job) -> dict[str, float]:
    """FLOPs of one micro-batch's step on one device, without preprocessing, and the least."""
    shards = jax.device_count() * job.config.train.gradient_accumulation
    size = job.config.data.batch_size // shards
    height, width = job.pretrained.preprocessing.output_size
    channels = job.pretrained.preprocessing.channels
    batch = {
        "image": jax.ShapeDtypeStruct((size, height, width, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    loss = steps.make_loss(job.pretrained.module, job.plan, job.config.train.label_smoothing)
    step = steps.make_train_step(
        loss, job.optimizer, lambda images, keys: images, seed=job.config.seed
    )
    state, frozen = jax.eval_shape(
        lambda variables: steps.divide(job.plan, variables, job.optimizer), job.pretrained.variables
    )

    def forward(trainable, statistics, frozen, images, labels):
        return loss(trainable, statistics, frozen, images, labels, None)[0]

    images, labels = batch["image"], batch["label"]
    return {
        "flops_per_step": costs.lowered_flops(step, state, frozen, batch),
        "flops_minimum": costs.minimum_flops(
            forward, state.trainable, state.statistics, frozen, images, labels
        ),
    }


class Profile:
    """A trace of some steps by `jax.profiler`, in `profile/` of the work directory.

    Args:
      workdir: of the run.
      first: steps that were done before this start.
      steps: how many to trace; 0 for none.
    """

    WARM_UP = 2  # the first steps compile

    def __init__(self, workdir: WorkDir, first: int, steps: int):
        self._folder, self._steps = str(workdir.path / "profile"), steps
        self._start = first + 1 + self.WARM_UP
        self._running = False

    def before(self, step: int) -> None:
        """Starts or stops, if it is time to."""
        if self._steps and step == self._start:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step == self._start + self._steps:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()


def _training_batches(job: Job) -> Any:
    return input_pipeline.training_batches(
        job.examples["train"],
        job.pretrained.preprocessing,
        batch_size=job.config.data.batch_size,
        seed=job.config.seed,
        num_epochs=job.config.train.epochs,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=job.config.data.threads,
    )


def _compile_train_step(job: Job, devices: DataParallel) -> Callable:
    module = job.pretrained.module.clone(axis_name=parallel.AXIS)
    step = steps.make_train_step(
        steps.make_loss(module, job.plan, job.config.train.label_smoothing),
        job.optimizer,
        job.training_preprocess(),
        seed=job.config.seed,
        micro_batches=job.config.train.gradient_accumulation,
        axis_name=parallel.AXIS,
    )
    return devices.compile(step, arguments=2, donate=True)


def _compile_eval_step(job: Job, devices: DataParallel) -> Callable:
    step = evaluation.make_eval_step(
        job.pretrained.module,
        len(job.class_names),
        job.device_preprocessing.device,
        parallel.AXIS,
    )
    return devices.compile(step, arguments=1, donate=False)


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
    if then["config_hash"] != now["config_hash"]:
        different.append("the configuration")
    if different:
        raise UserError(
            f"not as this run was started with, by the hashes in {checkpoints.folder}: "
            f"{', '.join(different)}. Bring them back, or give another --workdir."
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
