"""What a sweep found, in numbers: the one source of every figure, table and sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tl_jax.report import statistics
from tl_jax.report.cells import Cell, Json, Setting, Sweep, mean
from tl_jax.report.statistics import Difference, Estimate, Run
from tl_jax.report.words import finite

# Columns whose means over seeds are a strategy's cost, and the first of them that is the dearness.
COSTS = ("training_flops", "training_seconds", "trainable_parameters")


@dataclass(frozen=True, eq=False)
class Standing:
    """One strategy in one setting.

    Attributes:
      accuracy: its mean over seeds.
      means: of every number of its cells, over the seeds that have it.
      cells: the finished ones.
      on_front: whether no other strategy of the setting has at least its accuracy for fewer FLOPs.
    """

    strategy: str
    accuracy: Estimate
    means: Mapping[str, float | None]
    cells: Sequence[Cell]
    on_front: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """One setting: its strategies from the best down, and all paired differences.

    `differences` are turned so that the better one comes first, over the seeds that both have.
    """

    setting: Setting
    standings: Sequence[Standing]
    differences: Sequence[Difference]

    @property
    def best(self) -> Standing:
        """The strategy with the highest mean accuracy."""
        return self.standings[0]

    @property
    def tried(self) -> dict[int, list[str]]:
        """By the most settings that validation chose from, the strategies that had so many."""
        found: dict[int, list[str]] = {}
        for standing in self.standings:
            most = max(cell.tried for cell in standing.cells)
            found.setdefault(most, []).append(standing.strategy)
        return dict(sorted(found.items()))

    def standing(self, strategy: str) -> Standing | None:
        """That of one strategy, None where it has no finished cell."""
        return next((s for s in self.standings if s.strategy == strategy), None)

    def against(self, strategy: str) -> list[Difference]:
        """The differences of one strategy, it first."""
        return [
            d if d.one == strategy else turned(d)
            for d in self.differences
            if strategy in (d.one, d.other)
        ]

    @property
    def reference(self) -> Standing:
        """What costs are compared with: `full`, else the dearest by FLOPs, else by time."""
        if (full := self.standing("full")) is not None:
            return full

        def dearness(standing: Standing) -> tuple[float, float]:
            flops, seconds = (standing.means[column] or 0.0 for column in COSTS[:2])
            return flops, seconds

        return max(self.standings, key=dearness)


@dataclass(frozen=True)
class GradientRatio:
    """How much larger gradients a random head sends into the trunk than a trained one.

    Attributes:
      setting: of the cells.
      first: in the first step, geometric mean over the cells.
      mean: of the norms' means over all steps, likewise.
      cells: in which they were measured.
    """

    setting: Setting
    first: float
    mean: float
    cells: int


@dataclass(frozen=True, eq=False)
class Answers:
    """All of it."""

    sweep: Sweep
    settings: Sequence[Answer]
    gradients: Sequence[GradientRatio]

    @property
    def broken(self) -> list[Cell]:
        """Cells in which something moved that was to stay frozen."""
        return [cell for cell in self.sweep.cells if cell.certificate == "BROKEN"]

    @property
    def unfinished(self) -> list[Cell]:
        """Cells without a result."""
        return [cell for cell in self.sweep.cells if not cell.finished]

    @property
    def at_edge(self) -> list[Cell]:
        """Cells with the least or the greatest learning rate that was tried for them."""
        return [cell for cell in self.sweep.cells if cell.at_edge]


def find(sweep: Sweep) -> Answers:
    """Everything that the sweep's cells say."""
    replicates = _replicates(sweep.cells)
    answers = [_answer(sweep, setting, replicates) for setting in sweep.settings]
    gradients = [_gradients(sweep, setting) for setting in sweep.settings]
    return Answers(
        sweep, [answer for answer in answers if answer.standings], [g for g in gradients if g]
    )


def turned(difference: Difference) -> Difference:
    """The same difference the other way round."""
    return Difference(
        difference.other,
        difference.one,
        -difference.mean,
        None if difference.high is None else -difference.high,
        None if difference.low is None else -difference.low,
        difference.seeds,
        difference.source,
    )


