"""The report's tables, each value formatted once: its text for readers, its digits for machines."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_jax.report.answers import Answer, Answers
from tl_jax.report.cells import Cell, mean
from tl_jax.report.statistics import UNPAIRED, Difference
from tl_jax.report.words import (
    NOTHING,
    exact,
    finite,
    interval,
    percent,
    points,
    scaled,
    seconds,
    short,
)


@dataclass(frozen=True)
class Value:
    """What stands in a table: `text` is shown, `exact` goes into the CSV and is sorted by.

    `code` marks what is to be copied, such as a command.
    """

    text: str
    exact: str
    code: bool = False


@dataclass(frozen=True)
class Column:
    """A column's title, whether it holds numbers, and whether only the HTML page shows it."""

    title: str
    numeric: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table. `key` names it in links."""

    key: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]

    def without_empty(self) -> "Table":
        """Columns in which some row holds something."""
        kept = [i for i in range(len(self.columns)) if any(row[i].exact for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.key, [self.columns[i] for i in kept], rows)

    def brief(self) -> "Table":
        """The columns that fit onto a page."""
        kept = [i for i, column in enumerate(self.columns) if not column.wide]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.key, [self.columns[i] for i in kept], rows)


def name(text: str, *, code: bool = False) -> Value:
    """A value that is text."""
    return Value(text, text, code)


def number(value: float | None, form: Callable[[float | None], str]) -> Value:
    """A value that is a number, None where it is unknown."""
    return Value(form(value), exact(value))


def percent_text(value: float | None) -> str:
    """A share."""
    return percent(value)


def bytes_text(value: float | None) -> str:
    """Bytes."""
    return scaled(value, "B")


def flops_text(value: float | None) -> str:
    """FLOPs."""
    return scaled(value, "FLOP")


def count_text(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None else f"{value:,.0f}"


def standings(answer: Answer, key: str, noun: str) -> Table:
    """The strategies of one setting from the best down: means over seeds."""
    columns = [
        Column(noun),
        Column("accuracy", numeric=True),
        Column("95 % interval"),
        Column("seeds", numeric=True),
        Column("shifted accuracy", numeric=True),
        Column("training time", numeric=True),
        Column("training FLOPs", numeric=True),
        Column("trainable parameters", numeric=True),
        Column("optimizer state", numeric=True),
        Column("peak memory of the process", numeric=True),
        Column("Pareto front"),
    ]
    rows = []
    for standing in answer.standings:
        accuracy, means = standing.accuracy, standing.means
        rows.append(
            [
                name(standing.strategy),
                number(accuracy.mean, percent_text),
                _interval(accuracy.low, accuracy.high),
                number(float(accuracy.seeds), count_text),
                number(means["shifted_accuracy"], percent_text),
                number(means["training_seconds"], seconds),
                number(means["training_flops"], flops_text),
                number(means["trainable_parameters"], count_text),
                number(means["optimizer_bytes"], bytes_text),
                number(means["peak_memory_bytes"], bytes_text),
                name("on the front" if standing.on_front else ""),
            ]
        )
    return Table(key, columns, rows).without_empty()


def _interval(low: float | None, high: float | None, *, differences: bool = False) -> Value:
    text = interval(low, high, differences=differences)
    return Value(text, "" if low is None else exact(low))


def differences(answers: Answers) -> Table:
    """All paired comparisons of all settings."""
    columns = [
        Column("setting"),
        Column("better"),
        Column("worse"),
        Column("points", numeric=True),
        Column("95 % interval, all pairs", numeric=True),
        Column("seeds", numeric=True),
        Column("can we tell?"),
    ]
    rows = [
        [
            name(answer.setting.title),
            name(difference.one),
            name(difference.other),
            number(difference.mean, points),
            _interval(difference.low, difference.high, differences=True),
            number(float(difference.seeds), count_text),
            name(_verdict(difference)),
        ]
        for answer in answers.settings
        for difference in answer.differences
    ]
    return Table("differences", columns, rows).without_empty()


def _verdict(difference: Difference) -> str:
    if difference.seeds < 2 and difference.low is not None:
        return "one seed"
    if difference.source == UNPAIRED:
        return UNPAIRED
    if difference.certain:
        return "yes"
    return "no interval" if difference.low is None else "cannot tell"


def _each(answers: Answers) -> Iterable[tuple[str, str, Sequence[Cell]]]:
    for answer in answers.settings:
        for standing in answer.standings:
            yield answer.setting.title, standing.strategy, standing.cells


def shifts(answers: Answers) -> Table:
    """Accuracy by kind of shift: means over severities and seeds."""
    kinds = list(
        dict.fromkeys(
            row["kind"] for c in answers.sweep.cells for row in c.measures.get("shifts") or ()
        )
    )
    columns = [Column("setting"), Column(answers.sweep.noun), Column("unshifted", numeric=True)]
    columns += [Column(kind, numeric=True) for kind in kinds]
    rows = []
    for setting, strategy, cells in _each(answers):
        if not any(cell.measures.get("shifts") for cell in cells):
            continue
        row = [name(setting), name(strategy)]
        row.append(number(mean(cell.numbers["clean_accuracy"] for cell in cells), percent_text))
        for kind in kinds:
            found = (r for c in cells for r in c.measures.get("shifts") or () if r["kind"] == kind)
            row.append(number(mean(r.get("accuracy") for r in found), percent_text))
        rows.append(row)
    return Table("shifts", columns, rows).without_empty()


def forgetting(answers: Answers) -> Table:
    """Accuracy on the source's own data before and after: means over seeds."""
    columns = [
        Column("setting"),
        Column(answers.sweep.noun),
        Column("source"),
        Column("before", numeric=True),
        Column("after", numeric=True),
        Column("points", numeric=True),
    ]
    rows = []
    for setting, strategy, cells in _each(answers):
        kept = [c.measures["forgetting"] for c in cells if c.measures.get("forgetting")]
        if not kept:
            continue
        before, after = (
            mean(f[when].get("accuracy") for f in kept) for when in ("before", "after")
        )
        change = None if before is None or after is None else after - before
        rows.append(
            [
                name(setting),
                name(strategy),
                name(str(kept[0].get("source") or "")),
                number(before, percent_text),
                number(after, percent_text),
                number(change, points),
            ]
        )
    return Table("forgetting", columns, rows).without_empty()


def search(answers: Answers) -> Table:
    """The learning rates that were tried; the same search of several seeds once."""
    columns = [
        Column("setting"),
        Column(answers.sweep.noun),
        Column("learning rate", numeric=True),
        Column("accuracy", numeric=True),
        Column("loss", numeric=True),
        Column("chosen"),
    ]
    rows: dict[tuple[Any, ...], list[Value]] = {}
    for cell in answers.sweep.cells:
        for trial in cell.search.get("trials") or ():
            rate, accuracy, loss = (
                finite(trial.get(key)) for key in ("learning_rate", "accuracy", "loss")
            )
            chosen = "" if rate != cell.numbers["learning_rate"] else "chosen"
            if chosen and cell.search.get("at_edge"):
                chosen = "chosen, at the edge"
            row = [
                name(cell.setting.title),
                name(cell.strategy),
                number(rate, short),
                number(accuracy, percent_text) if accuracy is not None else Value("diverged", ""),
                number(loss, short),
                name(chosen),
            ]
            rows.setdefault(tuple(value.exact for value in row), row)
    return Table("search", columns, list(rows.values())).without_empty()
