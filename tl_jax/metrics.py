"""The figures of the running training: losses, rates and times, read once per logging interval."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tl_jax.errors import NotFinite

# With more queued steps JAX 0.10 can abort a process that has several virtual CPU devices.
_MAX_QUEUED_STEPS = 64


class Meter:
    """Collects what each step returns without waiting for it, and keeps the time.

    Args:
      batch_size: examples a step.
      learning_rate: by step, from 1 on.
      every: steps in a logging interval.
      started: `time.perf_counter()` when this process began.
      spent: `position` of the part of the run before it was interrupted.
    """

    def __init__(
        self,
        batch_size: int,
        learning_rate: Callable[[int], float],
        every: int,
        started: float,
        spent: dict[str, Any],
    ):
        self._batch_size, self._learning_rate = batch_size, learning_rate
        self._every = every
        self._started, self._total = started, spent.get("total_seconds", 0.0)
        self._train = spent.get("train_seconds", 0.0)
        self._wait = spent.get("input_wait_seconds", 0.0)
        self._steps = int(spent.get("timed_steps", 0))
        self._compile = spent.get("compile_seconds", 0.0)
        self._filled = {
            phase: [*row, 0.0, 0.0][:4] for phase, row in spent.get("filled", {}).items()
        }
        self._compiled = False
        self._pending: list[tuple[int, Any]] = []
        self._interval, self._epoch = Mean(spent.get("interval")), Mean(spent.get("epoch"))
        self._since = time.perf_counter()

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time counts as waiting if the device ran dry meanwhile.

        That of the first step makes ready for it, as its compilation does.
        """
        start = time.perf_counter()
        batch = next(batches)
        newest = self._pending[-1][1]["loss"] if self._pending else None
        if self._compiled if newest is None else newest.is_ready():
            self._wait += time.perf_counter() - start
        return batch

    def expect_compilation(self) -> None:
        """The next step is the first of its kind."""
        self._compiled = False

    def run(self, step: Callable, *args: Any) -> Any:
        """Calls the step; the first call of a kind compiles and is timed apart.

        What made ready for it is no training either.
        """
        if self._compiled:
            return step(*args)
        start = time.perf_counter()
        result = step(*args)
        end = time.perf_counter()
        self._compile, self._compiled = self._compile + end - start, True
        self._since = self._since + end - start if self._pending else end
        return result

    def aside(self, function: Callable, *args: Any) -> Any:
        """Calls a function whose time is none of the training's."""
        start = time.perf_counter()
        result = function(*args)
        self._since += time.perf_counter() - start
        return result

    def filled(
        self,
        phase: int,
        seconds: float,
        unseen_seconds: float,
        watched_seconds: float,
        wait_seconds: float,
        compile_seconds: float,
    ) -> None:
        """Takes the time that a phase's cache took; see `feature_cache.Inputs`.

        It is none of the training's. That of an interrupted start, which is lost, does not count.
        """
        self._filled[str(phase)] = [seconds, unseen_seconds, watched_seconds, wait_seconds]
        self._compile += compile_seconds

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes what a step returned, without waiting for it."""
        self._pending.append((step, metrics))
        if len(self._pending) % _MAX_QUEUED_STEPS == 0 and jax.default_backend() == "cpu":
            jax.block_until_ready(metrics)

    def add_all(self, first: int, metrics: dict[str, jax.Array], count: int) -> None:
        """Takes what `count` steps from `first` on returned: arrays [≥ count]; waits for them."""
        host = jax.device_get(metrics)
        rows = [{name: value[i] for name, value in host.items()} for i in range(count)]
        self._pending += [(first + i, row) for i, row in enumerate(rows)]

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for the steps so far and takes their figures.

        Returns:
          For each logging interval that ended with one of them: its last step and its means.

        Raises:
          NotFinite: a loss or a gradient is not finite; names the step.
        """
        read = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        if read:
            now = time.perf_counter()
            self._train += now - self._since
            self._steps += len(read)
            self._pending, self._since = [], now
        ended = []
        for step, metrics in read:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise NotFinite(f"{name.replace('_', ' ')} is {float(value)} at step {step}")
            self._interval.add(metrics)
            self._epoch.add(metrics)
            if step % self._every == 0:
                ended.append((step, self._take(self._interval, step)))
        return ended

    def epoch(self, step: int) -> dict[str, float]:
        """Means over the epoch that ended at `step`, after `read`."""
        return self._take(self._epoch, step)

    def _take(self, mean: "Mean", step: int) -> dict[str, float]:
        means = mean.take()
        return {
            **means,
            "learning_rate": self._learning_rate(step),
            "examples_per_second": self.timing["examples_per_second"],
        }

    @property
    def timing(self) -> dict[str, float]:
        """Seconds and rates so far, those before an interruption included.

        Training is counted without compilation, validation and checkpoints; the total with them.
        The share of waiting is one of training and of filling caches.
        """
        filled = zip((0.0, 0.0, 0.0, 0.0), *self._filled.values(), strict=True)
        cache, unseen, watched, waited = (sum(each) for each in filled)
        busy, wait = self._train + watched, self._wait + waited
        return {
            "compile_seconds": self._compile,
            "train_seconds": self._train,
            "cache_seconds": cache,
            "cache_validation_seconds": unseen,
            "total_seconds": self._total + time.perf_counter() - self._started,
            "input_wait_seconds": wait,
            "timed_steps": self._steps,
            "examples_per_second": self._steps * self._batch_size / max(self._train, 1e-9),
            "input_wait_fraction": min(wait / max(busy, 1e-9), 1.0),
        }

    @property
    def position(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        sums = {"interval": self._interval.sums, "epoch": self._epoch.sums}
        own = {"input_wait_seconds": self._wait}  # that of caches is in "filled"
        return {**self.timing, **own, **sums, "filled": dict(self._filled)}


class Mean:
    """Running means of named figures.

    Args:
      sums: those of an interrupted run, with their `count`.
    """

    def __init__(self, sums: dict[str, float] | None = None):
        self.sums = dict(sums or {"count": 0})

    def add(self, figures: dict[str, Any]) -> None:
        """Takes the figures of one step."""
        self.sums["count"] += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def take(self) -> dict[str, float]:
        """The means and the number of steps, and starts again."""
        count = self.sums.pop("count")
        means = {name: value / count for name, value in self.sums.items()}
        self.sums = {"count": 0}
        return {**means, "steps": int(count)}