def _replicates(cells: Sequence[Cell]) -> dict[str, np.ndarray]:
    """By a cell's name its accuracies on resampled examples, the same for all test splits alike."""
    by_examples: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.finished and cell.hits is not None:
            by_examples.setdefault(len(cell.hits), []).append(cell)
    found = {}
    for alike in by_examples.values():
        hits = np.stack([cell.hits for cell in alike if cell.hits is not None])
        rows = statistics.example_replicates(hits)
        found.update({cell.name: row for cell, row in zip(alike, rows, strict=True)})
    return found


def _answer(sweep: Sweep, setting: Setting, replicates: Mapping[str, np.ndarray]) -> Answer:
    finished = {strategy: sweep.finished(strategy, setting) for strategy in sweep.strategies}
    finished = {strategy: cells for strategy, cells in finished.items() if cells}
    runs = {
        strategy: {cell.seed: _run(cell, replicates) for cell in cells}
        for strategy, cells in finished.items()
    }
    estimates = statistics.estimates(runs)
    standings = []
    for strategy, cells in finished.items():
        columns = cells[0].numbers
        means = {column: mean(cell.numbers[column] for cell in cells) for column in columns}
        standings.append(Standing(strategy, estimates[strategy], means, cells))
    standings.sort(key=lambda s: -s.accuracy.mean)  # stable: equal ones in the axis's order
    place = {s.strategy: index for index, s in enumerate(standings)}
    # Where strategies have different seeds the better of a pair may have the lower mean.
    differences = [
        d if (-d.mean, place[d.one]) < (d.mean, place[d.other]) else turned(d)
        for d in statistics.compare(runs)
    ]
    differences.sort(key=lambda d: sorted((place[d.one], place[d.other])))
    return Answer(setting, _with_front(standings), differences)


def _run(cell: Cell, replicates: Mapping[str, np.ndarray]) -> Run:
    numbers, own = cell.numbers, replicates.get(cell.name)
    accuracy, low, high = (numbers[f"accuracy{end}"] for end in ("", "_low", "_high"))
    assert accuracy is not None
    if cell.hits is not None:
        accuracy = float(cell.hits.mean())
    return Run(accuracy, None if low is None or high is None else (low, high), own)


def _with_front(standings: Sequence[Standing]) -> list[Standing]:
    """Marks those on the Pareto front of mean accuracy and training FLOPs."""
    front = pareto_front([(s.means["training_flops"], s.accuracy.mean) for s in standings])
    return [
        Standing(s.strategy, s.accuracy, s.means, s.cells, index in front)
        for index, s in enumerate(standings)
    ]


def pareto_front(points: Iterable[tuple[float | None, float]]) -> list[int]:
    """Indices of the (cost, gain) that none beats in both, the cheapest first."""
    priced = [(cost, -gain, i) for i, (cost, gain) in enumerate(points) if cost is not None]
    front: list[int] = []
    highest = -float("inf")
    for _, loss, index in sorted(priced):
        if -loss > highest:
            highest = -loss
            front.append(index)
    return front


def trunk_norms(rows: Iterable[Json]) -> np.ndarray | None:
    """By step, the norm of all gradients into the trunk: √Σ over its blocks of norm²."""
    norms = [
        [finite(norm) for norm in row["norms"]]
        for row in rows
        if row["block"] != "head" and row.get("norms")
    ]
    if not norms or any(norm is None for row in norms for norm in row):
        return None
    steps = min(map(len, norms))
    return np.sqrt(np.square([row[:steps] for row in norms]).sum(0))  # type: ignore[arg-type]


def _gradients(sweep: Sweep, setting: Setting) -> GradientRatio | None:
    logs = []
    for cell in sweep.cells:
        gradients = cell.measures.get("gradients") or {}
        if cell.setting != setting or not gradients:
            continue
        random, trained = (trunk_norms(gradients[head]) for head in ("random_head", "trained_head"))
        if random is None or trained is None or not (random.all() and trained.all()):
            continue
        logs.append(np.log([random[0] / trained[0], random.mean() / trained.mean()]))
    if not logs:
        return None
    first, mean = (float(ratio) for ratio in np.exp(np.mean(logs, axis=0)))
    return GradientRatio(setting, first, mean, len(logs))
