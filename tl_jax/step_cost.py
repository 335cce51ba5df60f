"""What a run's step costs, phase by phase, and the least that it can cost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import costs, sharing
from tl_jax import train_step as steps
from tl_jax.job import Job
from tl_jax.phases import Stage
from tl_jax.train_step import Frozen, TrainState

HYPER = steps.Hyper(np.uint32(0), np.float32(0))  # costs do not depend on them


def step_cost(job: Job) -> dict[str, Any]:
    """FLOPs of one micro-batch's step on one device, without preprocessing, and the least.

    Of several phases: the means over all steps, and each phase's own.
    """
    costs_of = [_stage_cost(job, stage) for stage in job.stages]
    shares = [(stage.last - stage.first) / job.total_steps for stage in job.stages]
    total: dict[str, Any] = {
        name: sum(share * cost[name] for share, cost in zip(shares, costs_of, strict=True))
        for name in ("flops_per_step", "flops_minimum")
    }
    if len(costs_of) > 1:
        total["phases"] = costs_of
    return total


def least(job: Job) -> list[float]:
    """The least FLOPs of a step on the whole batch, phase by phase."""
    shards = jax.device_count() * job.config.train.gradient_accumulation
    return [shards * _least(job, stage) for stage in job.stages]


def _stage_cost(job: Job, stage: Stage) -> dict[str, Any]:
    return {
        "phase": stage.plan.phase,
        "flops_per_step": sharing.programs_of(job, stage, "flops", lambda _: _counted(job, stage)),
        "flops_minimum": _least(job, stage),
    }


def _counted(job: Job, stage: Stage) -> float:
    train, network = job.config.train, job.pretrained.module
    state, frozen, batch = _abstract(job, stage)
    run = steps.make_loss(
        network, stage.plan, train.label_smoothing, rematerialise=train.rematerialise
    )
    step = steps.make_train_step(run, stage.optimizer, lambda batch, keys: batch["image"])
    return costs.lowered_flops(step, state, frozen, HYPER, batch)


def _least(job: Job, stage: Stage) -> float:
    return sharing.programs_of(job, stage, "least flops", lambda _: _minimum(job, stage))


def _minimum(job: Job, stage: Stage) -> float:
    state, frozen, batch = _abstract(job, stage)
    loss = steps.make_loss(job.pretrained.module, stage.plan, job.config.train.label_smoothing)

    def forward(trainable, statistics, frozen, images, labels):
        return loss(trainable, statistics, frozen, images, labels, None)[0]

    variables = state.trainable, state.statistics, frozen
    return costs.minimum_flops(forward, *variables, batch["image"], batch["label"])


def _abstract(job: Job, stage: Stage) -> tuple[TrainState, Frozen, dict[str, Any]]:
    """Shapes of the state, of what is frozen, and of one device's micro-batch."""
    shards = jax.device_count() * job.config.train.gradient_accumulation
    size = job.config.data.batch_size // shards
    height, width = job.pretrained.preprocessing.output_size
    channels = job.pretrained.preprocessing.channels
    batch = {
        "image": jax.ShapeDtypeStruct((size, height, width, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    state, frozen = jax.eval_shape(
        lambda variables: steps.divide(stage.plan, variables, stage.optimizer),
        job.pretrained.variables,
    )
    return state, frozen, batch
