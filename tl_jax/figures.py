"""Pictures of a run as PNG bytes: learning curves, confusion matrix, mistakes, and the plan.

Each `draw_…` builds a matplotlib Figure inside `style()`; the function of the same name without
`draw_` renders it. No pyplot, no state that outlives a call. Class names are untrusted text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_jax.figure_style import (
    BLUE,
    GREY,
    INK,
    PALE,
    SKY,
    VERMILLION,
    label,
    new_figure,
    png,
)
from tl_jax.plan_figure import draw_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mistake = tuple[np.ndarray, str, str, float]

COUNTED_CLASSES = 20  # up to here the cells of a confusion matrix hold their counts
NAMED_CLASSES = 60  # up to here its rows and columns are named
CURVES = {"epoch": "train, mean of the epoch", "validation": "validation"}
GRID = 25  # mistakes in one picture


def learning_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss and accuracy of training and validation over the steps, PNG.

    Args:
      records: the lines of `metrics.jsonl`; those with `step`, `split` ("epoch" or "validation")
        and `loss` (nats) or `accuracy` are drawn. A value that is not finite leaves a gap and a
        cross; of two records of one step the later counts.
    """
    return png(draw_learning_curves, records)


def confusion_matrix(confusion: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Confusion matrix, PNG. A cell's colour is its share of the true class (its row).

    Args:
      confusion: int [C, C], examples by true class (rows) and predicted class (columns).
      class_names: C names. Counts above 0 are written for C ≤ 20, names for C ≤ 60.
    """
    return png(draw_confusion_matrix, confusion, class_names)


def mistakes(items: Sequence[Mistake]) -> bytes:
    """Grid of wrongly classified images, PNG.

    Args:
      items: (image uint8 [h, w, 1 | 3], true name, predicted name, probability of the
        prediction); the first 25 are drawn, in their order.
    """
    return png(draw_mistakes, items)


def plan(plan: Mapping[str, Any]) -> bytes:
    """The chain of blocks, each filled by its groups' shares of its parameters, a row a phase; PNG.

    Args:
      plan: the content of `plan.json`.
    """
    return png(draw_plan, plan)


def draw_learning_curves(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """See `learning_curves`: two axes, in each one line for every split that has values."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 3.2, layout="constrained")
    for axes, field, title in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("Loss (cross-entropy, nats)", "Accuracy"),
        strict=True,
    ):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=PALE)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for split, colour in zip(CURVES, (BLUE, VERMILLION), strict=True):
            _draw_curve(axes, records, split, field, colour)
        if axes.lines:
            axes.legend()
        else:
            axes.text(
                0.5, 0.5, "nothing recorded", ha="center", color=GREY, transform=axes.transAxes
            )
    return figure


