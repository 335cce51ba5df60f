"""What a run's step costs, phase by phase, and the least that it can cost."""

from typing import Any

import jax
import jax.numpy as jnp

from tl_jax import costs
from tl_jax import train_step as steps
from tl_jax.job import Job
from tl_jax.phases import Stage


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


def _stage_cost(job: Job, stage: Stage) -> dict[str, Any]:
    shards = jax.device_count() * job.config.train.gradient_accumulation
    size = job.config.data.batch_size // shards
    height, width = job.pretrained.preprocessing.output_size
    channels = job.pretrained.preprocessing.channels
    batch = {
        "image": jax.ShapeDtypeStruct((size, height, width, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    train, network = job.config.train, job.pretrained.module
    loss = steps.make_loss(network, stage.plan, train.label_smoothing)
    run = steps.make_loss(
        network, stage.plan, train.label_smoothing, rematerialise=train.rematerialise
    )
    step = steps.make_train_step(
        run, stage.optimizer, lambda batch, keys: batch["image"], seed=job.config.seed
    )
    state, frozen = jax.eval_shape(
        lambda variables: steps.divide(stage.plan, variables, stage.optimizer),
        job.pretrained.variables,
    )

    def forward(trainable, statistics, frozen, images, labels):
        return loss(trainable, statistics, frozen, images, labels, None)[0]

    images, labels = batch["image"], batch["label"]
    return {
        "phase": stage.plan.phase,
        "flops_per_step": costs.lowered_flops(step, state, frozen, batch),
        "flops_minimum": costs.minimum_flops(
            forward, state.trainable, state.statistics, frozen, images, labels
        ),
    }
