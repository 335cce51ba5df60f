"""The only module that knows about devices: data parallelism and the start of processes.

A per-device function takes replicated trees and its share of the batch, and returns a replicated
result: it has itself reduced over `AXIS` whatever differs between devices. `pmap` and `shard_map`
are two ways to run that same function.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tl_jax.errors import UserError

AXIS = "data"


def start() -> None:
    """Joins the other processes, where the environment says that there are some.

    It says so by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as a Slurm,
    Open MPI or TPU pod job of several processes. Must come before anything asks for devices.
    """
    if jax.distributed.is_initialized():
        return
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            jax.distributed.initialize(
                os.environ["JAX_COORDINATOR_ADDRESS"],
                int(os.environ["JAX_NUM_PROCESSES"]),
                int(os.environ["JAX_PROCESS_ID"]),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set: beside it JAX_NUM_PROCESSES must be a number and "
                f"JAX_PROCESS_ID one from 0 to below it ({type(error).__name__}: {error})"
            ) from error
    elif any(
        int(os.environ.get(name, "1")) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    ) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def first_process_says(number: int) -> int:
    """The first process's number, in every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_batch_size(batch_size: int, micro_batches: int = 1) -> None:
    """A training batch must divide by devices and micro-batches.

    Raises:
      UserError: it does not; names the nearest that do.
    """
    unit = jax.device_count() * micro_batches
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"config.data.batch_size: {batch_size} does not divide by {jax.device_count()} devices"
            + (f" × {micro_batches} micro-batches" if micro_batches > 1 else "")
            + f"; {near} would"
        )


def round_up(batch_size: int) -> int:
    """The next batch size that divides by the devices; for evaluation, which pads."""
    return -(-batch_size // jax.device_count()) * jax.device_count()


class DataParallel:
    """Runs per-device functions over all devices of all processes.

    Args:
      kind: "pmap" or "shard_map".
    """

    def __init__(self, kind: str):
        self.kind = kind
        devices = jax.local_devices() if kind == "pmap" else jax.devices()
        self._mesh = Mesh(np.asarray(devices), (AXIS,))
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))

    def replicate(self, tree: Any) -> Any:
        """The tree on every device, sharded as a step returns it: so that it compiles once."""

        def put(leaf):
            if self.kind == "pmap" or jax.process_count() == 1:
                return jax.device_put(leaf, self._replicated)
            return jax.make_array_from_process_local_data(self._replicated, np.asarray(leaf))

        return jax.tree.map(put, tree)

    def shape(self, tree: Any) -> Any:
        """Shapes and shardings of the replicated tree, as a checkpoint is restored to."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), tree
        )

    def shard(self, batch: Any) -> Any:
        """This process's part of a batch, leaves [b, …], split over its devices."""
        if self.kind == "pmap":
            devices = jax.local_device_count()
            return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._split, x), batch)

    def compile(
        self, function: Callable, arguments: int, *, donate: bool = False, split: bool = False
    ) -> Callable:
        """`function(*replicated, batch)` → replicated, over all devices.

        Args:
          function: runs on one device, reduces over `AXIS` itself.
          arguments: how many replicated trees stand in front of the batch.
          donate: whether the first argument's buffers are given up for the result.
          split: whether the result is a batch, too: each device's share, not reduced.
        """
        donated = (0,) if donate else ()
        if self.kind == "pmap":
            axes, out = (None,) * arguments + (0,), 0 if split else None
            return jax.pmap(function, AXIS, in_axes=axes, out_axes=out, donate_argnums=donated)
        everywhere, parts = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=(everywhere,) * arguments + (parts,),
            out_specs=parts if split else everywhere,
            # With the check on, the gradient of a replicated input is summed over devices, and
            # the step's own pmean on top would silently give n times the gradient.
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)


def replicas_agree(tree: Any) -> bool:
    """Whether each local device holds the same bits of every leaf."""
    for leaf in jax.tree.leaves(tree):
        first, *others = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        if any(first.tobytes() != other.tobytes() for other in others):
            return False
    return True
