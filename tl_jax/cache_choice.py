"""How a phase gets its rows: activations at its boundary, kept somewhere; images, kept or streamed.

What the configuration asks for, or what pays; and why, in words.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import config_checks, costs, memory, parallel, param_tree, sharing
from tl_jax.errors import UserError
from tl_jax.feature_rows import Layout
from tl_jax.freezing import Plan
from tl_jax.job import Job
from tl_jax.phases import Stage

KINDS = ("off", "device", "host", "disk")
# What "auto" takes at most, and what it must save at least of all computation to be worth it.
DEVICE_SHARE, HOST_SHARE, LEAST_SAVED = 0.25, 0.5, 0.05
SPLITS = ("train", "validation")  # "test" is looked at once


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a phase gets its rows.

    Attributes:
      kind: one of `KINDS`: "off" streams images from the host.
      first: the block that rows enter: 0 for images, the boundary for activations.
      layouts: what is kept, by split; empty where nothing is.
      reason: one line, for people.
    """

    kind: str
    first: int
    layouts: Mapping[str, Layout]
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(layout.nbytes for layout in self.layouts.values())

    def describe(self) -> dict[str, Any]:
        """As `summary.json` holds it."""
        return {
            "kind": self.kind,
            "first_block": self.first,
            "rows": {role: layout.rows for role, layout in self.layouts.items()},
            "bytes": self.nbytes,
            "reason": self.reason,
        }


def choose(
    job: Job, stage: Stage, *, needed: bool = False, splits: Sequence[str] = SPLITS
) -> Choice:
    """Where the rows of a phase shall be kept: as the configuration says, or as pays.

    Args:
      job: whose phase it is.
      stage: the phase.
      needed: whether "auto" shall keep activations whether that pays or not.
      splits: of which activations are kept.

    Raises:
      UserError: what the configuration asks for cannot be.
    """
    wanted, plan = job.config.cache, stage.plan
    if wanted == "off":
        return Choice("off", 0, {}, "config.cache=off")
    obstacle = _obstacle(job, plan)
    if obstacle and wanted != "auto" and plan.boundary:
        raise UserError(f"config.cache: {wanted!r} cannot be: {obstacle}; leave it at 'auto'")
    if obstacle or not plan.boundary:
        obstacle = obstacle or f"{plan.blocks[0]} trains, so that nothing is frozen below it"
        return _images(job, stage, obstacle)
    layouts = _activations(job, plan, splits)
    nbytes = sum(layout.nbytes for layout in layouts.values())
    at = f"{_rows_text(layouts)} at {plan.blocks[plan.boundary]}, {_size(nbytes)}"
    device, host = memory.device_available(), memory.host_available()
    free = {"device": min(device, host), "host": host}  # rows on a device are on the host, too
    if wanted in free and nbytes > (most := free[wanted]):
        raise UserError(
            f"config.cache: {wanted!r} cannot be: {at}, and {_size(most)} are free; take 'disk', "
            "or leave it at 'auto'"
        )
    if wanted != "auto":
        return Choice(wanted, plan.boundary, layouts, f"{at}, as config.cache says")
    epochs, views = (stage.last - stage.first) / job.steps_per_epoch, job.config.data.views or 1
    share = prefix_share(job, stage)
    saved = share * (1 - views / epochs) if epochs > views else 0.0
    if saved < LEAST_SAVED and not needed:
        why = f"{share:.0%} of a step's computation lies below {plan.blocks[plan.boundary]}"
        why += f", and {views} of {epochs:.2g} epochs would run it all the same"
        return _images(job, stage, why)
    limit, room_host = job.config.cache_limit_gb * 1e9, host * HOST_SHARE
    room = {"device": min(device * DEVICE_SHARE, room_host), "host": room_host, "disk": limit}
    kind = next((kind for kind, free in room.items() if nbytes <= free), "off")
    kind = KINDS[parallel.first_process_says(KINDS.index(kind))]
    if kind == "off":
        why = f"{at} fit into no memory, nor under config.cache_limit_gb={limit / 1e9:g}"
        return Choice("off", 0, {}, why)
    where = {"device": f"of {_size(device)} free", "host": f"of {_size(host)} free"}
    gain = "config.probe needs them" if needed else f"saves {saved:.0%} of the computation"
    text = f"{at} {where.get(kind, 'on disk')}; {gain}"
    return Choice(kind, plan.boundary, layouts, text)


