"""How large a gradient reaches each block when fine-tuning begins, from one head or another.

Kumar et al. (arXiv:2202.10054): a random head sends large and meaningless gradients into a
pretrained trunk, which distort its features; a head that was trained on these features does not.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tl_jax import job as job_lib
from tl_jax import optimizer, parallel, param_tree, runner, sharing
from tl_jax import train_step as steps
from tl_jax.config import Freeze
from tl_jax.freezing import Plan
from tl_jax.job import Job
from tl_jax.models import heads
from tl_jax.parallel import DataParallel

CLIP_NORM = 1.0  # as phases that train more than the head are clipped by default


def measure(job: Job, head: param_tree.Tree, count: int) -> dict[str, Any]:
    """Gradient norms in the first steps of full fine-tuning, from two heads.

    The steps are plain SGD (no momentum, no decay) at the run's learning rate, constant, on the
    run's first training batches and with its loss and augmentation; gradients are clipped at a
    global norm of 1, and their norms taken before that. The trunk starts from the run's pretrained
    weights both times. The random head is normal with variance 1 / fan-in, drawn by the run's seed:
    one of zeros would send no gradient at all into the trunk in the first step.

    Args:
      job: a run that trained its head alone on the pretrained trunk.
      head: the parameters of its trained head.
      count: of steps.

    Returns:
      "steps"; "random_head" and "trained_head": a dict of block, index, depth and norms [steps] for
      each block that has parameters, the head last.
    """
    network = job.pretrained
    full = dataclasses.replace(job.config, freeze=Freeze(strategy="full"))
    plan = job_lib.resolve_plans(full, network)[1][0]
    recorded = optax.chain(
        _record_norms(plan),
        optax.clip_by_global_norm(CLIP_NORM),
        optimizer.scale_by_rate(1.0),
    )
    update = optax.with_extra_args_support(recorded)
    stage = dataclasses.replace(job.stages[0], plan=plan, optimizer=update)
    devices = DataParallel(job.config.parallel)
    parallel.check_batch_size(job.config.data.batch_size, job.config.train.gradient_accumulation)

    def make(job: Job) -> Callable:
        step = runner.train_step(job, stage, 0, parallel.AXIS)
        return devices.compile(step, arguments=3, donate=True)

    step = sharing.programs_of(job, stage, "gradient flow", make)
    seed, rate = np.uint32(job.config.seed), np.float32(job.config.optimizer.learning_rate)
    hyper = devices.replicate(steps.Hyper(seed, rate))

    def run(head: param_tree.Tree) -> list[dict[str, Any]]:
        params = {**network.variables["params"], network.family.head: head}
        state, frozen = steps.divide(plan, {**network.variables, "params": params}, update)
        state, frozen = devices.replicate((state, frozen))
        epochs = -(-count // job.steps_per_epoch)
        batches = runner.training_batches(job, job.rows("train"), epochs=epochs)
        norms = []
        for batch in itertools.islice(batches, count):
            state, _ = step(state, frozen, hyper, devices.shard(batch))
            norms.append(np.asarray(state.optimizer[0]))
        return _rows(plan, np.stack(norms))

    initial = heads.initial(
        dataclasses.replace(network.module.head, init="normal"), head, job.config.seed
    )
    return {"steps": count, "random_head": run(initial), "trained_head": run(head)}


def norms_by_block(plan: Plan, gradients: param_tree.Tree) -> jax.Array:
    """The L2 norm of the gradient of each block's parameters, float32 [blocks]."""
    block = {p.path: p.block for p in plan.parameters}
    sums = [jnp.zeros(()) for _ in plan.blocks]
    for path, leaf in param_tree.flatten(gradients).items():
        sums[block[path]] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return jnp.sqrt(jnp.stack(sums))


def _record_norms(plan: Plan) -> optax.GradientTransformation:
    """Passes gradients on; its state is their norms by block."""

    def update(gradients, state, params=None):
        return gradients, norms_by_block(plan, gradients)

    return optax.GradientTransformation(lambda params: jnp.zeros(len(plan.blocks)), update)


def _rows(plan: Plan, norms: np.ndarray) -> list[dict[str, Any]]:
    top = len(plan.blocks) - 1
    return [
        {
            "block": plan.blocks[index],
            "index": index,
            "depth": index / top,
            "norms": norms[:, index].tolist(),
        }
        for index in sorted({p.block for p in plan.parameters})
    ]
