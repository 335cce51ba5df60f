"""What the cached rows of a split depend on, to the last bit: the name of a cache."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import PIL

import tl_jax
from tl_jax import depth_map, param_tree
from tl_jax.freezing import Plan
from tl_jax.job import Job


def of(job: Job, plan: Plan, variables: Any, role: str) -> dict[str, Any]:
    """All that a split's rows depend on, as JSON.

    Args:
      job: whose rows they are.
      plan: of the phase.
      variables: of the network at its start.
      role: the split.
    """
    config, network, examples = job.config, job.pretrained, job.examples[role]
    module, views = network.module, config.data.views if role == "train" else None
    return {
        "weights": _prefix_sha256(job, plan, variables),
        "network": repr((network.family.model_type, module.options, module.head.last_blocks)),
        "sees": repr(module.head.input),
        "adapters": repr(plan.adapters),
        "boundary": plan.boundary,
        "dtype": [str(jnp.dtype(module.dtype)), module.precision],
        "preprocessing": repr(network.preprocessing),
        "data": [examples.name, examples.version, examples.split, examples.fingerprint],
        "image_shape": examples.image_shape,  # whether the host resizes, for one
        # In other batches a row may differ in its last bits.
        "batch": [
            config.data.batch_size,
            config.train.gradient_accumulation,
            jax.device_count(),
        ],
        "views": None if views is None else [config.data.augmentation, views, config.seed],
        "software": [
            tl_jax.__version__,
            PIL.__version__,
            flax.__version__,
            jax.__version__,
            jaxlib.__version__,
            jax.default_backend(),
            jax.devices()[0].device_kind,
        ],
        "processor": _processor(),
    }


def _processor() -> list[Any]:
    """What the last bits depend on: XLA's flags, and a CPU's instructions and cores."""
    apart = ("--xla_force_host_platform_device_count", "--xla_dump")  # counted above; no bits
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(apart)]
    if jax.default_backend() != "cpu":
        return [sorted(flags)]
    instructions = platform.processor()
    with contextlib.suppress(OSError):  # Linux names them all
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line for line in lines if line.startswith(("flags", "Features"))]
        instructions = named[0] if named else instructions
    asked = getattr(os, "sched_getaffinity", None)
    cores = len(asked(0)) if asked else os.cpu_count()
    return [hashlib.sha256(instructions.encode()).hexdigest(), cores, sorted(flags)]


def _prefix_sha256(job: Job, plan: Plan, variables: Any) -> str:
    """Of every parameter and statistic below the boundary: path, dtype, shape and bytes."""
    chain, digest = job.pretrained.chain, hashlib.sha256()
    blocks = {p.path: p.block for p in plan.parameters}
    for name in ("params", "batch_stats"):
        for path, leaf in param_tree.flatten(variables.get(name, {})).items():
            block = blocks[path] if path in blocks else depth_map.block_of(path, chain)
            if block < plan.boundary:
                array = np.ascontiguousarray(leaf)
                digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
                digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
