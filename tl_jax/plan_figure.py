"""The plan as a picture: the chain of blocks, each filled by the share of it that trains."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tl_jax.figure_style import GREY, INK, ORANGE, PALE, SKY, count, label, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Block = tuple[str, int, int, Sequence[str]]

ROW = 20  # blocks in one row
MARGIN, STEP, GAP, BOX_HEIGHT = 0.35, 0.4, 0.1, 1.3  # inches; a step is a box and a gap


def draw_plan(blocks: Sequence[Block]) -> "Figure":
    """One axes in inches: a box a block, the dashed line is the boundary.

    Args:
      blocks: see `figures.plan`.
    """
    columns = max(1, -(-len(blocks) // -(-len(blocks) // ROW))) if blocks else 1
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    boundary = next((i for i, block in enumerate(blocks) if block[1]), None)
    deepest = max((_caption_height(row) for row in rows), default=0.0)
    row_height = 0.3 + BOX_HEIGHT + 0.32 + deepest
    width = max(5.2, columns * STEP + 2 * MARGIN)
    height = len(rows) * row_height + 0.6
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    _draw_totals(axes, blocks, MARGIN + GAP / 2, height - 0.28)
    for number, row in enumerate(rows):
        bottom = height - 0.5 - number * row_height - 0.3 - BOX_HEIGHT
        axes.hlines(
            bottom + BOX_HEIGHT / 2,
            MARGIN + STEP / 2,
            MARGIN + (len(row) - 0.5) * STEP,
            color=GREY,
            lw=1,
            zorder=0,
        )
        for i, block in enumerate(row):
            _draw_block(axes, block, MARGIN + i * STEP, bottom)
        _draw_groups(axes, row, MARGIN, bottom - 0.3)
        if boundary is not None and boundary // columns == number:
            x = MARGIN + boundary % columns * STEP
            axes.vlines(
                x, bottom - 0.06, bottom + BOX_HEIGHT + 0.08, color=INK, lw=1.2, ls=(0, (3, 2))
            )
            axes.text(x, bottom + BOX_HEIGHT + 0.11, "boundary", size=7.5, ha="center", va="bottom")
    return figure


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
        centre,
        bottom + BOX_HEIGHT / 2,
        label(name, 20),
        size=7.5,
        rotation=90,
        ha="center",
        va="center",
    )
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