def _draw_curve(
    axes: "Axes", records: Sequence[Mapping[str, Any]], split: str, field: str, colour: str
) -> None:
    points = {
        record["step"]: math.nan if record[field] is None else float(record[field])
        for record in records
        if record.get("split") == split and field in record and "step" in record
    }
    if not points:
        return
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps])
    finite = np.isfinite(values)
    name = CURVES[split]
    if (split, field) == ("validation", "accuracy") and finite.any():
        name += f" (best {values[finite].max():.3f})"
    few = len(steps) <= 30
    axes.plot(
        steps,
        np.where(finite, values, np.nan),
        color=colour,
        label=name,
        lw=1.6,
        marker="o" if few else None,
        ms=4,
    )
    if not finite.all():
        axes.plot(
            steps[~finite],
            np.full((~finite).sum(), 0.03),
            "x",
            color=colour,
            ms=6,
            mew=1.6,
            label=f"{name}: not finite",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def draw_confusion_matrix(confusion: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """See `confusion_matrix`: the matrix's axes first, then the colour bar's."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    confusion = np.asarray(confusion)
    classes, totals = len(confusion), confusion.sum(1, keepdims=True)
    share = np.ma.masked_invalid(np.where(totals, confusion / np.maximum(totals, 1), np.nan))
    ramp = LinearSegmentedColormap.from_list("share", ["#FFFFFF", SKY, BLUE, "#00324F"])
    colours = ramp.with_extremes(bad=PALE)
    side = min(8.0, max(4.6, 2.6 + 0.42 * classes))
    figure = new_figure(side + 0.6, side, layout="constrained")
    axes = figure.add_subplot()
    # The square root lets the rare confusions be seen beside the diagonal.
    picture = axes.imshow(share, cmap=colours, norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, aspect=30, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("share of the true class")
    examples, hits = int(confusion.sum()), int(np.trace(confusion))
    accuracy = f"Accuracy {hits / examples:.3f} on " if examples else ""
    axes.set_title(f"{accuracy}{examples:,} examples", pad=10)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if classes <= NAMED_CLASSES:
        size, angle = min(9.0, 420 / classes), 45 if classes <= COUNTED_CLASSES else 90
        names = [label(name) for name in class_names]
        axes.set_xticks(
            range(classes),
            names,
            size=size,
            rotation=angle,
            ha="right",
            rotation_mode="anchor",
            va="center" if angle == 90 else "top",
        )
        axes.set_yticks(range(classes), names, size=size)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"predicted class ({classes:,})" + _worst_pairs(confusion, class_names))
        axes.set_ylabel(f"true class ({classes:,})")
    if classes <= COUNTED_CLASSES:
        _draw_cells(axes, confusion, share.filled(0))
    return figure


def _worst_pairs(confusion: np.ndarray, class_names: Sequence[str], pairs: int = 5) -> str:
    """The most frequent confusions, a line each."""
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    worst = [
        divmod(int(i), len(wrong)) for i in np.argsort(-wrong, axis=None, kind="stable")[:pairs]
    ]
    return "".join(
        f"\n{wrong[i, j]:,} × {label(class_names[i], 40)} taken for {label(class_names[j], 40)}"
        for i, j in worst
        if wrong[i, j]
    )


def _draw_cells(axes: "Axes", confusion: np.ndarray, share: np.ndarray) -> None:
    classes = len(confusion)
    edges = np.arange(classes + 1) - 0.5
    axes.hlines(edges, -0.5, classes - 0.5, color=PALE, lw=1)
    axes.vlines(edges, -0.5, classes - 0.5, color=PALE, lw=1)
    size = max(5.0, min(9.0, 34 / len(str(confusion.max())) * 10 / max(classes, 10)))
    centred: Any = {"ha": "center", "va": "center"}
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.3 else INK
        axes.text(
            column,
            row,
            str(confusion[row, column]),
            size=size,
            color=colour,
            **centred,
        )


def draw_mistakes(items: Sequence[Mistake]) -> "Figure":
    """See `mistakes`: one axes an image, none when there are no mistakes."""
    items = list(items)[:GRID]
    if not items:
        figure = new_figure(5, 1)
        figure.text(
            0.5,
            0.5,
            "No mistakes: every example was classified correctly.",
            ha="center",
            va="center",
            size=11,
        )
        return figure
    columns = min(5, max(3, len(items)))  # the line above the images needs three
    rows = -(-len(items) // columns)
    cell_width, cell_height, head = 1.6, 1.95, 0.45  # inches
    width, height = columns * cell_width, rows * cell_height + head
    figure = new_figure(width, height)
    top = 1 - 0.24 / height
    figure.text(0.08 / width, top, "true class", weight="bold", va="center")
    figure.text(
        0.98 / width, top, "predicted class and its probability", color=VERMILLION, va="center"
    )
    for index, (image, true, predicted, probability) in enumerate(items):
        row, column = divmod(index, columns)
        left, bottom = column * cell_width + 0.08, (rows - 1 - row) * cell_height + 0.47
        size = cell_width - 0.16
        axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
        axes.imshow(
            np.squeeze(image, -1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255
        )
        axes.set_anchor("S")
        axes.set_axis_off()
        x = left / width
        figure.text(
            x, (bottom - 0.14) / height, label(true, 22), size=8, weight="bold", va="center"
        )
        figure.text(
            x,
            (bottom - 0.3) / height,
            f"{label(predicted, 17)} ({probability:.2f})",
            size=8,
            color=VERMILLION,
            va="center",
        )
    return figure
