"""Figures of what was measured beside accuracy: drift, gradients, curves, forgetting, trials."""

from collections.abc import Sequence
from dataclasses import replace

from tl_jax.report.answers import Answer, Answers
from tl_jax.report.cells import Cell, Json, mean
from tl_jax.report.charts import (
    BLOCKS,
    Axis,
    Chart,
    Panel,
    Point,
    Series,
    chart_of,
    means_line,
    styles,
    titled,
)
from tl_jax.report.words import finite, short


def drift(answers: Answers, answer: Answer, key: str) -> Chart | None:
    """How far weights and representations moved, block by block."""

    def panel(column: str, label: str) -> Panel:
        series = []
        for s in answer.standings:
            values: dict[float, list[float | None]] = {}
            names: dict[float, str] = {}
            for cell in s.cells:
                for row in cell.measures.get("drift") or ():
                    if (moved := finite(row.get(column))) is not None:
                        values.setdefault(float(row["index"]), []).append(moved)
                        names[float(row["index"])] = row["block"]
            style = styles(answers)[s.strategy]
            series.append(means_line(s.strategy, style, values, names=names))
        return Panel(label, BLOCKS, Axis(label), series)

    panels = [
        panel("weights", "relative change of weights"),
        panel("cka", "CKA with the source"),
        panel("cosine", "cosine with the source"),
    ]
    text = "Weights: 0 is unchanged. CKA and cosine of the representations: 1 is unchanged."
    return chart_of(key, titled("Drift by depth", answer), text, panels)


def gradients(answers: Answers) -> Chart | None:
    """Gradient norms by block, from a random head and from a trained one."""
    heads = (("random_head", "from a random head", 1), ("trained_head", "from a trained head", 0))

    def panel(answer: Answer) -> Panel:
        cells = [
            c
            for c in answers.sweep.cells
            if c.setting == answer.setting and c.measures.get("gradients")
        ]
        series = [_head(cells, head, label, style) for head, label, style in heads]
        return Panel(answer.setting.title, BLOCKS, Axis("gradient norm", log=True), series)

    text = "Norm of the loss's gradient with respect to each block's weights, mean over steps."
    return chart_of("gradients", "Gradients by depth", text, map(panel, answers.settings))


def _head(cells: Sequence[Cell], head: str, label: str, style: int) -> Series:
    values: dict[float, list[float | None]] = {}
    names: dict[float, str] = {}
    for cell in cells:
        for row in cell.measures["gradients"].get(head) or ():
            norm = mean(row.get("norms") or ())
            if norm:  # 0 has no logarithm
                values.setdefault(float(row["index"]), []).append(norm)
                names[float(row["index"])] = row["block"]
    return replace(means_line(label, style, values, names=names), own=True)


def curves(answers: Answers) -> Chart | None:
    """Validation accuracy over the epochs: means over the seeds that have it."""

    def panel(answer: Answer) -> Panel:
        series = []
        for s in answer.standings:
            values: dict[float, list[float | None]] = {}
            for cell in s.cells:
                for epoch, value in _validation(cell.curves):
                    values.setdefault(epoch, []).append(value)
            series.append(means_line(s.strategy, styles(answers)[s.strategy], values, 100))
        return Panel(
            answer.setting.title, Axis("epoch", whole=True), Axis("validation accuracy, %"), series
        )

    text = "Mean over seeds. The test split is looked at once, at the end."
    return chart_of("learning_curves", "Learning curves", text, map(panel, answers.settings))


def _validation(records: Sequence[Json]) -> list[Point]:
    points = {}
    for record in records:
        epoch, value = finite(record.get("epoch")), finite(record.get("accuracy"))
        if record.get("split") == "validation" and epoch is not None and value is not None:
            points[round(epoch, 6)] = value
    return sorted(points.items())


def forgetting(answers: Answers) -> Chart | None:
    """Accuracy on the source's own data before training (hollow) and after (filled)."""

    def panel(answer: Answer) -> Panel:
        rows = []
        for s in answer.standings:
            kept = [c.measures["forgetting"] for c in s.cells if c.measures.get("forgetting")]
            ends = [mean(f[when].get("accuracy") for f in kept) for when in ("before", "after")]
            if ends[0] is not None and ends[1] is not None:
                rows.append((s.strategy, 100 * ends[0], 100 * ends[1]))
        series = []
        for row, (strategy, before, after) in enumerate(rows):
            style = styles(answers)[strategy]
            start, end = (before, float(row)), (after, float(row))
            notes = [f"before {before:.1f} %", f"after {after:.1f} %"]
            series.append(Series(strategy, style, [start, end], notes, line=True, marked=False))
            series.append(Series(strategy, style, [start], [notes[0]], hollow=True))
            series.append(Series(strategy, style, [end], [notes[1]]))
        names = [strategy for strategy, *_ in rows]
        x = Axis("accuracy on the source's data, %")
        return Panel(answer.setting.title, x, Axis("", ticks=names), series)

    text = "Hollow before training, filled after."
    return chart_of("forgetting", "Forgetting", text, map(panel, answers.settings))


def search(answers: Answers) -> Chart | None:
    """Accuracy of the trials against their learning rates; the chosen ones are filled."""

    def panel(answer: Answer) -> Panel:
        series = []
        for s in answer.standings:
            values: dict[float, list[float | None]] = {}
            for cell in s.cells:
                for trial in cell.search.get("trials") or ():
                    if rate := finite(trial.get("learning_rate")):
                        values.setdefault(rate, []).append(finite(trial.get("accuracy")))
            if len(values) < 2:
                continue
            style = styles(answers)[s.strategy]
            line = means_line(s.strategy, style, values, 100)
            chosen = {cell.numbers["learning_rate"] for cell in s.cells}
            points = [point for point in line.points if point[0] in chosen]
            notes = [f"chosen: {short(rate)}" for rate, _ in points]
            series.append(replace(line, hollow=True))
            series.append(Series(s.strategy, style, points, notes))
        x = Axis("learning rate", log=True)
        return Panel(answer.setting.title, x, Axis("validation accuracy of the trial, %"), series)

    text = (
        "On validation, with the first seed. Filled is what was chosen; trials that diverged are "
        "left out."
    )
    return chart_of("search", "Search of the learning rate", text, map(panel, answers.settings))
