"""A job's network over a split, from its images or from what a phase's prefix made of them."""

import functools
from collections.abc import Callable
from typing import Any

from tl_jax import evaluation, input_pipeline, lora, parallel, runner, sharing, stages
from tl_jax.evaluation import Evaluation
from tl_jax.input_pipeline import Rows
from tl_jax.job import Job
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage


class Evaluator:
    """Evaluates variables of a job's network.

    Args:
      job: whose network it is.
      devices: that compute.
    """

    def __init__(self, job: Job, devices: DataParallel):
        self._job, self._devices = job, devices
        self._step = functools.cache(self._compile_step)
        self._below = functools.cache(self._compile_below)

    def split(self, variables: Any, role: str) -> Evaluation:
        """Over all images of a split, every block as the exported network will run it."""
        return self.rows(variables, self._job.rows(role), 0)

    def rows(
        self,
        variables: Any,
        rows: Rows,
        first: int,
        stage: Stage | None = None,
        below: Any = None,
    ) -> Evaluation:
        """Over all rows, which enter block `first`.

        Where a phase's `stage` has its prefix on the devices (`below`, of a `Runner`) the rows are
        images, and it runs as it does before the phase's steps and for its cache, so that what is
        found does not depend on whether there is one.
        """
        job, devices = self._job, self._devices
        batches = map(devices.shard, input_pipeline.all_batches(rows, job.config.data))
        if stage is not None and below is not None:
            run_below = self._below(job.stages.index(stage))
            first = stage.plan.boundary
            batches = map(functools.partial(run_below, below), batches)
        merged = lora.merge(job.plan.adapters, variables)
        held = {name: stages.from_block(job, first, tree) for name, tree in merged.items()}
        return evaluation.evaluate(self._step(first), devices.replicate(held), batches)

    def _compile_below(self, number: int) -> Callable:
        devices, stage = self._devices, self._job.stages[number]

        def make(job: Job) -> Callable:
            below = stages.below_step(job, stage)
            return devices.compile(
                lambda held, batch: {**batch, **below(held, batch, None)}, arguments=1, split=True
            )

        return sharing.programs_of(self._job, stage, "evaluate below", make)

    def _compile_step(self, first: int) -> Callable:
        devices = self._devices

        def make(job: Job) -> Callable:
            take = runner.activations if first else job.preprocess

            def classify(variables, batch):
                return job.pretrained.module.apply(variables, take(batch), first=first)

            step = evaluation.make_eval_step(classify, len(job.class_names), parallel.AXIS)
            return devices.compile(step, arguments=1)

        return sharing.programs_of(self._job, None, ("evaluate", first), make)
