"""The figures of the running training: losses, rates and times, read once per logging interval."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from tl_jax.errors import RunFailed

# With more queued steps JAX 0.10 can abort a process that has several virtual CPU devices.
_MAX_QUEUED_STEPS = 64


class Meter:
    """Collects what each step returns without waiting for it, and keeps the time.

    Args:
      batch_size: examples a step.
      schedule: learning rate by step.
      started: `time.perf_counter()` when this process began.
      spent: `timing` of the part of the run before it was interrupted.
    """

    def __init__(
        self, batch_size: int, schedule: optax.Schedule, started: float, spent: dict[str, float]
    ):
        self._batch_size, self._schedule = batch_size, schedule
        self._started, self._total = started, spent.get("total_seconds", 0.0)
        self._train = spent.get("train_seconds", 0.0)
        self._wait = spent.get("input_wait_seconds", 0.0)
        self._steps = int(spent.get("timed_steps", 0))
        self._compile = spent.get("compile_seconds", 0.0)
        self._compiled = False
        self._pending: list[tuple[int, Any]] = []
        self._since = time.perf_counter()
        self._steps_since = 0

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time counts as waiting if the device ran dry meanwhile."""
        start = time.perf_counter()
        batch = next(batches)
        newest = self._pending[-1][1]["loss"] if self._pending else None
        if newest is None or newest.is_ready():
            self._wait += time.perf_counter() - start
        return batch

    def run(self, step: Callable, *args: Any) -> Any:
        """Calls the step; its first call compiles and is timed apart."""
        if self._compiled:
            return step(*args)
        start = time.perf_counter()
        result = step(*args)
        seconds = time.perf_counter() - start
        self._compile, self._compiled = self._compile + seconds, True
        self._since += seconds
        return result

    def aside(self, function: Callable, *args: Any) -> Any:
        """Calls a function whose time is none of the training's."""
        start = time.perf_counter()
        result = function(*args)
        self._since += time.perf_counter() - start
        return result

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes what a step returned, without waiting for it."""
        self._pending.append((step, metrics))
        self._steps_since += 1
        if len(self._pending) % _MAX_QUEUED_STEPS == 0 and jax.default_backend() == "cpu":
            jax.block_until_ready(metrics)

    def read(self) -> dict[str, float] | None:
        """Waits for the steps since the last reading and averages over them; None without any.

        Raises:
          RunFailed: a loss or a gradient is not finite; names the step.
        """
        if not self._pending:
            return None
        found = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in found:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise RunFailed(f"{name.replace('_', ' ')} is {float(value)} at step {step}")
        self._pending = []
        now = time.perf_counter()
        seconds, steps = now - self._since, self._steps_since
        self._since, self._steps_since = now, 0
        self._train += seconds
        self._steps += steps
        means = {
            name: float(sum(metrics[name] for _, metrics in found)) / len(found)
            for name in found[0][1]
        }
        last = found[-1][0]
        return {
            **means,
            "learning_rate": float(self._schedule(last - 1)),
            "examples_per_second": steps * self._batch_size / seconds,
        }

    @property
    def timing(self) -> dict[str, float]:
        """Seconds and rates so far, those before an interruption included.

        Training is counted without compilation, validation and checkpoints; the total with them.
        """
        return {
            "compile_seconds": self._compile,
            "train_seconds": self._train,
            "total_seconds": self._total + time.perf_counter() - self._started,
            "input_wait_seconds": self._wait,
            "timed_steps": self._steps,
            "examples_per_second": self._steps * self._batch_size / max(self._train, 1e-9),
            "input_wait_fraction": min(self._wait / max(self._train, 1e-9), 1.0),
        }
