"""Colour, marker and dashes of a strategy, the same in every figure, distinct for 42 of them."""

from dataclasses import dataclass

from tl_jax.figure_style import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILLION

PURPLE = "#CC79A7"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK)
# As matplotlib and as Bokeh name them.
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle"),
    ("D", "diamond"),
    ("v", "inverted_triangle"),
    ("h", "hex"),
)
DASHES: tuple[tuple[str, list[int]], ...] = (("-", []), ("--", [6, 3]), (":", [2, 3]))


@dataclass(frozen=True)
class Look:
    """How one strategy is drawn; `marker` and `dash` as (matplotlib's, Bokeh's)."""

    colour: str
    marker: tuple[str, str]
    dash: tuple[str, list[int]]


def look(style: int | None) -> Look:
    """That of a strategy's number; None is a line in grey."""
    if style is None:
        return Look(GREY, MARKERS[0], DASHES[0])
    return Look(
        COLOURS[style % len(COLOURS)],
        MARKERS[style % len(MARKERS)],
        DASHES[style // len(COLOURS) % len(DASHES)],
    )
