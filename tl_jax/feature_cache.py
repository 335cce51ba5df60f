"""What the frozen prefix yields, computed once: where it is kept, why, and how it gets there.

Below the boundary nothing trains, so what the boundary's block takes is a fixed function of the
image (or of the image and one of a fixed number of views). It runs over each split once, in the
batches and the dtype of the training, and the steps begin at the boundary.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import (
    costs,
    depth_map,
    feature_store,
    input_pipeline,
    memory,
    parallel,
    param_tree,
    prefix,
    stages,
)
from tl_jax.errors import UserError
from tl_jax.feature_store import Layout, Pieces
from tl_jax.freezing import Plan
from tl_jax.input_pipeline import Rows
from tl_jax.job import Job
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage

KINDS = ("off", "device", "host", "disk")
# What "auto" takes at most, and what it must save at least of all computation to be worth it.
DEVICE_SHARE, HOST_SHARE, LEAST_SAVED = 0.25, 0.5, 0.05
SPLITS = ("train", "validation")  # "test" is looked at once

Track = Callable[[Pieces, Layout], Pieces]


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


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rows of a phase.

    Attributes:
      choice: how it gets them.
      rows: by split, "train" and, if there is one, "validation".
      resident: leaves [rows, …] of the training split on every device, None where they are not.
      seconds: that it took, without compilation.
      compile_seconds: of the prefix.
    """

    choice: Choice
    rows: Mapping[str, Rows]
    resident: Any
    seconds: float = 0.0
    compile_seconds: float = 0.0


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
    if wanted != "auto":
        return Choice(wanted, plan.boundary, layouts, f"{at}, as config.cache says")
    epochs, views = (stage.last - stage.first) / job.steps_per_epoch, job.config.data.views or 1
    share = _prefix_share(job, plan)
    saved = share * (1 - views / epochs) if epochs > views else 0.0
    if saved < LEAST_SAVED and not needed:
        why = f"{share:.0%} of a step's computation lies below {plan.blocks[plan.boundary]}"
        why += f", and {views} of {epochs:.2g} epochs would run it all the same"
        return _images(job, stage, why)
    device, host = memory.device_available(), memory.host_available()
    limit = job.config.cache_limit_gb * 1e9
    room = {"device": device * DEVICE_SHARE, "host": host * HOST_SHARE, "disk": limit}
    kind = next((kind for kind, free in room.items() if nbytes <= free), "off")
    kind = KINDS[_first_process_says(KINDS.index(kind))]
    if kind == "off":
        why = f"{at} fit into no memory, nor under config.cache_limit_gb={limit / 1e9:g}"
        return Choice("off", 0, {}, why)
    free = {"device": f"of {_size(device)} free", "host": f"of {_size(host)} free"}
    text = f"{at} {free.get(kind, 'on disk')}; saves {saved:.0%} of the computation"
    return Choice(kind, plan.boundary, layouts, text)


def fill(
    job: Job, stage: Stage, choice: Choice, devices: DataParallel, variables: Any, track: Track
) -> Inputs:
    """Computes, or finds, what was chosen.

    Args:
      job: whose phase it is.
      stage: the phase.
      choice: as `choose` gave it.
      devices: that compute it, sharded.
      variables: of the network at the start of the phase, replicated.
      track: shows how far it is.

    Raises:
      UserError: an image cannot be read, or there is no room for the cache.
    """
    started = time.perf_counter()
    roles = [role for role in SPLITS if role in job.examples]
    rows: dict[str, Rows] = {role: job.rows(role) for role in roles}
    compiling: list[float] = []
    if choice.first:
        run = _compile_prefix(job, stage.plan, devices)
        below = devices.replicate(stages.prefix_of(job, stage)(variables))
        for role, layout in choice.layouts.items():

            def produce(role: str = role, layout: Layout = layout) -> Pieces:
                return track(_run(job, run, devices, below, role, layout, compiling), layout)

            if choice.kind == "disk":
                rows[role] = _shared(job, stage.plan, variables, role, layout, produce)
            else:
                rows[role] = feature_store.in_memory(layout, produce())
    resident = None
    if choice.kind == "device" and not choice.first:
        resident = devices.replicate(_read_images(job, rows["train"]))
    inputs = Inputs(choice, rows, resident)
    if choice.kind == "device":
        inputs = on_devices(inputs, devices)
    took = time.perf_counter() - started - sum(compiling)
    return dataclasses.replace(inputs, seconds=took, compile_seconds=sum(compiling))


def on_devices(inputs: Inputs, devices: DataParallel) -> Inputs:
    """The same with the training split's activations on every device."""
    if inputs.resident is not None:
        return inputs
    train = inputs.rows["train"]
    assert isinstance(train, feature_store.ActivationRows)
    kept = devices.replicate({"activations": train.tree(), "label": train.labels})
    return dataclasses.replace(inputs, resident=kept)


