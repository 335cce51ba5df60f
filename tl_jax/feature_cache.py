"""What the frozen prefix yields, computed once and kept where it was chosen to be.

Below the boundary nothing trains, so what the boundary's block takes is a fixed function of the
image (or of the image and one of a fixed number of views). It runs over each split once, in the
batches and the dtype of the training, and the steps begin at the boundary.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from tl_jax import (
    cache_folder,
    feature_key,
    feature_rows,
    feature_store,
    input_pipeline,
    lockstep,
    parallel,
    sharing,
    stages,
)
from tl_jax.cache_choice import SPLITS, Choice
from tl_jax.errors import UserError
from tl_jax.feature_rows import ActivationRows, Layout, Pieces
from tl_jax.freezing import Plan
from tl_jax.input_pipeline import Rows
from tl_jax.job import Job
from tl_jax.parallel import DataParallel
from tl_jax.phases import Stage

Track = Callable[[Pieces, Layout], Pieces]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rows of a phase.

    Attributes:
      choice: how it gets them.
      rows: by split, "train" and, if there is one, "validation".
      resident: leaves [rows, …] of the training split on every device, None where they are not.
      seconds: that it took, without compilation; by an earlier run, where that shared its rows.
      unseen_seconds: of these, those of splits that nothing is trained on.
      watched_seconds: of these, those that this process saw go by.
      wait_seconds: of those, the ones in which the devices waited for images.
      compile_seconds: of the prefix.
    """

    choice: Choice
    rows: Mapping[str, Rows]
    resident: Any
    seconds: float = 0.0
    unseen_seconds: float = 0.0
    watched_seconds: float = 0.0
    wait_seconds: float = 0.0
    compile_seconds: float = 0.0


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
    make_ready = _Compiling(stages.prefix_of(job, stage))
    spent: dict[str, float] = {}  # seconds by split, whichever run it was that spent them
    watched, waits = 0.0, list[float]()
    run = _Compiling(
        sharing.programs_of(job, stage, "cache", lambda job: _prefix_step(job, stage, devices))
    )
    if choice.first:
        below = devices.replicate(make_ready(variables))
        begun = time.perf_counter()
        for role, layout in choice.layouts.items():

            def produce(role: str = role, layout: Layout = layout) -> Pieces:
                return track(_run(job, run, devices, below, role, layout, waits), layout)

            keep = _shared if choice.kind == "disk" else _kept
            timed = _Timed(produce, run)
            found = keep(job, stage.plan, variables, role, layout, timed)
            rows[role], spent[role] = found, found.seconds
            watched += found.seconds if timed.ran else 0.0
        started += time.perf_counter() - begun  # leaves out waiting for others, too
    resident = None
    if choice.kind == "device" and not choice.first:
        resident = devices.replicate(_read_images(job, rows["train"]))
    inputs = Inputs(choice, rows, resident)
    if choice.kind == "device":
        inputs = on_devices(inputs, devices)
    rest = time.perf_counter() - started - make_ready.seconds
    return dataclasses.replace(
        inputs,
        seconds=rest + sum(spent.values()),
        unseen_seconds=sum(took for role, took in spent.items() if role != "train"),
        watched_seconds=watched,
        wait_seconds=sum(waits),
        compile_seconds=make_ready.seconds + run.seconds,
    )


def with_room(
    job: Job, stage: Stage, choice: Choice, variables: Any, *, needed: bool = False
) -> Choice:
    """The choice; or nothing kept, where "auto" took a disk that has no room.

    Args:
      job: whose phase it is.
      stage: the phase.
      choice: as `choose` gave it.
      variables: of the network at the start of the phase.
      needed: as `choose` took it.

    Raises:
      UserError: there is no room, and the configuration asks for a disk, or the rows are needed.
    """
    problem = _room_problem(job, [(stage, choice)], variables)
    if not problem:
        return choice
    if needed or job.config.cache != "auto":
        raise UserError(problem)
    return without(problem)


def check_room(job: Job, choices: Sequence[tuple[Stage, Choice]], variables: Any) -> None:
    """Refuses caches for which a disk has no room, before the first of them is computed.

    Args:
      job: whose phases they are.
      choices: of the phases that are still to come.
      variables: of the network at the start.

    Raises:
      UserError: not all of them fit where the configuration asks for a disk.
    """
    if job.config.cache == "disk" and (problem := _room_problem(job, choices, variables)):
        raise UserError(problem)


def _room_problem(job: Job, choices: Sequence[tuple[Stage, Choice]], variables: Any) -> str:
    """Why a disk cannot hold all of these, "" where it can: what the first process says."""
    config, problem = job.config, ""
    kept = [(stage, choice) for stage, choice in choices if choice.kind == "disk"]
    if not kept:
        return ""
    if parallel.is_first():
        caches, about = {}, []
        for stage, choice in kept:
            about.append(_about(job, stage.plan, " + ".join(choice.layouts)))
            for role, layout in choice.layouts.items():
                key = feature_key.of(job, stage.plan, variables, role)
                caches[feature_store.name_of(key)] = key, layout
        limit = config.cache_limit_gb * 1e9
        try:
            feature_store.check_room(
                config.cache_dir, list(caches.values()), limit, "; ".join(about)
            )
        except cache_folder.NoRoom as error:
            problem = str(error)
    if not parallel.first_process_says(bool(problem)):
        return ""
    return problem or "config.cache_dir: the first process has no room there"