def _obstacle(job: Job, plan: Plan) -> str | None:
    """Why what the prefix yields is no fixed function of the image."""
    if drawn := config_checks.draws_anew(job.config.data):
        return drawn
    if plan.batch_norm == "stats_only":
        return "freeze.batch_norm=stats_only changes what the frozen blocks compute"
    return None


def _images(job: Job, stage: Stage, obstacle: str) -> Choice:
    """No activations are kept; the images are, on the device, if that is asked for or pays."""
    shape = job.examples["train"].image_shape
    if shape is None:
        preprocessing = job.pretrained.preprocessing
        shape = (*preprocessing.output_size, preprocessing.channels)
    count = len(job.examples["train"])
    name = job.rows("train").name
    layout = Layout(name, count, count, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    several = stage.last - stage.first >= 2 * job.steps_per_epoch
    fits = layout.nbytes <= memory.device_available() * DEVICE_SHARE
    kind = "device" if job.config.cache == "device" or (several and fits) else "off"
    if job.config.cache in ("host", "disk"):
        kind = "off"
    if kind == "device" and layout.nbytes > (most := memory.device_available()):
        raise UserError(
            f"config.cache: 'device' cannot be: the images take {_size(layout.nbytes)}, and "
            f"{_size(most)} are free; leave it at 'auto'"
        )
    kind = KINDS[parallel.first_process_says(KINDS.index(kind))]
    if kind == "off":
        return Choice("off", 0, {}, f"no activations: {obstacle}")
    text = f"no activations: {obstacle}; the images ({_size(layout.nbytes)}) stay on the device"
    return Choice("device", 0, {"train": layout}, text)


def _activations(job: Job, plan: Plan, splits: Sequence[str]) -> dict[str, Layout]:
    """What activations at the boundary take, by split."""
    height, width = job.pretrained.preprocessing.output_size
    shape = (1, height, width, job.pretrained.preprocessing.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    module = job.pretrained.module
    found = jax.eval_shape(
        lambda variables, x: module.apply(variables, x, last=plan.boundary),
        job.pretrained.variables,
        images,
    )
    layouts = {}
    for role in splits:
        if role in job.examples:
            count = len(job.examples[role])
            views = (job.config.data.views or 1) if role == "train" else 1
            layouts[role] = Layout(job.rows(role).name, count * views, count, found)
    return layouts


def prefix_share(job: Job, stage: Stage) -> float:
    """Share of a step's products that are computed below a phase's boundary."""
    return sharing.programs_of(job, stage, "prefix share", lambda _: _prefix_share(job, stage.plan))


def _prefix_share(job: Job, plan: Plan) -> float:
    height, width = job.pretrained.preprocessing.output_size
    channels = job.pretrained.preprocessing.channels
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    module, variables = job.pretrained.module, job.pretrained.variables
    trainable, frozen = plan.split_params(variables["params"])

    def forward(trainable, frozen, x):
        params = param_tree.merge(trainable, frozen)
        return module.apply({**variables, "params": params}, x)

    below = costs.product_flops(lambda x: module.apply(variables, x, last=plan.boundary), images)
    whole = costs.product_flops(forward, trainable, frozen, images)
    return below / (whole + costs.gradient_flops(forward, trainable, frozen, images))


def _rows_text(layouts: Mapping[str, Layout]) -> str:
    return " + ".join(f"{layout.rows:,}" for layout in layouts.values()) + " activations"


def _size(nbytes: float) -> str:
    if nbytes < 1e5:
        return f"{nbytes / 1e3:.1f} KB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
