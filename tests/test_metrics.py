"""The meter of the running training."""

import itertools

import numpy as np
import pytest

from tl_jax import metrics
from tl_jax.metrics import Meter


def test_a_cache_that_is_filled_again_counts_once():
    """Rows in memory are made anew after a kill; the lost start's time is lost, as steps' is."""
    meter = Meter(16, lambda step: 0.1, 1000, 0.0, {})
    meter.filled(0, 2.0, 0.5, 2.0, 0.2, 1.0)
    meter.filled(1, 4.0, 1.0, 4.0, 0.3, 0.0)
    resumed = Meter(16, lambda step: 0.1, 1000, 0.0, meter.position)
    resumed.filled(1, 5.0, 1.5, 1.5, 0.5, 1.0)  # of the rest another run says what it took
    timing = resumed.timing
    assert timing["cache_seconds"] == pytest.approx(7.0)
    assert timing["cache_validation_seconds"] == pytest.approx(2.0)
    assert timing["input_wait_seconds"] == pytest.approx(0.7)
    assert timing["input_wait_fraction"] == pytest.approx(0.2)
    assert timing["compile_seconds"] == pytest.approx(2.0)


def test_waiting_for_the_first_batch_makes_ready_for_it(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    meter = Meter(16, lambda step: 0.1, 1000, 0.0, {})
    meter.expect_compilation()
    batches, waited = iter(range(3)), []
    for step in (1, 2, 3):
        meter.next_batch(batches)
        meter.run(lambda: None)
        meter.add(step, {"loss": np.float32(1.0)})
        meter.read()
        waited.append(meter.timing["input_wait_seconds"])
    assert waited == [0.0, 1.0, 2.0]


def test_training_time_begins_with_the_first_step(monkeypatch):
    """Not with what makes ready for it: schedules, orders, weights on their devices."""
    clock = itertools.count()  # a second passes between any two looks at it
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    meter = Meter(16, lambda step: 0.1, 1000, 0.0, {})
    meter.expect_compilation()
    for _ in range(100):
        metrics.time.perf_counter()
    for step in (1, 2):
        meter.run(lambda: None)
        meter.add(step, {"loss": np.float32(1.0)})
    meter.read()
    assert meter.timing["compile_seconds"] == 1.0
    assert meter.timing["train_seconds"] == 1.0
