"""What a figure is made of, apart from how it is drawn: `pictures` and `plots` both draw this."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tl_jax.report.answers import Answer, Answers
from tl_jax.report.cells import mean
from tl_jax.report.words import short

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """An axis: its label, whether it is logarithmic, whether it counts in whole numbers.

    `ticks` are names at 0, 1, 2 … from the top down, where it has no numbers.
    """

    label: str
    log: bool = False
    whole: bool = False
    ticks: Sequence[str] | None = None


def log_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that a logarithmic axis over these values is labelled with, some on each side.

    Args:
      values: those above 0 count.
    """
    values = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(values)), math.log10(max(values))
    mantissas = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 3.5 else (1,)
    exponents = range(math.floor(low) - 1, math.ceil(high) + 2)
    return [float(f"{mantissa}e{power}") for power in exponents for mantissa in mantissas]


@dataclass(frozen=True)
class Series:
    """Points of one strategy, or a line of its own.

    Attributes:
      name: untrusted text.
      style: the number of its colour, marker and dashes; None for the front, drawn in grey.
      points: (x, y). Accuracies in percent.
      notes: a line for each point, shown where a mouse stands on it.
      spans: the ends of an interval for each point, along x for a chart with ticks, else along y.
      line, marked, hollow: whether points are joined, have markers, and these are filled.
      named: whether the name stands beside the first point.
      own: whether it is no strategy's: explained beside the figure, and never hidden.
    """

    name: str
    style: int | None
    points: Sequence[Point]
    notes: Sequence[str] = ()
    spans: Sequence[tuple[float, float] | None] = ()
    line: bool = False
    marked: bool = True
    hollow: bool = False
    named: bool = False
    own: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]


@dataclass(frozen=True)
class Chart:
    """A figure of one or more panels; `key` is its file's name, `text` says what to look for."""

    key: str
    title: str
    text: str
    panels: Sequence[Panel]


BLOCKS = Axis("block, from the stem (0) to the head", whole=True)


def chart_of(key: str, title: str, text: str, panels: Iterable[Panel | None]) -> Chart | None:
    """A chart of the panels that have points; None where none has."""
    kept = [panel for panel in panels if panel is not None and any(s.points for s in panel.series)]
    return Chart(key, title, text, kept) if kept else None


def styles(answers: Answers) -> dict[str, int]:
    """The number of each strategy's look: its place on the axis."""
    return {strategy: index for index, strategy in enumerate(answers.sweep.strategies)}


def titled(title: str, answer: Answer) -> str:
    """A title with the setting behind it, where there are settings."""
    return f"{title}: {answer.setting.title}" if answer.setting.title else title


def means_line(
    strategy: str,
    style: int | None,
    values: Mapping[float, Sequence[float | None]],
    scale: float = 1,
    names: Mapping[float, str] | None = None,
) -> Series:
    """A line through the means at each x; `names` of the x stand in the notes."""
    points = [(x, scale * m) for x in sorted(values) if (m := mean(values[x])) is not None]
    notes = [f"{(names or {}).get(x, short(x))}: {short(y)}" for x, y in points]
    return Series(strategy, style, points, notes, line=True)
