"""The report's content in its order, apart from its form: `page` and `markdown` both write this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_jax.report import accuracy_charts, cell_table, measure_charts, sentences, tables
from tl_jax.report.answers import Answers
from tl_jax.report.cells import Json, short_axis
from tl_jax.report.charts import Chart
from tl_jax.report.tables import Column, Table
from tl_jax.report.words import Name, Sentence


@dataclass(frozen=True)
class Paragraph:
    """Sentences one after another; `kind` is "answer", "warning", "note" or plain."""

    sentences: Sequence[Sentence]
    kind: str = ""


@dataclass(frozen=True)
class Plan:
    """The picture of one strategy's plan; `key` is its file's name."""

    key: str
    caption: str
    plan: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Code:
    """Something to copy, with what it is."""

    caption: str
    text: str


Block = Paragraph | Table | Chart | Plan | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `key` is its place in links."""

    key: str
    title: str
    blocks: Sequence[Block]


def headlines(answers: Answers) -> list[Paragraph]:
    """What stands first in both documents: warnings, the answer of each setting, caveats."""
    found = []
    if warnings := sentences.warnings(answers):
        found.append(Paragraph(warnings, "warning"))
    if not answers.settings:
        found.append(Paragraph([("No cell has a result yet.",)], "answer"))
    found += [Paragraph(sentences.headline(answers, a), "answer") for a in answers.settings]
    if caveats := sentences.caveats(answers):
        found.append(Paragraph(caveats, "note"))
    return found


def find(answers: Answers) -> list[Section]:
    """Those sections for which there are data."""
    sections = [
        Section("strategies", answers.sweep.nouns.capitalize(), _strategies(answers)),
        Section("pairs", "All paired comparisons", _table(tables.differences(answers))),
        Section("cost", "Accuracy against cost", accuracy_charts.cost(answers)),
        Section("axes", "Accuracy along the axes of the sweep", _along(answers)),
        Section("robustness", "In and out of distribution", _robustness(answers)),
        Section("drift", "Drift by depth", _each_setting(answers, measure_charts.drift, "drift")),
        Section("gradients", "What an untrained head does to the trunk", _gradients(answers)),
        Section("curves", "Learning curves", _only(measure_charts.curves(answers))),
        Section("forgetting", "Forgetting", _forgetting(answers)),
        Section("search", "Search of the learning rate", _search(answers)),
        Section("plans", "Plans", _plans(answers)),
        Section("cells", "Every cell", _cells(answers)),
        Section("method", "How this was made", _method(answers)),
    ]
    return [section for section in sections if section.blocks]


def _only(chart: Chart | None) -> list[Block]:
    return [] if chart is None else [chart]


def _table(table: Table) -> list[Block]:
    return [table] if table.rows else []


def _strategies(answers: Answers) -> list[Block]:
    found: list[Block] = []
    for number, answer in enumerate(answers.settings):
        if answer.setting.title:
            found.append(Paragraph([(Name(answer.setting.title),)]))
        found.append(tables.standings(answer, f"strategies-{number}", answers.sweep.noun))
    return [*found, *_only(accuracy_charts.accuracy(answers))]


def _along(answers: Answers) -> list[Block]:
    found: list[Block] = []
    for axis in accuracy_charts.numeric_axes(answers):
        title = short_axis(axis).replace("_", " ")
        found += _only(accuracy_charts.along(answers, axis, title))
    return found


def _robustness(answers: Answers) -> list[Block]:
    by_kind = _each_setting(answers, accuracy_charts.by_shift, "shifts")
    table = _table(tables.shifts(answers))
    return [*_only(accuracy_charts.robustness(answers)), *table, *by_kind]


def _each_setting(answers: Answers, chart: Any, key: str) -> list[Block]:
    """A chart for each setting, numbered where there are several."""
    several = len(answers.settings) > 1
    found: list[Block] = []
    for number, answer in enumerate(answers.settings, 1):
        found += _only(chart(answers, answer, f"{key}_{number}" if several else key))
    return found


def _gradients(answers: Answers) -> list[Block]:
    found = _only(measure_charts.gradients(answers))
    said = sentences.gradients(answers)
    return [Paragraph(said), *found] if said else found


def _forgetting(answers: Answers) -> list[Block]:
    return [*_table(tables.forgetting(answers)), *_only(measure_charts.forgetting(answers))]


def _search(answers: Answers) -> list[Block]:
    return [*_only(measure_charts.search(answers)), *_table(tables.search(answers))]


def _plans(answers: Answers) -> list[Block]:
    """The first plan of each strategy."""
    found: list[Block] = []
    for number, strategy in enumerate(answers.sweep.strategies):
        cells = (cell for cell in answers.sweep.cells if cell.strategy == strategy and cell.plan)
        if (cell := next(cells, None)) is not None:
            found.append(Plan(f"plan_{number}", strategy, cell.plan))
    return found


def _cells(answers: Answers) -> list[Block]:
    return [cell_table.cells(answers).without_empty()]


def _method(answers: Answers) -> list[Block]:
    found: list[Block] = [Paragraph(sentences.method(answers))]
    if answers.sweep.command:
        found.append(Code("The whole sweep", answers.sweep.command))
    if rows := list(_flat(answers.sweep.environment, "")):
        columns = [Column("environment"), Column("value")]
        cells = [[tables.name(key), tables.name(value)] for key, value in rows]
        found.append(Table("environment", columns, cells))
    return found


def _flat(content: Json, prefix: str) -> Any:
    """Nested names as dotted ones, with their values as text."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)
