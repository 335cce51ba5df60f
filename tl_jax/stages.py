"""The state of a phase: how it begins, what a checkpoint keeps of it, how it goes on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import depth_map, optimizer, param_tree, prefix, sharing
from tl_jax import train_step as steps
from tl_jax.job import Job
from tl_jax.phases import Stage
from tl_jax.train_step import Frozen, TrainState


def begin(job: Job, variables: Mapping[str, Any]) -> tuple[TrainState, Frozen]:
    """The state at the start of the first phase.

    Args:
      job: whose first phase it is.
      variables: that training starts from.
    """
    stage = job.stages[0]
    return steps.divide(stage.plan, dict(variables), stage.optimizer)


def follow(
    job: Job, number: int, state: TrainState, frozen: Frozen, start: Mapping[str, Any]
) -> tuple[TrainState, Frozen]:
    """The state at the start of a later phase.

    Newly trainable parameters enter the optimizer with a fresh state, others keep theirs.

    Args:
      job: whose phases these are.
      number: of the phase that begins, from 1 on.
      state: at the end of the phase before.
      frozen: in the phase before.
      start: the parameters before any training.
    """
    before, stage = job.stages[number - 1], job.stages[number]
    variables = steps.variables_of(state.trainable, state.statistics, frozen)
    fresh, rest = steps.divide(stage.plan, variables, stage.optimizer, dict(start))
    carried = optimizer.carry_over(state.optimizer, before.plan, fresh.optimizer, stage.plan)
    carried = jax.tree.map(jnp.array, carried)  # a step gives its state's buffers up
    return fresh._replace(step=jnp.array(state.step), optimizer=carried), rest


def above(job: Job, stage: Stage, frozen: Frozen) -> Frozen:
    """What is frozen from the boundary on: all that steps on the boundary's activations need."""
    first = stage.plan.boundary
    params, statistics = (from_block(job, first, x) for x in (frozen.params, frozen.statistics))
    return Frozen(params, statistics, frozen.start)


def from_block(job: Job, first: int, tree: Any) -> dict[str, Any]:
    """Of a tree of parameters or statistics what belongs to block `first` and those after it."""
    chain = job.pretrained.chain
    return param_tree.split(tree, lambda path: depth_map.block_of(path, chain) >= first)[0]


def prefix_of(job: Job, stage: Stage) -> Callable[[Any], dict[str, Any]]:
    """Compiled: variables → those of the phase's prefix, ready to run."""

    def make(job: Job) -> Callable[[Any], dict[str, Any]]:
        network = job.pretrained
        return jax.jit(
            lambda variables: prefix.ready(network.module, network.family, stage.plan, variables)
        )

    return sharing.programs_of(job, stage, "prefix of", make)


def below_step(job: Job, stage: Stage) -> Callable:
    """`run(below, batch, keys)`: a batch of images → of what the boundary's block takes.

    `below` is of `prefix_of`; with a PRNG key an example the images are augmented.
    """
    module, parts = job.pretrained.module, job.config.train.gradient_accumulation

    def run(below, batch, keys):
        def activations_of(images_and_keys):
            images, keys = images_and_keys
            return prefix.apply(module, stage.plan, below, job.preprocess(images, keys))

        images = {name: batch[name] for name in ("image", "index", "view") if name in batch}
        if parts == 1:
            found = activations_of((images, keys))
        else:  # as many at a time as the step takes
            cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (images, keys))
            found = jax.lax.map(activations_of, cut)
            found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
        return {"activations": found, "label": batch["label"], "index": batch["index"]}

    return run


def kept(job: Job, number: int, state: TrainState, frozen: Frozen) -> dict[str, Any]:
    """What a checkpoint keeps: the state, and what earlier phases changed and this one freezes."""
    params, statistics = _settled_paths(job, number)
    return {
        "state": state._asdict(),
        "settled": {
            "params": param_tree.split(frozen.params, params.__contains__)[0],
            "statistics": param_tree.split(frozen.statistics, statistics.__contains__)[0],
        },
    }


def shapes(job: Job, number: int, variables: Mapping[str, Any]) -> dict[str, Any]:
    """`kept` as shapes with dtype, for a checkpoint of this phase."""
    stage = job.stages[number]

    def build(variables):
        state, frozen = steps.divide(stage.plan, variables, stage.optimizer)
        return kept(job, number, state, frozen)

    return jax.eval_shape(build, dict(variables))


def resume(
    job: Job, number: int, restored: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[TrainState, Frozen]:
    """The state from what a checkpoint kept.

    Args:
      job: whose phases these are.
      number: of the phase that the checkpoint was made in.
      restored: as `kept` gave it.
      start: the variables before any training.
    """
    stage = job.stages[number]
    _, frozen = steps.divide(stage.plan, dict(start), stage.optimizer)
    settled = restored["settled"]
    frozen = frozen._replace(
        params=param_tree.overlay(frozen.params, settled["params"]),
        statistics=param_tree.overlay(frozen.statistics, settled["statistics"]),
    )
    return TrainState(**restored["state"]), frozen


def _settled_paths(job: Job, number: int) -> tuple[set[str], set[str]]:
    """Parameters and statistics that an earlier phase changed and this one freezes."""
    plan, earlier = job.stages[number].plan, [stage.plan for stage in job.stages[:number]]
    params = {path for before in earlier for path in before.entries} - plan.entries.keys()
    statistics = {path for before in earlier for path in before.statistics} - plan.statistics
    return params, statistics


def host(tree: Any) -> Any:
    """The tree as NumPy arrays."""
    return jax.tree.map(np.asarray, tree)
