"""What several runs of a process share: compiled programs, and rows of activations.

The runs of a sweep differ in learning rates, seeds and rows, all of which are data to a program. So
each program is traced and compiled for the first of them, and the others find it; and what a frozen
prefix made of the same images is computed once.
"""

import collections
import contextlib
import contextvars
import dataclasses
import gc
import json
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import jax

from tl_jax import config as config_lib
from tl_jax.job import Job
from tl_jax.phases import Stage

T = TypeVar("T")

# What runs that share programs may differ in; each is an argument of the programs.
DATA = ("optimizer.learning_rate", "seed", "data.examples_per_class", "data.fraction")
# And what no program of a run is made of.
_ELSEWHERE = ("data.splits", "probe")


class Shelf:
    """What earlier runs left in memory.

    Args:
      nbytes: of rows that are kept, the latest wanted.
      programs: that are kept after a run; where they are more, all are given up, since JAX keeps
        those that nobody asks for.
    """

    def __init__(self, nbytes: float, programs: int):
        self._nbytes, self._limit = nbytes, programs
        self._rows = collections.OrderedDict[str, tuple[int, Any]]()
        self._programs = dict[Hashable, Any]()

    def rows(self, key: str, nbytes: int, make: Callable[[], T]) -> T:
        """The rows of this key, made where they are not there."""
        if key not in self._rows:
            self._rows[key] = nbytes, make()
        self._rows.move_to_end(key)
        while len(self._rows) > 1 and sum(size for size, _ in self._rows.values()) > self._nbytes:
            self._rows.popitem(last=False)
        return self._rows[key][1]

    def programs(self, made_of: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, or gave before."""
        if made_of not in self._programs:
            self._programs[made_of] = make()
        return self._programs[made_of]

    def tidy(self) -> None:
        """Gives the programs up where they are too many."""
        if len(self._programs) > self._limit:
            self._programs.clear()
            jax.clear_caches()
            gc.collect()


_shelf: contextvars.ContextVar[Shelf | None] = contextvars.ContextVar("shelf", default=None)


@contextlib.contextmanager
def through(shelf: Shelf) -> Iterator[None]:
    """Lets a run take from a shelf what it needs, and leave there what it made."""
    token = _shelf.set(shelf)
    try:
        yield
    finally:
        _shelf.reset(token)
        shelf.tidy()


def rows(key: str, nbytes: int, make: Callable[[], T]) -> T:
    """Rows of so many bytes: what `make` gives, or gave to an earlier run."""
    shelf = _shelf.get()
    return make() if shelf is None else shelf.rows(key, nbytes, make)


def programs(made_of: Hashable, make: Callable[[], T]) -> T:
    """Programs: what `make` gives, or gave to an earlier run.

    Args:
      made_of: a name, and all that the programs are made of beside their arguments.
      make: gives the programs.
    """
    shelf = _shelf.get()
    return make() if shelf is None else shelf.programs(made_of, make)


def programs_of(job: Job, stage: Stage | None, name: Hashable, make: Callable[[Job], T]) -> T:
    """`make(job)`, or what it gave for an earlier run that differs in `DATA` alone.

    Args:
      job: the run.
      stage: the phase, where they are of one.
      name: of the programs, with all that they are made of beside job and phase.
      make: gives the programs. It is given the job without its weights, so that nobody keeps them.
    """
    if _shelf.get() is None:
        return make(job)
    made_of = _job_made_of(job), None if stage is None else _stage_made_of(stage), name
    network = dataclasses.replace(job.pretrained, variables={})
    return programs(made_of, lambda: make(dataclasses.replace(job, pretrained=network)))


def _job_made_of(job: Job) -> Hashable:
    config, network = job.config, job.pretrained
    own = (*_ELSEWHERE, *(name for name in DATA if name != "seed" or not config.data.views))
    fields = {
        name: value
        for name, value in config_lib.with_effect(config).items()
        if not any(name == left or name.startswith(f"{left}.") for left in own)
    }
    said = json.dumps([fields, config.parallel, network.config], sort_keys=True, default=str)
    of_one_size = job.examples["train"].image_shape is not None
    return said, network.module, repr(network.preprocessing), of_one_size


def _stage_made_of(stage: Stage) -> Hashable:
    plan = stage.plan
    return repr(
        (
            sorted(plan.groups.items()),
            sorted(plan.entries.items()),
            sorted(plan.statistics),
            (plan.phase, plan.boundary, plan.batch_norm, plan.adapters),
            (dataclasses.replace(stage.config, learning_rate=0.0), stage.clip_norm),
        )
    )
