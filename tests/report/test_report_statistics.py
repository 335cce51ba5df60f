"""The intervals: small cases by hand, and coverage where the truth is known."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from tl_jax.report import statistics
from tl_jax.report.statistics import BOTH, EXAMPLES, NONE, SEEDS, UNPAIRED, Run


def setting_of(hits, interval=None):
    """Runs by strategy and seed, of hits [strategies, seeds, examples]."""
    hits = np.asarray(hits)
    rows = statistics.example_replicates(hits.reshape(-1, hits.shape[-1]))
    rows = rows.reshape(*hits.shape[:2], -1)
    return {
        f"s{k}": {
            str(s): Run(float(hits[k, s].mean()), interval, rows[k, s])
            for s in range(hits.shape[1])
        }
        for k in range(hits.shape[0])
    }


def without_hits(*rows):
    """Runs by strategy and seed, of accuracies only."""
    return {f"s{k}": {str(s): Run(x) for s, x in enumerate(row)} for k, row in enumerate(rows)}


def simulated(random, strategies, seeds, examples, seed_spread):
    """Hits of a latent-normal model, and each strategy's true accuracy.

    A hit is: example's ease (its own and with the strategy) + strategy + seed + noise > 0.
    """
    better = random.normal(0, 0.1, strategies)
    ease = random.normal(1, 1.5, examples) + random.normal(0, 0.5, (strategies, 1, examples))
    seed = random.normal(0, seed_spread, (strategies, seeds, 1))
    noise = random.normal(0, 0.5, (strategies, seeds, examples))
    spread = np.sqrt(1.5**2 + 0.5**2 + 0.5**2 + seed_spread**2)
    truth = [NormalDist().cdf((1 + b) / spread) for b in better]
    return ease + better[:, None, None] + seed + noise > 0, truth


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (2, 0.1), (3, 0.03), (5, 0.1)])
def test_intervals_cover_the_truth(monkeypatch, seeds, spread):
    monkeypatch.setattr(statistics, "REPLICATES", 300)
    statistics._seed_weights.cache_clear()
    random, sweeps, strategies = np.random.default_rng(seeds), 60, 5
    held = means = 0
    for _ in range(sweeps):
        hits, truth = simulated(random, strategies, seeds, 600, spread)
        setting = setting_of(hits, interval=(0.0, 1.0))
        held += all(
            d.low <= truth[int(d.one[1:])] - truth[int(d.other[1:])] <= d.high
            for d in statistics.compare(setting)
        )
        estimates = statistics.estimates(setting)
        means += sum(
            estimates[f"s{k}"].low <= truth[k] <= estimates[f"s{k}"].high for k in range(5)
        )
    statistics._seed_weights.cache_clear()
    assert held / sweeps >= 0.9  # of all ten pairs at once
    assert means / sweeps / strategies >= 0.9


def test_replicates_are_means_of_drawn_examples():
    hits = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    rows = statistics.example_replicates(hits)
    assert rows.shape == (3, statistics.REPLICATES)
    assert set(np.unique(rows[0])) <= {0, 0.25, 0.5, 0.75, 1}
    assert not rows[1].any() and (rows[2] == 1).all()
    # Variance of a mean of 4 draws with replacement: 3/4 × 1/4 / 4.
    assert rows[0].mean() == pytest.approx(0.75, abs=0.02)
    assert rows[0].var() == pytest.approx(3 / 64, rel=0.1)


def test_the_same_examples_for_every_row_whatever_is_beside_it():
    hits = np.random.default_rng(0).integers(0, 2, (5, 37))
    rows = statistics.example_replicates(hits)
    assert (statistics.example_replicates(hits[[3]])[0] == rows[3]).all()
    np.testing.assert_allclose(statistics.example_replicates(1 - hits), 1 - rows, atol=1e-12)


def test_chunks_do_not_matter(monkeypatch):
    hits = np.random.default_rng(0).integers(0, 2, (2, 50))
    rows = statistics.example_replicates(hits)
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 2000)
    assert (statistics.example_replicates(hits) == rows).all()


def test_resampled_seeds_have_the_unbiased_variance():
    values = np.array([0.1, 0.2, 0.6])
    means = statistics._resampled(np.repeat(values[:, None], statistics.REPLICATES, axis=1))
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.1)


def test_seeds_alone_give_students_interval():
    (difference,) = statistics.compare(without_hits([0.8, 0.9, 0.85], [0.7, 0.75, 0.8]))
    values = np.array([0.1, 0.15, 0.05])
    # The replicates' variance is that of their draws, within a few per cent of the exact one.
    width = 4.303 * values.std(ddof=1) / np.sqrt(3)
    assert difference.mean == pytest.approx(0.1)
    assert difference.high - difference.mean == pytest.approx(width, rel=0.1)
    assert difference.source == SEEDS and not difference.certain


def test_equal_cells_cannot_be_told_apart():
    hits = np.random.default_rng(1).integers(0, 2, (1, 3, 100))
    (difference,) = statistics.compare(setting_of(np.concatenate([hits, hits])))
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not difference.certain


def test_a_clear_difference_is_certain():
    random = np.random.default_rng(1)
    hits = random.random((2, 3, 1000)) < np.array([0.9, 0.7])[:, None, None]
    (difference,) = statistics.compare(setting_of(hits))
    assert difference.certain and difference.low > 0.1 and difference.source == BOTH


def test_pairing_narrows_the_interval():
    random = np.random.default_rng(2)
    easy = random.random(1000) < 0.7
    flips = random.random((2, 2, 1000)) < 0.02
    paired = statistics.compare(setting_of(easy ^ flips))[0]
    apart = statistics.compare(setting_of(random.random((2, 2, 1000)) < 0.7))[0]
    assert paired.high - paired.low < (apart.high - apart.low) / 2


def test_more_pairs_are_wider():
    hits = np.random.default_rng(3).random((6, 3, 400)) < 0.8
    two, all_six = setting_of(hits[:2]), setting_of(hits)
    few = statistics._max_t([(0, r) for r in _differences(two)])
    many = statistics._max_t([(0, r) for r in _differences(all_six)])
    assert 1.95 < few < many < 3.5


def _differences(setting):
    rows = [statistics._examples(list(runs.values()), True).mean(0) for runs in setting.values()]
    return [a - b - (a - b).mean() for a, b in itertools.combinations(rows, 2)]


def test_names_and_their_order_change_nothing():
    hits = np.random.default_rng(4).random((4, 3, 200)) < 0.8
    setting = setting_of(hits)
    plain = {frozenset((d.one, d.other)): d for d in statistics.compare(setting)}
    turned = {name: setting[name] for name in reversed(setting)}
    for d in statistics.compare(turned):
        other = plain[frozenset((d.one, d.other))]
        sign = 1 if d.one == other.one else -1
        ends = (other.low, other.high) if sign == 1 else (-other.high, -other.low)
        assert d.mean == pytest.approx(sign * other.mean, abs=1e-12)
        assert (d.low, d.high) == pytest.approx(ends, abs=1e-12)
    renamed = {f"other {name}": runs for name, runs in setting.items()}
    estimates = statistics.estimates(setting)
    for name, estimate in statistics.estimates(renamed).items():
        assert estimate == estimates[name.removeprefix("other ")]


def test_one_seed_is_not_certain_whatever_others_say_of_seeds():
    """A pool of the spread between seeds makes intervals, not certainty."""
    hits = np.random.default_rng(0).random((3, 4, 400)) < np.array([0.9, 0.9, 0.2])[:, None, None]
    setting = setting_of(hits)
    for seed in ("0", "2", "3"):
        del setting["s2"][seed]
    for difference in statistics.compare(setting):
        assert difference.certain == (difference.seeds > 1 and abs(difference.mean) > 0.3)
        assert difference.low is not None
    assert {d.seeds for d in statistics.compare(setting)} == {1, 4}


def test_only_shared_seeds_are_compared():
    setting = setting_of(np.random.default_rng(5).random((2, 3, 50)) < 0.8)
    del setting["s0"]["1"], setting["s1"]["2"]
    (difference,) = statistics.compare(setting)
    expected = setting["s0"]["0"].accuracy - setting["s1"]["0"].accuracy
    assert difference.seeds == 1 and difference.mean == pytest.approx(expected)
    del setting["s0"]["0"]
    (difference,) = statistics.compare(setting)
    assert (difference.seeds, difference.low, difference.source) == (0, None, UNPAIRED)
    assert not difference.certain


def test_one_seed_resamples_examples_only():
    setting = setting_of(np.random.default_rng(6).random((2, 1, 200)) < 0.8, interval=(0.7, 0.9))
    assert statistics.compare(setting)[0].source == EXAMPLES
    assert not statistics.compare(setting)[0].certain  # of other seeds it says nothing
    estimate = statistics.estimates(setting)["s0"]
    assert (estimate.low, estimate.high, estimate.source) == (0.7, 0.9, EXAMPLES)


def test_one_seed_without_hits_has_no_interval():
    setting = without_hits([0.8], [0.5])
    (difference,) = statistics.compare(setting)
    assert (difference.low, difference.high, difference.source) == (None, None, NONE)
    assert not difference.certain
    estimate = statistics.estimates(setting)["s0"]
    assert (estimate.low, estimate.high, estimate.source) == (None, None, NONE)


def test_two_seeds_that_agree_by_chance_prove_nothing():
    (difference,) = statistics.compare(without_hits([0.8, 0.7], [0.75, 0.65]))
    assert not difference.certain


def test_all_right_keeps_the_runs_own_interval():
    setting = setting_of(np.ones((1, 3, 20), int), interval=(0.84, 1.0))
    estimate = statistics.estimates(setting)["s0"]
    assert (estimate.mean, estimate.low, estimate.high) == (1, 0.84, 1.0)


def test_intervals_stay_between_0_and_1():
    hits = np.ones((2, 2, 20), int)
    hits[0, 0, :2] = 0
    estimate = statistics.estimates(setting_of(hits))["s0"]
    assert 0 <= estimate.low < estimate.mean < estimate.high <= 1


@pytest.mark.parametrize(
    ("alpha", "freedom", "quantile"),
    [
        (0.05, 1, 12.706),
        (0.05, 2, 4.303),
        (0.05, 3, 3.182),
        (0.05, 4, 2.776),
        (0.01, 5, 4.032),
        (0.001, 10, 4.587),
        (0.05, 120, 1.980),
    ],
)
def test_students_quantiles_are_those_of_the_tables(alpha, freedom, quantile):
    assert statistics.student_quantile(alpha, freedom) == pytest.approx(quantile, abs=5e-4)


def test_eighteen_strategies_take_seconds():
    hits = np.random.default_rng(7).random((18, 3, 2000)) < 0.8
    assert len(statistics.compare(setting_of(hits))) == 153
