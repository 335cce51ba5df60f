"""Pictures of a run as PNG bytes: learning curves, confusion matrix, mistakes, and the plan.

Each `draw_…` builds a matplotlib Figure inside `style()`; the function of the same name without
`draw_` renders it. No pyplot, no state that outlives a call. Class names are untrusted text.
"""

import contextlib
import io
import math
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Block = tuple[str, int, int, Sequence[str]]
Mistake = tuple[np.ndarray, str, str, float]

# Okabe & Ito's palette, distinct for every common form of colour blindness.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
INK, GREY, PALE = "#222222", "#767676", "#EDEDED"
COUNTED_CLASSES = 20  # up to here the cells of a confusion matrix hold their counts
NAMED_CLASSES = 60  # up to here its rows and columns are named
GRID = 25  # mistakes in one picture
ROW = 20  # blocks in one row of the plan
# Fonts with the letters that DejaVu lacks, used where they are installed.
FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for these figures, while they are built and while they are rendered."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    settings = {
        "text.parse_math": False,
        "font.family": ["DejaVu Sans", *(name for name in FONTS if name in installed)],
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "figure.dpi": 150,
        "savefig.dpi": 150,
    }
    with matplotlib.rc_context(defaults | settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def learning_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss and accuracy of training and validation over the steps, PNG.

    Args:
      records: the lines of `metrics.jsonl`; those with `step`, `split` ("train" or "validation")
        and `loss` (nats) or `accuracy` are drawn. A value that is not finite leaves a gap and a
        cross; of two records of one step the later counts.
    """
    return _png(draw_learning_curves, records)


def confusion_matrix(confusion: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Confusion matrix, PNG. A cell's colour is its share of the true class (its row).

    Args:
      confusion: int [C, C], examples by true class (rows) and predicted class (columns).
      class_names: C names. Counts above 0 are written for C ≤ 20, names for C ≤ 60.
    """
    return _png(draw_confusion_matrix, confusion, class_names)


def mistakes(items: Sequence[Mistake]) -> bytes:
    """Grid of wrongly classified images, PNG.

    Args:
      items: (image uint8 [h, w, 1 | 3], true name, predicted name, probability of the
        prediction); the first 25 are drawn, in their order.
    """
    return _png(draw_mistakes, items)


def plan(blocks: Sequence[Block]) -> bytes:
    """The chain of blocks, each filled by the share of its parameters that trains, PNG.

    Args:
      blocks: (name, number of trainable parameters, of frozen ones, names of its groups), from
        the stem to the head.
    """
    return _png(draw_plan, blocks)


def _png(draw: Callable[..., "Figure"], *args: Any) -> bytes:
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = draw(*args)
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _figure(width: float, height: float, **options: Any) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def label(text: Any, limit: int = 24) -> str:
    """Untrusted text on one line: what cannot be printed left out, cut to `limit` columns."""
    words = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    ends = list(accumulate(1 + (unicodedata.east_asian_width(c) in "WF") for c in words))
    if not words or ends[-1] <= limit:
        return words
    return words[: bisect_left(ends, limit)].rstrip() + "…"


def count(number: int) -> str:
    """A number in three digits: 812, 20.5K, 23.5M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= 0.9995 * size:
            return (
                f"{number / size:.{2 - (number >= 9.995 * size) - (number >= 99.95 * size)}f}{unit}"
            )
    return str(number)


def draw_learning_curves(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """See `learning_curves`: two axes, in each one line for every split that has values."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8, 3.2, layout="constrained")
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
        for split, colour in (("train", BLUE), ("validation", VERMILLION)):
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
    name = split
    if (split, field) == ("validation", "accuracy") and finite.any():
        name += f" (best {values[finite].max():.3f})"
    few = len(steps) <= 30
    axes.plot(
        steps, np.where(finite, values, np.nan), color=colour, label=name, lw=1.6,
        marker="o" if few else None, ms=4,
    )  # fmt: skip
    if not finite.all():
        axes.plot(
            steps[~finite], np.full((~finite).sum(), 0.03), "x", color=colour, ms=6, mew=1.6,
            label=f"{split}: not finite", transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def draw_confusion_matrix(confusion: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """See `confusion_matrix`: the matrix's axes first, then the colour bar's."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    confusion = np.asarray(confusion)
    classes, totals = len(confusion), confusion.sum(1, keepdims=True)
    share = np.ma.masked_invalid(np.where(totals, confusion / np.maximum(totals, 1), np.nan))
    ramp = LinearSegmentedColormap.from_list("share", ["#FFFFFF", SKY, BLUE, "#00324F"])
    colours = ramp.with_extremes(bad=PALE)
    side = min(8.0, max(4.6, 2.6 + 0.42 * classes))
    figure = _figure(side + 0.6, side, layout="constrained")
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
            va="center" if angle == 90 else "baseline",
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
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.3 else INK
        axes.text(
            column, row, str(confusion[row, column]), ha="center", va="center", size=size, color=colour
        )  # fmt: skip


def draw_mistakes(items: Sequence[Mistake]) -> "Figure":
    """See `mistakes`: one axes an image, none when there are no mistakes."""
    items = list(items)[:GRID]
    if not items:
        figure = _figure(5, 1)
        figure.text(0.5, 0.5, "No mistakes: every example was classified correctly.",
                    ha="center", va="center", size=11)  # fmt: skip
        return figure
    columns = min(5, max(3, len(items)))  # the line above the images needs three
    rows = -(-len(items) // columns)
    cell_width, cell_height, head = 1.6, 1.95, 0.45  # inches
    width, height = columns * cell_width, rows * cell_height + head
    figure = _figure(width, height)
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
        figure.text(x, (bottom - 0.3) / height, f"{label(predicted, 17)} {probability:.2f}",
                    size=8, color=VERMILLION, va="center")  # fmt: skip
    return figure


def draw_plan(blocks: Sequence[Block]) -> "Figure":
    """See `plan`: one axes in inches; the dashed line is the boundary."""
    columns = max(1, -(-len(blocks) // -(-len(blocks) // ROW))) if blocks else 1
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    boundary = next((i for i, block in enumerate(blocks) if block[1]), None)
    deepest = max((_caption_height(row) for row in rows), default=0.0)
    row_height = 0.3 + BOX_HEIGHT + 0.32 + deepest
    width = max(4.4, columns * STEP + 0.7)
    height = len(rows) * row_height + 0.6
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    left = (width - columns * STEP) / 2
    _draw_totals(axes, blocks, left + GAP / 2, height - 0.28)
    for number, row in enumerate(rows):
        bottom = height - 0.5 - number * row_height - 0.3 - BOX_HEIGHT
        axes.hlines(
            bottom + BOX_HEIGHT / 2, left + STEP / 2, left + (len(row) - 0.5) * STEP,
            color=GREY, lw=1, zorder=0,
        )  # fmt: skip
        for i, block in enumerate(row):
            _draw_block(axes, block, left + i * STEP, bottom)
        _draw_groups(axes, row, left, bottom - 0.3)
        if boundary is not None and boundary // columns == number:
            x = left + boundary % columns * STEP
            axes.vlines(
                x, bottom - 0.06, bottom + BOX_HEIGHT + 0.08, color=INK, lw=1.2, ls=(0, (3, 2))
            )
            axes.text(x, bottom + BOX_HEIGHT + 0.11, "boundary", size=7.5, ha="center", va="bottom")
    return figure


STEP, GAP, BOX_HEIGHT = 0.4, 0.1, 1.3  # inches: from block to block, between two, up


def _draw_totals(axes: "Axes", blocks: Sequence[Block], left: float, y: float) -> None:
    """The numbers of parameters, which are the legend of the colours too."""
    trainable, frozen = sum(block[1] for block in blocks), sum(block[2] for block in blocks)
    percent = 100 * trainable / max(trainable + frozen, 1)
    for x, colour, words in (
        (left, SKY, f"frozen {count(frozen)}"),
        (left + 1.3, ORANGE, f"trainable {count(trainable)} ({percent:.3g} % of the parameters)"),
    ):
        axes.add_patch(_box(x, y - 0.07, 0.14, 0.14, colour))
        axes.text(x + 0.22, y, words, va="center")


def _draw_block(axes: "Axes", block: Block, left: float, bottom: float) -> None:
    name, trainable, frozen, _ = block
    total = trainable + frozen
    x, width = left + GAP / 2, STEP - GAP
    axes.add_patch(_box(x, bottom, width, BOX_HEIGHT, SKY if total else PALE))
    if trainable:
        # A sliver would be lost: what trains in part shows at least a tenth, at most nine.
        share = min(max(trainable / total, 0.1), 0.9) if frozen else 1.0
        axes.add_patch(_box(x, bottom, width, BOX_HEIGHT * share, ORANGE))
    centre = x + width / 2
    axes.text(
        centre, bottom + BOX_HEIGHT / 2, label(name, 20), size=7.5, rotation=90, ha="center", va="center"
    )  # fmt: skip
    if total:
        axes.text(centre, bottom - 0.05, count(total), size=6.5, ha="center", va="top", color=GREY)


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none")


def _runs(row: Sequence[Block]) -> list[tuple[str, int]]:
    """Neighbouring blocks of the same groups: their names in one string, and how many blocks."""
    return [
        (label(", ".join(groups), 30), len(list(run)))
        for groups, run in groupby(row, lambda block: tuple(block[3]))
    ]


def _fits(text: str, blocks: int) -> bool:
    return len(text) * 0.06 <= blocks * STEP


def _caption_height(row: Sequence[Block]) -> float:
    return max((0.18 if _fits(text, n) else 0.06 * len(text) + 0.1 for text, n in _runs(row)))


def _draw_groups(axes: "Axes", row: Sequence[Block], left: float, y: float) -> None:
    start = left
    for text, blocks in _runs(row):
        end = start + blocks * STEP
        if text:
            axes.hlines(y + 0.05, start + GAP / 2, end - GAP / 2, color=GREY, lw=1)
            rotation = 0 if _fits(text, blocks) else 90
            axes.text((start + end) / 2, y, text, size=7, ha="center", va="top", rotation=rotation)
        start = end
