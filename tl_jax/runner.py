"""The steps of a phase on its devices: one a call, or many in one program."""

import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from tl_jax import (
    certificate,
    input_pipeline,
    layer_forms,
    parallel,
    param_tree,
    prefix,
    sharing,
    stages,
)
from tl_jax import train_step as steps
from tl_jax.errors import RunFailed
from tl_jax.feature_cache import Inputs
from tl_jax.freezing import Plan
from tl_jax.input_pipeline import Order, Rows
from tl_jax.job import Job
from tl_jax.metrics import Meter
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage
from tl_jax.train_step import Frozen, Hyper, TrainState


class Runner:
    """Runs the steps of a phase.

    A step is one program, on what the boundary's block takes; what lies below is another, which
    runs before it where the rows are images. So a step is the same whether a cache holds its input.

    Args:
      job: whose phase it is.
      stage: the phase.
      devices: that run it.
      inputs: the phase's rows.
      state: at its start.
      frozen: what does not train.
      meter: told what each step returns, and how long it took.

    Attributes:
      below: the prefix on the devices, in the form in which it runs before each step; None where
        none does.
    """

    def __init__(
        self,
        job: Job,
        stage: Stage,
        devices: DataParallel,
        inputs: Inputs,
        state: TrainState,
        frozen: Frozen,
        meter: Meter,
    ):
        self._devices, self._meter, self._resident = devices, meter, inputs.resident
        self._schedule, self._order = stage.schedule, order_of(job)
        self._seed = devices.replicate(np.uint32(job.config.seed))
        if self._resident is None:
            self._batches = training_batches(job, inputs.rows["train"], start=int(state.step))
        first, below = inputs.choice.first, None
        if prefix.can_be_ready(stage.plan):
            if not first:
                whole = steps.variables_of({}, state.statistics, frozen)
                below = devices.replicate(stages.prefix_of(job, stage)(whole))
            first, frozen = stage.plan.boundary, stages.above(job, stage, frozen)
        self._held, self.below = devices.replicate(frozen), below
        self._before = certificate.sha256(below)
        together = self._resident is not None and loops(stage.plan, inputs.choice.first)
        self.longest, self._together = job.steps_per_epoch if together else 1, together
        self._run, self._look_up, self._run_below = sharing.programs_of(
            job,
            stage,
            ("steps", first, together),
            lambda job: _compile(job, stage, devices, first, together),
        )
        meter.expect_compilation()

    def after(self, frozen: Frozen) -> Frozen:
        """`frozen` with what the steps were given of it as it lies on the devices now.

        Raises:
          RunFailed: the prefix, which has another form there, is not what it was.
        """
        if certificate.sha256(self.below) != self._before:
            raise RunFailed("certificate: the frozen prefix moved on the devices")
        return self.on_devices(frozen)

    def on_devices(self, frozen: Frozen) -> Frozen:
        """`frozen` with what the steps were given of it as it lies on the devices."""
        return Frozen(
            param_tree.overlay(frozen.params, self._held.params),
            param_tree.overlay(frozen.statistics, self._held.statistics),
            frozen.start,
        )

    def advance(self, state: TrainState, step: int, stop: int) -> TrainState:
        """The state after `stop` steps, from that after `step`; at most `longest` more."""
        if self._together:
            return self._advance_together(state, step, stop - step)
        if self._resident is None:
            batch = self._meter.next_batch(self._batches)
        else:
            batch = self._order.batch(step)
        hyper = Hyper(self._seed, self._devices.replicate(self._schedule(step)))
        state, metrics = self._meter.run(
            self._advance_once, state, hyper, self._devices.shard(batch)
        )
        self._meter.add(stop, metrics)
        return state

    def _advance_once(self, state, hyper, batch):
        if self._resident is not None:
            batch = self._look_up(self._resident, batch)
        if self.below is not None:
            batch = self._run_below(self.below, hyper.seed, state.step, batch)
        return self._run(state, self._held, hyper, batch)

    def _advance_together(self, state, step, count):
        stop = step + self.longest  # one shape: one program
        rates, order = self._schedule(np.arange(step, stop)), self._order.batches(step, stop)
        state, metrics = self._meter.run(
            self._run,
            state,
            (self._held, self.below),
            Hyper(self._seed, self._devices.replicate(rates)),
            self._resident,
            self._devices.replicate(np.int32(count)),
            self._devices.shard(order),
        )
        self._meter.add_all(step + 1, metrics, count)
        return state


def _compile(
    job: Job, stage: Stage, devices: DataParallel, first: int, together: bool
) -> tuple[Callable, Callable, Callable]:
    """The steps (many in one program, or one), what finds a batch's rows, what the prefix runs."""
    step, below_of = train_step(job, stage, first, parallel.AXIS), stages.below_step(job, stage)

    def run_below(below, seed, step, batch):
        keys = steps.example_keys(seed, step, batch["index"])[:, 0]
        return below_of(below, batch, keys)

    def whole_step(state, held, hyper, batch):
        held, below = held
        if below is not None:
            batch = run_below(below, hyper.seed, state.step, batch)
        return step(state, held, hyper, batch)

    return (
        devices.compile(steps.make_steps(whole_step), arguments=5, donate=True)
        if together
        else devices.compile(step, arguments=3, donate=True),
        devices.compile(steps.look_up, arguments=1, split=True),
        devices.compile(run_below, arguments=3, split=True),
    )


def loops(plan: Plan, first: int) -> bool:
    """Whether many steps are one program; on a CPU a loop's convolutions run on one thread."""
    if jax.default_backend() != "cpu":
        return True
    return not any(len(p.shape) == 4 and p.block >= first for p in plan.parameters)


def train_step(job: Job, stage: Stage, first: int, axis_name: str | None) -> Callable:
    """The step of a phase whose rows enter block `first`: images at 0, else activations."""
    module = job.pretrained.module.clone(axis_name=axis_name)
    config = job.config.train
    loss = steps.make_loss(
        module,
        stage.plan,
        config.label_smoothing,
        first,
        rematerialise=config.rematerialise,
        form=functools.partial(layer_forms.suited, differentiated=True),
    )
    return steps.make_train_step(
        loss,
        stage.optimizer,
        activations if first else job.preprocess,
        micro_batches=config.gradient_accumulation,
        axis_name=axis_name,
    )


def activations(batch: dict[str, Any], keys: Any = None) -> Any:
    """What a block takes, from a batch of cached rows."""
    return batch["activations"]


def order_of(job: Job) -> Order:
    """The order of the training examples in this process."""
    data = job.config.data
    return Order(
        examples=len(job.examples["train"]),
        batch_size=data.batch_size,
        seed=job.config.seed,
        views=data.views,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def training_batches(
    job: Job, rows: Rows, *, start: int = 0, epochs: int | None = None
) -> grain.DatasetIterator:
    """The training batches of this process, after the first `start`."""
    return input_pipeline.training_batches(
        rows,
        order_of(job),
        num_epochs=epochs or job.config.train.epochs,
        start=start,
        threads=job.config.data.threads,
        workers=job.config.data.workers,
    )
