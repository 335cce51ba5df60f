"""Running statistics measured anew: one pass over data with weights that stay as they are.

Each BatchNorm normalises by the batch, and its statistics become the mean over all batches of the
batch's mean and variance, as AdaBN's do (arXiv:1603.04779). The variance is biased, as everywhere
in Flax; PyTorch's `update_bn` takes the unbiased one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # of every BatchNorm: new = 0.9 old + 0.1 of the batch


def make_statistics_step(module: nn.Module, preprocess: Callable, blocks: int) -> Callable:
    """`step(variables, batch)` → tree of the batch's own statistics, the same for every device.

    Args:
      module: with the axis name over which BatchNorm averages.
      preprocess: `preprocess(batch)` → what the network takes.
      blocks: length of the chain.
    """

    def step(variables, batch):
        # From statistics of zero the update leaves exactly 0.1 of the batch's.
        zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        every = range(blocks)
        _, moved = module.apply(
            {**variables, "batch_stats": zeros},
            preprocess(batch),
            last=-1,
            batch_norm=every,
            mutable=["batch_stats"],
        )
        return jax.tree.map(lambda x: x / (1.0 - MOMENTUM), moved["batch_stats"])

    return step


def reestimate(step: Callable, variables: dict[str, Any], batches: Iterable[Any]) -> dict[str, Any]:
    """The variables with statistics that are the mean over the batches of a compiled step's.

    Raises:
      ValueError: there is no batch.
    """
    total, count = None, 0
    for batch in batches:
        found = jax.block_until_ready(step(variables, batch))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += 1
    if total is None:
        raise ValueError("no batch to measure statistics on")
    return {**variables, "batch_stats": jax.tree.map(lambda x: x / count, total)}
