"""The meter of the running training."""

import pytest

from tl_jax.metrics import Meter


def test_a_cache_that_is_filled_again_counts_once():
    """Rows in memory are made anew after a kill; the lost start's time is lost, as steps' is."""
    meter = Meter(16, lambda step: 0.1, 1000, 0.0, {})
    meter.filled(0, 2.0, 0.5, 1.0)
    meter.filled(1, 4.0, 1.0, 0.0)
    resumed = Meter(16, lambda step: 0.1, 1000, 0.0, meter.position)
    resumed.filled(1, 5.0, 1.5, 1.0)
    timing = resumed.timing
    assert timing["cache_seconds"] == pytest.approx(7.0)
    assert timing["cache_validation_seconds"] == pytest.approx(2.0)
    assert timing["compile_seconds"] == pytest.approx(2.0)
