"""A job's network over a split, from its images or from what a phase's prefix made of them."""

import functools
from collections.abc import Callable
from typing import Any

from tl_jax import evaluation, input_pipeline, lora, parallel, prefix, runner, sharing, stages
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
        self._compiled = functools.cache(self._compile)

    def split(self, variables: Any, role: str) -> Evaluation:
        """Over all images of a split, every block as the exported network will run it."""
        return self.rows(variables, self._job.rows(role), 0, None)

    def rows(self, variables: Any, rows: Rows, first: int, stage: Stage | None) -> Evaluation:
        """Over all rows, which enter block `first`.

        In a phase's `stage` the prefix runs as it does before its steps and for its cache, so that
        what is found does not depend on whether there is one.
        """
        job, devices = self._job, self._devices
        number = None if stage is None else job.stages.index(stage)
        step, ready, run_below = self._compiled(first, number)
        merged = lora.merge(job.plan.adapters, variables)
        below = devices.replicate(ready(merged)) if ready else None
        batches = input_pipeline.all_batches(rows, job.config.data)

        def prepared(batch: Any) -> Any:
            batch = devices.shard(batch)
            return run_below(below, batch) if run_below else batch

        return evaluation.evaluate(step, devices.replicate(merged), map(prepared, batches))

    def _compile(
        self, first: int, number: int | None
    ) -> tuple[Callable, Callable | None, Callable | None]:
        """The step, and where the prefix runs before it, what makes it ready and runs it."""
        job, devices, ready, run_below = self._job, self._devices, None, None
        if number is not None and not first and prefix.can_be_ready(job.stages[number].plan):
            stage = job.stages[number]
            first, ready = stage.plan.boundary, stages.prefix_of(job, stage)

            def make_below(job: Job) -> Callable:
                below = stages.below_step(job, stage)
                return devices.compile(
                    lambda held, batch: {**batch, **below(held, batch, None)},
                    arguments=1,
                    split=True,
                )

            run_below = sharing.programs_of(job, stage, "evaluate below", make_below)

        def make(job: Job) -> Callable:
            take = runner.activations if first else job.preprocess

            def classify(variables, batch):
                return job.pretrained.module.apply(variables, take(batch), first=first)

            step = evaluation.make_eval_step(classify, len(job.class_names), parallel.AXIS)
            return devices.compile(step, arguments=1)

        return sharing.programs_of(job, None, ("evaluate", first), make), ready, run_below