def _obstacle(job: Job, plan: Plan) -> str | None:
    """Why what the prefix yields is no fixed function of the image."""
    data = job.config.data
    if data.augmentation != "none" and data.views is None:
        return (
            f"data.augmentation={data.augmentation} draws anew at each step "
            "(data.views=K draws K times and for all)"
        )
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
    kind = KINDS[_first_process_says(KINDS.index(kind))]
    if kind == "off":
        return Choice("off", 0, {}, f"no prefix: {obstacle}")
    text = f"no prefix: {obstacle}; the images ({_size(layout.nbytes)}) stay on the device"
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


def _prefix_share(job: Job, plan: Plan) -> float:
    """Share of a step's products that are computed below the boundary."""
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


def _compile_prefix(job: Job, plan: Plan, devices: DataParallel) -> Callable:
    def step(below, batch):
        images = job.preprocess(batch)
        found = prefix.apply(job.pretrained.module, plan, below, images), batch["label"]
        # Every process takes all rows, whichever it will need.
        return jax.tree.map(lambda x: jax.lax.all_gather(x, parallel.AXIS, tiled=True), found)

    return devices.compile(step, arguments=1, donate=False)


def _run(
    job: Job,
    run: Callable,
    devices: DataParallel,
    below: Any,
    role: str,
    layout: Layout,
    compiling: list[float],
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Activations and labels of a split, batch by batch, view by view, one behind the device."""

    def take(found: Any, count: int) -> tuple[list[np.ndarray], np.ndarray]:
        activations, labels = jax.device_get(found)
        return [leaf[:count] for leaf in jax.tree.leaves(activations)], labels[:count]

    size = job.config.data.batch_size
    views = job.config.data.views if role == "train" else None
    for view in [None] if views is None else range(views):
        batches = input_pipeline.evaluation_batches(
            job.rows(role),
            batch_size=size,
            view=view,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=job.config.data.threads,
            workers=job.config.data.workers,
        )
        left, pending = layout.examples, None
        for batch in batches:
            started = time.perf_counter()
            found = run(below, devices.shard(batch))
            if not compiling:  # the first call returns when it is compiled, not when it is done
                compiling.append(time.perf_counter() - started)
            if pending is not None:
                yield take(*pending)
            pending, left = (found, min(size, left)), left - size
        assert pending is not None, "a split has an example"
        yield take(*pending)


def _shared(
    job: Job,
    plan: Plan,
    variables: Any,
    role: str,
    layout: Layout,
    produce: Callable[[], Pieces],
) -> Rows:
    """A split's rows on disk; the first process writes them, all compute them."""
    config, key = job.config, _key(job, plan, variables, role)
    source = PurePath(job.pretrained.checkpoint.source).name
    about = f"{layout.name} up to {plan.blocks[plan.boundary]} of {source}"
    limit = config.cache_limit_gb * 1e9

    def on_disk(produce: Callable[[], Pieces]) -> Rows:
        return feature_store.on_disk(config.cache_dir, key, layout, produce, limit, about)

    if jax.process_count() == 1:
        return on_disk(produce)
    there = parallel.is_first() and feature_store.find(config.cache_dir, key, layout) is not None
    if not _first_process_says(int(there)):
        if parallel.is_first():
            on_disk(produce)
        else:
            for _ in produce():  # the first process needs this one's devices
                pass
        _first_process_says(0)  # wait until it is written
    rows = feature_store.find(config.cache_dir, key, layout)
    if rows is None:
        raise UserError(
            f"config.cache_dir: {config.cache_dir} is not the same folder for all processes"
        )
    return rows


def _key(job: Job, plan: Plan, variables: Any, role: str) -> dict[str, Any]:
    """All that the rows depend on."""
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
        "views": None if views is None else [config.data.augmentation, views, config.seed],
        "software": [jax.__version__, jax.default_backend(), jax.devices()[0].device_kind],
    }


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


def _read_images(job: Job, rows: Rows) -> dict[str, np.ndarray]:
    """All images and labels of a split, in order."""
    size = job.config.data.batch_size
    batches: Iterable = input_pipeline.evaluation_batches(
        rows, batch_size=size, threads=job.config.data.threads, workers=job.config.data.workers
    )
    parts = [(batch["image"], batch["label"]) for batch in batches]
    images, labels = (np.concatenate(part)[: len(rows)] for part in zip(*parts, strict=True))
    return {"image": images, "label": labels}


def _first_process_says(number: int) -> int:
    """The first process's number, in every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _rows_text(layouts: Mapping[str, Layout]) -> str:
    return " + ".join(f"{layout.rows:,}" for layout in layouts.values()) + " activations"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
