"""How certain a sweep's accuracies and their differences are: resampled seeds and test examples.

The accuracies of one strategy form a matrix of hits [seeds, examples], and both margins are
samples: another seed and another test image would both have given another figure. The crossed
("pigeonhole") bootstrap (Owen 2007, doi:10.1214/07-AOAS122) resamples both at once. All
strategies of a setting are resampled with the same weights, so that their differences are paired
in seeds and in examples.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

REPLICATES = 2000
LEVEL = 0.95
_SEED = 20070501
_CHUNK = 16_000_000  # weights held at once

BOTH, EXAMPLES, SEEDS, NONE = "seeds and examples", "examples", "seeds", "none"
UNPAIRED = "no common seed"


@dataclass(frozen=True, eq=False)
class Run:
    """One finished cell.

    Attributes:
      accuracy: on the test split.
      interval: its own 95 % interval (Wilson's), None where unknown.
      replicates: float64 [B], accuracies on resampled test examples; None without hits.
    """

    accuracy: float
    interval: tuple[float, float] | None = None
    replicates: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """Mean accuracy over seeds with its 95 % interval (None where there is none).

    `source` says what was resampled: `BOTH`, `EXAMPLES` (one seed), `SEEDS` (no hits), `NONE`.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    source: str


@dataclass(frozen=True)
class Difference:
    """Accuracy of `one` less that of `other`, over the seeds that both have.

    The interval is simultaneous over all pairs of the setting; `source` as in `Estimate`, or
    `UNPAIRED`: no seed is common to both, and `mean` is of their own means.
    """

    one: str
    other: str
    mean: float
    low: float | None
    high: float | None
    seeds: int
    source: str

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out, and says something of other seeds."""
        if self.low is None or self.high is None or self.seeds < 2:
            return False
        return self.low > 0 or self.high < 0


def example_replicates(hits: np.ndarray) -> np.ndarray:
    """Accuracies on resampled test examples, the same examples for every row.

    Args:
      hits: [R, N] of 0 and 1: runs and test examples.

    Returns:
      float64 [R, B]: row r, replicate b: Σₙ w[b, n] hits[r, n] / N, where w[b] counts N draws with
      replacement. The sums are of whole numbers and exact, whatever the order of the rows.
    """
    hits = np.ascontiguousarray(hits, np.float32)
    rows, examples = hits.shape
    random = np.random.default_rng(_SEED)
    found = np.empty((rows, REPLICATES))
    chunk = max(1, _CHUNK // examples)
    for first in range(0, REPLICATES, chunk):
        size = min(chunk, REPLICATES - first)
        draws = random.integers(0, examples, (size, examples), dtype=np.int32)
        draws += (np.arange(size, dtype=np.int32) * examples)[:, None]
        weights = np.bincount(draws.ravel(), minlength=size * examples)
        weights = weights.reshape(size, examples).astype(np.float32)
        found[:, first : first + size] = (hits @ weights.T).astype(np.float64) / examples
    return found


@functools.cache
def _seed_weights(seeds: int) -> np.ndarray:
    """Float64 [B, S], rows sum to 1: S − 1 draws of S seeds.

    One draw less than there are seeds makes the bootstrap's variance the unbiased one (Rao & Wu
    1988, doi:10.1080/01621459.1988.10478591), which matters for 2 or 3 seeds. One seed is kept.
    """
    if seeds == 1:
        return np.ones((REPLICATES, 1))
    random = np.random.default_rng((_SEED, seeds))
    return random.multinomial(seeds - 1, [1 / seeds] * seeds, REPLICATES) / (seeds - 1)


def estimates(setting: Mapping[str, Mapping[str, Run]]) -> dict[str, Estimate]:
    """Mean accuracies over seeds, a strategy each, with 95 % intervals of their own.

    The interval is the bootstrap's percentiles, stretched about the mean as `compare` stretches
    its own. A single run of a setting without repeated seeds keeps its own interval: only examples
    are resampled then. Where nothing varies (all right, say) it is the widest of the single runs.

    Args:
      setting: runs by strategy and seed.
    """
    tail = (1 - LEVEL) / 2
    normal = NormalDist().inv_cdf(1 - tail)
    pool = _pooled([_accuracies(runs.values()) for runs in setting.values()])
    found = {}
    for name, runs in setting.items():
        chosen = [runs[seed] for seed in sorted(runs)]
        values = _accuracies(chosen)
        mean = float(values.mean())
        own = [run.interval for run in chosen if run.interval is not None]
        low, high = (min(x for x, _ in own), max(x for _, x in own)) if own else (None, None)
        kept = all(run.replicates is not None for run in chosen)
        source = _source(kept, len(chosen), pool)
        replicates = _resampled(_examples(chosen, kept))
        width, spread = _half_width(normal, values, float(replicates.std()), pool)
        if source in (EXAMPLES, NONE) or width < 1e-12:
            found[name] = Estimate(mean, low, high, len(chosen), EXAMPLES if own else NONE)
            continue
        low, high = mean - width, mean + width
        if kept:
            ends = np.quantile(replicates, [tail, 1 - tail]) - mean
            low, high = mean + ends * width / (normal * spread) if spread > 1e-12 else (low, high)
        low, high = max(0.0, float(low)), min(1.0, float(high))
        found[name] = Estimate(mean, low, high, len(chosen), source)
    return found


def compare(setting: Mapping[str, Mapping[str, Run]]) -> list[Difference]:
    """All paired differences of one setting, with simultaneous 95 % intervals.

    For pair p with difference d, replicates d*ᵦ and their standard deviation s, the half width is
    c s, where c is the 95 % quantile over replicates of maxₚ |d*ᵦ − d| / s (single-step max-|t|:
    Westfall & Young 1993; Romano & Wolf 2005, doi:10.1198/016214504000000539). It accounts for
    how strongly the pairs hang together, where Bonferroni would be needlessly wide; and since all
    pairs are covered, so is the best against each other, although data chose the best.

    Two or three seeds say little about how much seeds differ. So what s² has from the seeds, v, is
    taken for no less than the middle one over all pairs, with their common degrees of freedom f
    (those of the residual in a layout of strategies by seeds), and c is exchanged for the quantile
    of Student's t at c's level with f (s² / v)² degrees (Satterthwaite 1946,
    doi:10.2307/3002019). In simulations without this, intervals of all pairs of 3 seeds held
    together in half of the sweeps.

    Without hits only seeds are resampled, and Bonferroni takes the place of c, since replicates of
    two or three numbers have no tails. One seed without hits has no interval.

    Args:
      setting: runs by strategy and seed.

    Returns:
      a difference for each pair, in the order of the strategies; last those that share no seed.
    """
    names = list(setting)
    pairs: list[tuple[str, str, np.ndarray, np.ndarray, bool]] = []
    unpaired: list[Difference] = []
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            if not (shared := sorted(setting[one].keys() & setting[other].keys())):
                own, its = (_accuracies(setting[name].values()).mean() for name in (one, other))
                unpaired.append(Difference(one, other, float(own - its), None, None, 0, UNPAIRED))
                continue
            first, second = ([setting[name][seed] for seed in shared] for name in (one, other))
            kept = all(run.replicates is not None for run in first + second)
            values = _accuracies(first) - _accuracies(second)
            replicates = _resampled(_examples(first, kept) - _examples(second, kept))
            pairs.append((one, other, values, replicates, kept))
    critical = _max_t([(values.mean(), r) for _, _, values, r, kept in pairs if kept])
    bonferroni = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / max(len(pairs), 1))
    runs, seeds = sum(map(len, setting.values())), {s for runs in setting.values() for s in runs}
    pool = _pooled([v for _, _, v, _, _ in pairs], runs - len(names) - len(seeds) + 1)
    found = []
    for one, other, values, replicates, kept in pairs:
        mean, low, high = float(values.mean()), None, None
        source = _source(kept, len(values), pool)
        normal = critical if kept else bonferroni
        width, _ = _half_width(normal, values, float(replicates.std()), pool)
        if kept or width > 1e-12 or (mean == 0 and len(values) > 1):
            low, high = max(-1.0, mean - width), min(1.0, mean + width)
        found.append(Difference(one, other, mean, low, high, len(values), source))
    return found + unpaired


@dataclass(frozen=True)
class _Pool:
    """Variance between single seeds, common to all, and its degrees of freedom."""

    variance: float
    freedom: int


def _pooled(groups: Sequence[np.ndarray], freedom: int | None = None) -> _Pool | None:
    """The middle one of the variances of groups of values a seed.

    Not their mean: a control whose trunk is drawn anew by each seed varies far more than the rest.
    Each is divided by the median of χ²/ν (Wilson & Hilferty 1931, doi:10.1073/pnas.17.12.684).
    """
    repeated = [values for values in groups if len(values) > 1]
    own = sum(len(values) - 1 for values in repeated)
    if freedom is None:
        freedom = own
    if not own or freedom < 1:
        return None
    if len(repeated) < 3:  # there is no middle
        return _Pool(sum(float(v.var()) * len(v) for v in repeated) / own, freedom)
    middle = [v.var(ddof=1) / (1 - 2 / (9 * (len(v) - 1))) ** 3 for v in repeated]
    return _Pool(float(np.median(middle)), freedom)


def _half_width(
    normal: float, values: np.ndarray, spread: float, pool: _Pool | None
) -> tuple[float, float]:
    """Half an interval's width, and the spread that the replicates themselves have.

    Args:
      normal: the quantile that many seeds would have.
      values: [S], one a seed.
      spread: standard deviation of the replicates of their mean.
      pool: None where no seed was repeated.
    """
    if pool is None:
        return normal * spread, spread
    count = len(values)
    own = float(values.var(ddof=1)) / count if count > 1 else 0.0
    seeds = max(own, pool.variance / count)
    variance = spread**2 + seeds - own
    if seeds < 1e-15:
        return normal * spread, spread
    freedom = pool.freedom * max(1.0, variance / seeds) ** 2
    if freedom < 200:
        normal = student_quantile(2 * NormalDist().cdf(-normal), int(freedom))
    return normal * math.sqrt(variance), spread


def _source(kept: bool, seeds: int, pool: _Pool | None) -> str:
    if seeds > 1 or pool is not None:
        return BOTH if kept else SEEDS
    return EXAMPLES if kept else NONE


def _accuracies(runs: Iterable[Run]) -> np.ndarray:
    """Float64 [S]."""
    return np.array([run.accuracy for run in runs])


def _examples(runs: Sequence[Run], kept: bool) -> np.ndarray:
    """Float64 [S, B]: each run's accuracies on resampled examples, or the same one throughout."""
    if kept:
        return np.stack([run.replicates for run in runs if run.replicates is not None])
    return np.repeat([[run.accuracy] for run in runs], REPLICATES, axis=1)


def _resampled(values: np.ndarray) -> np.ndarray:
    """Float64 [B] of [S, B]: means over resampled seeds."""
    return np.einsum("bs,sb->b", _seed_weights(len(values)), values)


def _max_t(pairs: Sequence[tuple[float, np.ndarray]]) -> float:
    """The quantile of the greatest |t| over pairs of (difference, replicates [B])."""
    largest = np.zeros(REPLICATES)
    for mean, replicates in pairs:
        if (spread := replicates.std()) > 1e-12:
            largest = np.maximum(largest, abs(replicates - mean) / spread)
    least = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2)  # of one comparison
    return max(float(np.quantile(largest, LEVEL)), least)


def student_quantile(alpha: float, freedom: int) -> float:
    """t with P(|T| > t) = alpha for Student's T of whole degrees of freedom ≥ 1.

    Bisection on the closed form of Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 2.0
    while 1 - _inside(high, freedom) > alpha:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if 1 - _inside(middle, freedom) > alpha:
            low = middle
        else:
            high = middle
    return high


def _inside(t: float, freedom: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
