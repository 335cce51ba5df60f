"""Figures of accuracy: by strategy, against cost, along the axes, and under shift."""

from collections.abc import Callable, Sequence

from tl_jax.report.answers import Answer, Answers, pareto_front
from tl_jax.report.charts import (
    Axis,
    Chart,
    Panel,
    Series,
    chart_of,
    means_line,
    styles,
    titled,
)
from tl_jax.report.words import finite, percent, scaled, seconds, short


def accuracy(answers: Answers) -> Chart | None:
    """Mean accuracies with their intervals, the best on top."""

    def panel(answer: Answer) -> Panel:
        series = [
            Series(
                s.strategy,
                styles(answers)[s.strategy],
                [(100 * s.accuracy.mean, float(row))],
                [percent(s.accuracy.mean)],
                [_span(s.accuracy.low, s.accuracy.high)],
            )
            for row, s in enumerate(answer.standings)
        ]
        names = [s.strategy for s in answer.standings]
        return Panel(answer.setting.title, Axis("accuracy, %"), Axis("", ticks=names), series)

    text = (
        "Mean over seeds with its 95 % interval. Overlap decides nothing: pairs are compared below."
    )
    return chart_of("accuracy", "Accuracy", text, map(panel, answers.settings))


def _span(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (100 * low, 100 * high)


def cost(answers: Answers) -> list[Chart]:
    """Accuracy against FLOPs and against time, with the Pareto front."""

    def panel(answer: Answer, column: str, label: str, form: Callable[[float], str]) -> Panel:
        costs = [(s.means[column], s) for s in answer.standings]
        priced = [(cost, s) for cost, s in costs if cost]  # 0 has no logarithm
        front = pareto_front([(cost, s.accuracy.mean) for cost, s in priced])
        unit = 1e9 if column == "training_flops" else 1.0
        points = [(cost / unit, 100 * s.accuracy.mean) for cost, s in priced]
        best = [points[index] for index in front]
        series = [Series("Pareto front", None, best, line=True, marked=False)]
        series += [
            Series(
                s.strategy,
                styles(answers)[s.strategy],
                [point],
                [f"{form(cost)}, {percent(s.accuracy.mean)}"],
                [_span(s.accuracy.low, s.accuracy.high)],
                named=index in front,
            )
            for index, (point, (cost, s)) in enumerate(zip(points, priced, strict=True))
        ]
        x = Axis(label, log=True)
        return Panel(answer.setting.title, x, Axis("accuracy, %"), series)

    text = "The grey line joins the strategies that no other beats in both. Cost is on a log scale."
    found = []
    for key, column, label, form in (
        ("flops", "training_flops", "GFLOP of training", lambda c: scaled(c, "FLOP")),
        ("time", "training_seconds", "seconds of training", seconds),
    ):
        panels = [panel(answer, column, label, form) for answer in answers.settings]
        title = f"Accuracy against {label}"
        found.append(chart_of(f"accuracy_against_{key}", title, text, panels))
    return [chart for chart in found if chart is not None]


def numeric_axes(answers: Answers) -> list[str]:
    """Axes of the settings with two numbers or more, that of the examples first."""
    found = []
    for axis in answers.sweep.setting_axes:
        numbers = {n for value in answers.sweep.axes[axis] if (n := _number(value)) is not None}
        if len(numbers) > 1:
            found.append(axis)
    return sorted(found, key=lambda axis: "examples" not in axis)


def _number(text: str) -> float | None:
    try:
        return finite(float(text))
    except ValueError:
        return None


def along(answers: Answers, axis: str, title: str) -> Chart | None:
    """Accuracy against the values of one axis; a panel for each combination of the others."""
    groups: dict[str, list[tuple[float, Answer]]] = {}
    for answer in answers.settings:
        values = dict(answer.setting.values)
        if (x := _number(values.pop(axis))) is not None:
            rest = type(answer.setting)(tuple(values.items())).title
            groups.setdefault(rest, []).append((x, answer))

    def panel(rest: str, members: Sequence[tuple[float, Answer]]) -> Panel:
        xs = [x for x, _ in members]
        log = min(xs) > 0 and max(xs) / min(xs) >= 8
        series = []
        for strategy, style in styles(answers).items():
            found = sorted(
                ((x, s.accuracy) for x, a in members if (s := a.standing(strategy))),
                key=lambda item: item[0],
            )
            points = [(x, 100 * e.mean) for x, e in found]
            spans = [_span(e.low, e.high) for _, e in found]
            notes = [f"{short(x)}: {percent(e.mean)}" for x, e in found]
            series.append(Series(strategy, style, points, notes, spans, line=True))
        return Panel(rest, Axis(title, log=log), Axis("accuracy, %"), series)

    text = f"Mean over seeds for each {answers.sweep.noun}, with 95 % intervals."
    panels = [panel(rest, members) for rest, members in groups.items()]
    axes = list(answers.sweep.axes)
    first = next((each for each in axes if "examples" in each), None)
    key = "examples" if axis == first else f"axis_{axes.index(axis)}"
    return chart_of(f"accuracy_against_{key}", f"Accuracy against {title}", text, panels)


def robustness(answers: Answers) -> Chart | None:
    """Accuracy on shifted data against that on the test split."""

    def panel(answer: Answer) -> Panel:
        series = []
        for s in answer.standings:
            clean, shifted = s.means["clean_accuracy"], s.means["shifted_accuracy"]
            if clean is None or shifted is None:
                continue
            note = f"{percent(clean)} in, {percent(shifted)} out of distribution"
            style = styles(answers)[s.strategy]
            point = (100 * clean, 100 * shifted)
            series.append(Series(s.strategy, style, [point], [note], named=True))
        x, y = Axis("accuracy without shift, %"), Axis("mean accuracy on shifted data, %")
        return Panel(answer.setting.title, x, y, series)

    text = "Higher at the same place from left to right is more robust."
    title = "Accuracy in and out of distribution"
    return chart_of("in_and_out_of_distribution", title, text, map(panel, answers.settings))


def by_shift(answers: Answers, answer: Answer, key: str) -> Chart | None:
    """Accuracy against severity, a panel for each kind of shift; severity 0 is without it."""
    rows = [
        row for s in answer.standings for c in s.cells for row in c.measures.get("shifts") or ()
    ]

    def panel(kind: str) -> Panel:
        series = []
        for s in answer.standings:
            values: dict[float, list[float | None]] = {}
            for cell in s.cells:
                for row in cell.measures.get("shifts") or ():
                    severity = finite(row.get("severity"))
                    if row["kind"] == kind and severity is not None:
                        values.setdefault(severity, []).append(finite(row.get("accuracy")))
            if values and 0 not in values:
                values[0.0] = [cell.numbers["clean_accuracy"] for cell in s.cells]
            series.append(means_line(s.strategy, styles(answers)[s.strategy], values, 100))
        return Panel(kind, Axis("severity", whole=True), Axis("accuracy, %"), series)

    kinds = dict.fromkeys(row["kind"] for row in rows)
    title = titled("Accuracy by kind of shift", answer)
    return chart_of(key, title, "Severity 0 is without the shift.", map(panel, kinds))
