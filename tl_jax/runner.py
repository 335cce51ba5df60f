"""The steps of a phase on its devices: one a call, or many in one program."""

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from tl_jax import input_pipeline, parallel
from tl_jax import train_step as steps
from tl_jax.feature_cache import Inputs
from tl_jax.freezing import Plan
from tl_jax.input_pipeline import Rows
from tl_jax.job import Job
from tl_jax.metrics import Meter
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage
from tl_jax.train_step import Frozen, TrainState


class OrderOnly:
    """Rows of which only "index" (and "view") are loaded: the rest lies on the device.

    Args:
      rows: that lie there.
    """

    cheap = True

    def __init__(self, rows: Rows):
        self.name, self._count = rows.name, len(rows)

    def __len__(self) -> int:
        return self._count

    def load(self, indices: Any, views: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """See `input_pipeline.Rows`."""
        order = {"index": np.asarray(indices, np.int32)}
        return order if views is None else {**order, "view": views}


class Runner:
    """Runs the steps of a phase.

    Args:
      job: whose phase it is.
      stage: the phase.
      devices: that run it.
      inputs: the phase's rows.
      meter: told what each step returns, and how long it took.
      position: of the training batches, as `get_state` gave it; None for the start.
    """

    def __init__(
        self,
        job: Job,
        stage: Stage,
        devices: DataParallel,
        inputs: Inputs,
        meter: Meter,
        position: Any,
    ):
        self._devices, self._meter, self._resident = devices, meter, inputs.resident
        rows = inputs.rows["train"]
        self._batches = training_batches(job, rows if self._resident is None else OrderOnly(rows))
        if position is not None:
            self._batches.set_state(position)
        step = train_step(job, stage, inputs.choice.first, parallel.AXIS)
        self.longest = 1
        if self._resident is None:
            self._run = devices.compile(step, arguments=2, donate=True)
        elif loops(stage.plan, inputs.choice.first):
            self.longest = job.steps_per_epoch
            self._run = devices.compile(steps.make_steps(step), arguments=4, donate=True)
        else:

            def run(state, frozen, rows, order):
                return step(state, frozen, steps.look_up(rows, order))

            self._run = devices.compile(run, arguments=3, donate=True)
        meter.expect_compilation()

    @property
    def position(self) -> Any:
        """Of the training batches."""
        return self._batches.get_state()

    def advance(self, state: TrainState, frozen: Frozen, step: int, stop: int) -> TrainState:
        """The state after `stop` steps, from that after `step`; at most `longest` more."""
        if self.longest > 1:
            return self._advance_together(state, frozen, step, stop - step)
        batch = self._devices.shard(self._meter.next_batch(self._batches))
        rows = () if self._resident is None else (self._resident,)
        state, metrics = self._meter.run(self._run, state, frozen, *rows, batch)
        self._meter.add(stop, metrics)
        return state

    def _advance_together(self, state, frozen, step, count):
        orders = [next(self._batches) for _ in range(count)]
        padded = [*orders, *orders[:1] * (self.longest - count)]  # one shape: one program
        order = jax.tree.map(lambda *rows: np.stack(rows, axis=1), *padded)
        state, metrics = self._meter.run(
            self._run,
            state,
            frozen,
            self._resident,
            self._devices.replicate(np.int32(count)),
            self._devices.shard(order),
        )
        self._meter.add_all(step + 1, metrics, count)
        return state


def loops(plan: Plan, first: int) -> bool:
    """Whether many steps are one program; on a CPU a loop's convolutions run on one thread."""
    if jax.default_backend() != "cpu":
        return True
    return not any(len(p.shape) == 4 and p.block >= first for p in plan.parameters)


def train_step(job: Job, stage: Stage, first: int, axis_name: str | None) -> Callable:
    """The step of a phase whose rows enter block `first`: images at 0, else activations."""
    module = job.pretrained.module.clone(axis_name=axis_name)
    smoothing = job.config.train.label_smoothing
    return steps.make_train_step(
        steps.make_loss(module, stage.plan, smoothing, first),
        stage.optimizer,
        activations if first else job.preprocess,
        seed=job.config.seed,
        micro_batches=job.config.train.gradient_accumulation,
        axis_name=axis_name,
    )


def activations(batch: dict[str, Any], keys: Any = None) -> Any:
    """What a block takes, from a batch of cached rows."""
    return batch["activations"]


def training_batches(job: Job, rows: Rows, epochs: int | None = None) -> grain.DatasetIterator:
    """The training batches of this process."""
    return input_pipeline.training_batches(
        rows,
        batch_size=job.config.data.batch_size,
        seed=job.config.seed,
        num_epochs=epochs or job.config.train.epochs,
        views=job.config.data.views,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=job.config.data.threads,
    )