def without(problem: str) -> Choice:
    """Nothing kept, since the disk has no room."""
    return Choice("off", 0, {}, f"no room on disk: {problem.splitlines()[0].rstrip(':')}")


def on_devices(inputs: Inputs, devices: DataParallel) -> Inputs:
    """The same with the training split's activations on every device."""
    if inputs.resident is not None:
        return inputs
    train = inputs.rows["train"]
    assert isinstance(train, feature_rows.ActivationRows)
    kept = devices.replicate({"activations": train.tree(), "label": train.labels})
    return dataclasses.replace(inputs, resident=kept)


def _kept(
    job: Job,
    plan: Plan,
    variables: Any,
    role: str,
    layout: Layout,
    produce: "_Timed",
) -> ActivationRows:
    """A split's rows in memory, made by this run or an earlier one."""
    key = json.dumps(feature_key.of(job, plan, variables, role), sort_keys=True)
    return sharing.rows(key, layout.nbytes, lambda: feature_rows.in_memory(layout, produce))


class _Compiling:
    """A function that compiles when it is called first, and the seconds that this took.

    The first call returns when the program is compiled, not when it is done.
    """

    def __init__(self, function: Callable):
        self._function, self._called, self.seconds = function, False, 0.0

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        found = self._function(*arguments)
        if not self._called:
            self._called, self.seconds = True, time.perf_counter() - started
        return found


class _Timed:
    """What gives rows, and `seconds()` since it began to, without compilation."""

    def __init__(self, produce: Callable[[], Pieces], run: _Compiling):
        self._produce, self._run, self.ran = produce, run, False
        self._started, self._compiled = time.perf_counter(), run.seconds

    def __call__(self) -> Pieces:
        self._started, self._compiled = time.perf_counter(), self._run.seconds
        self.ran = True
        return self._produce()

    def seconds(self) -> float:
        return time.perf_counter() - self._started - (self._run.seconds - self._compiled)


def _prefix_step(job: Job, stage: Stage, devices: DataParallel) -> Callable:
    below_of = stages.below_step(job, stage)

    def step(below, batch):
        found = below_of(below, batch, None)
        found = found["activations"], found["label"]
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
    waits: list[float],
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Activations and labels of a split, batch by batch, view by view, one behind the device.

    `waits` is told for how long the device had nothing to do before each batch.
    """

    def take(found: Any, count: int) -> tuple[list[np.ndarray], np.ndarray]:
        activations, labels = jax.device_get(found)
        return [leaf[:count] for leaf in jax.tree.leaves(activations)], labels[:count]

    size = job.config.data.batch_size
    views = job.config.data.views if role == "train" else None
    for view in [None] if views is None else range(views):
        batches = input_pipeline.all_batches(job.rows(role), job.config.data, view=view)
        left, pending = layout.examples, None
        asked = time.perf_counter()
        for batch in batches:
            if pending is None or pending[0][1].is_ready():
                waits.append(time.perf_counter() - asked)
            found = run(below, devices.shard(batch))
            if pending is not None:
                yield take(*pending)
            pending, left = (found, min(size, left)), left - size
            asked = time.perf_counter()
        assert pending is not None, "a split has an example"
        yield take(*pending)


def _shared(
    job: Job,
    plan: Plan,
    variables: Any,
    role: str,
    layout: Layout,
    produce: _Timed,
) -> ActivationRows:
    """A split's rows on disk; the first process writes them, all compute them."""
    config, key = job.config, feature_key.of(job, plan, variables, role)
    about, limit = _about(job, plan, layout.name), config.cache_limit_gb * 1e9

    def on_disk(produce: feature_rows.Produce) -> ActivationRows:
        return feature_store.on_disk(config.cache_dir, key, layout, produce, limit, about)

    if jax.process_count() == 1:
        return on_disk(produce)
    if parallel.is_first():
        lockstep.lead(on_disk, produce)
    else:
        lockstep.follow(produce)
    rows = feature_store.find(config.cache_dir, key, layout)
    if rows is None:
        raise UserError(
            f"config.cache_dir: {config.cache_dir} is not the same folder for all processes"
        )
    return rows


def _about(job: Job, plan: Plan, what: str) -> str:
    source = PurePath(job.pretrained.checkpoint.source).name
    return f"{what} up to {plan.blocks[plan.boundary]} of {source}"


def _read_images(job: Job, rows: Rows) -> dict[str, np.ndarray]:
    """All images and labels of a split, in order."""
    size = job.config.data.batch_size
    batches: Iterable = input_pipeline.evaluation_batches(
        rows, batch_size=size, threads=job.config.data.threads, workers=job.config.data.workers
    )
    parts = [(batch["image"], batch["label"]) for batch in batches]
    images, labels = (np.concatenate(part)[: len(rows)] for part in zip(*parts, strict=True))
    return {"image": images, "label": labels}
