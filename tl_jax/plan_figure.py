"""The plan as a picture: the chain of blocks, each filled by its groups' shares, a row a phase."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tl_jax import plan_rows
from tl_jax.figure_style import (
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
    count,
    label,
    new_figure,
)
from tl_jax.plan_rows import Leaf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"frozen": SKY, "trunk": ORANGE, "head": VERMILLION, "adapter": GREEN}
PALEST = 0.3  # part of its colour in the slowest of many groups
LEAST = 0.1  # share of a box that the least share fills: a sliver would be lost

# Inches. A step is a box and a gap.
COLUMNS = 20  # in one row
MARGIN, STEP, GAP = 0.25, 0.42, 0.1
TALL, LOW = 1.3, 0.42  # boxes of the only phase, of one of many
PHASE_GAP, TITLE_WIDTH = 0.14, 1.6  # between the rows of phases, and left of them
LINE, SWATCH = 0.24, 0.14


def draw_plan(plan: Mapping[str, Any]) -> "Figure":
    """One axes in inches; see `figures.plan`.

    Args:
      plan: the content of `plan.json`.
    """
    blocks, phases = plan["blocks"], plan["phases"]
    lines = -(-len(blocks) // COLUMNS)
    columns = -(-len(blocks) // lines)
    left = MARGIN + (TITLE_WIDTH if len(phases) > 1 else 0)
    width = max(5.8, left + columns * STEP + MARGIN)
    colours = _colours(phases)
    legend = _legend_lines(_legend(plan, colours), width - 2 * MARGIN)
    scaled = len({leaf["learning_rate_multiplier"] for leaf in _training(phases)}) > 1
    above = 0.05 + 0.06 * max(map(len, map(_name, blocks))) if len(phases) > 1 else 0.0
    boxes = LOW if len(phases) > 1 else TALL
    rows = len(phases) * (boxes + PHASE_GAP) - PHASE_GAP
    chain = 0.1 + above + rows + 0.2 + (0.14 if scaled else 0)  # of boxes, with what is written
    head = 0.2 + LINE * (1 + len(legend))
    height = head + lines * (chain + 0.12)
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    _draw_head(axes, plan, legend, height - 0.22)
    for line in range(lines):
        numbers = range(line * columns, min((line + 1) * columns, len(blocks)))
        top = height - head - 0.1 - line * (chain + 0.12) - above
        for row, phase in enumerate(phases):
            bottom = top - row * (boxes + PHASE_GAP) - boxes
            _draw_phase(axes, phase, numbers, colours, (left, bottom, boxes))
            if len(phases) > 1:
                _draw_title(axes, row, phase, bottom + boxes / 2)
        for column, number in enumerate(numbers):
            centre = left + (column + 0.5) * STEP
            y, align = (top + 0.06, "bottom") if len(phases) > 1 else (top - boxes / 2, "center")
            axes.text(
                centre, y, _name(blocks[number]), size=7.5, rotation=90, ha="center", va=align
            )
            _draw_numbers(axes, plan, number, scaled, centre, top - rows - 0.05)
    return figure


def _name(block: str) -> str:
    return label(block, 20)


def _training(phases: Sequence[Mapping[str, Any]]) -> list[Leaf]:
    """The leaves that train, of all phases."""
    return [leaf for phase in phases for leaf in phase["leaves"] if leaf["group"] != "frozen"]


def _colours(phases: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each group: that of its kind, the stronger the faster or the higher it is."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in _training(phases):
        groups.setdefault(leaf["group"], []).append(leaf)

    def speed(name: str) -> tuple[float, int]:
        multipliers = [leaf["learning_rate_multiplier"] for leaf in groups[name]]
        return max(multipliers), min(leaf["block_index"] for leaf in groups[name])

    families: dict[str, list[str]] = {}
    for name in sorted(groups, key=speed):
        families.setdefault(name.partition("/")[0], []).append(name)
    colours = {"frozen": SKY}
    for family, names in families.items():
        for rank, name in enumerate(names, start=1):
            part = 1 if len(names) == 1 else PALEST + (1 - PALEST) * (rank - 1) / (len(names) - 1)
            colours[name] = _mixed(COLOURS.get(family, ORANGE), part)
    return colours


def _mixed(colour: str, part: float) -> str:
    """So much of a colour, the rest white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (channel - 255) * part):02X}" for channel in channels)


Entry = tuple[str, list[str]]  # words, and the colours in front of them ([] for the boundary)


def _legend(plan: Mapping[str, Any], colours: Mapping[str, str]) -> list[Entry]:
    """What the colours mean; a group's parameters are those that it trains in any phase."""
    frozen = plan_rows.parameters(leaf for leaf in plan["leaves"] if leaf["group"] == "frozen")
    throughout = " throughout" if len(plan["phases"]) > 1 else ""
    entries = []
    if any(leaf["group"] == "frozen" for phase in plan["phases"] for leaf in phase["leaves"]):
        entries.append((f"frozen {count(frozen)}{throughout}" if frozen else "frozen", [SKY]))
    once = {(leaf["path"], leaf["group"]): leaf for leaf in _training(plan["phases"])}
    for name, leaves in plan_rows.by_group(once.values()).items():
        multipliers = {leaf["learning_rate_multiplier"] for leaf in leaves}
        rate = f", rate × {plan_rows.span(multipliers)}" if multipliers != {1.0} else ""
        shades = sorted({leaf["group"] for leaf in leaves}, key=list(colours).index)
        words = f"{label(name, 30)} {count(plan_rows.parameters(leaves))}{rate}"
        entries.append((words, [colours[shade] for shade in shades]))
    return [*entries, ("gradients end here", [])]


def _legend_lines(entries: Sequence[Entry], width: float) -> list[list[tuple[float, Entry]]]:
    """The entries in lines that fit, each with its place from the left."""
    lines: list[list[tuple[float, Entry]]] = [[]]
    x = 0.0
    for entry in entries:
        needed = SWATCH * 1.5 + 0.07 * len(entry[0]) + 0.2
        if lines[-1] and x + needed > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, entry))
        x += needed
    return lines


def _draw_head(
    axes: "Axes",
    plan: Mapping[str, Any],
    legend: Sequence[Sequence[tuple[float, Entry]]],
    y: float,
) -> None:
    total = plan_rows.parameters(plan["leaves"])
    trained = plan_rows.parameters(leaf for leaf in plan["leaves"] if leaf["group"] != "frozen")
    axes.text(
        MARGIN,
        y,
        f"{label(plan['strategy'], 30)}: {count(trained)} of {count(total)} parameters train "
        f"({100 * trained / max(total, 1):.3g} %)",
        weight="bold",
        va="center",
    )
    for number, line in enumerate(legend, start=1):
        for place, (words, colours) in line:
            x, middle = MARGIN + place, y - number * LINE
            for i, colour in enumerate(colours):
                part = SWATCH / len(colours)
                axes.add_patch(_box(x + i * part, middle - SWATCH / 2, part, SWATCH, colour))
            if not colours:
                _draw_boundary(axes, x + SWATCH / 2, middle - SWATCH / 2, SWATCH)
            axes.text(x + SWATCH * 1.5, middle, words, size=8, va="center")


def _draw_title(axes: "Axes", number: int, phase: Mapping[str, Any], y: float) -> None:
    trained = plan_rows.parameters(_training([phase]))
    for offset, words, size in (
        (0.13, label(f"{number + 1}. {phase['name']}", 22), 8.5),
        (0.0, f"steps {phase['first_step']:,} to {phase['last_step']:,}", 7),
        (-0.12, f"{count(trained)} train, rate {phase['learning_rate']:.3g}", 7),
    ):
        colour = INK if offset > 0 else GREY
        axes.text(MARGIN, y + offset, words, size=size, va="center", color=colour)


def _draw_phase(
    axes: "Axes",
    phase: Mapping[str, Any],
    numbers: Sequence[int],
    colours: Mapping[str, str],
    place: tuple[float, float, float],
) -> None:
    """The boxes of some blocks, from `place`: left, bottom and height."""
    left, bottom, height = place
    centre = bottom + height / 2
    right = left + (len(numbers) - 0.5) * STEP
    axes.hlines(centre, left + STEP / 2, right, color=GREY, lw=1, zorder=0)
    for column, number in enumerate(numbers):
        x = left + column * STEP
        here = [leaf for leaf in phase["leaves"] if leaf["block_index"] == number]
        if not here:
            axes.add_patch(_box(x + GAP / 2, bottom, STEP - GAP, height, PALE))
        y = bottom
        for group, share in _shares(here):
            axes.add_patch(_box(x + GAP / 2, y, STEP - GAP, height * share, colours[group]))
            y += height * share
        if number == phase["boundary"]:
            _draw_boundary(axes, x, bottom - 0.05, height + 0.1)


def _shares(leaves: Sequence[Leaf]) -> list[tuple[str, float]]:
    """Each group's part of a block's box, what is frozen on top."""
    sizes: dict[str, int] = {}
    for leaf in leaves:
        sizes[leaf["group"]] = sizes.get(leaf["group"], 0) + leaf["parameters"]
    total = max(sum(sizes.values()), 1)
    seen = {name: max(size / total, LEAST) for name, size in sizes.items()}
    order = sorted(seen, key=lambda name: (name == "frozen", name))
    return [(name, seen[name] / sum(seen.values())) for name in order]


def _draw_boundary(axes: "Axes", x: float, y: float, height: float) -> None:
    axes.vlines(x, y, y + height, color=INK, lw=1.2, ls=(0, (3, 2)))


def _draw_numbers(
    axes: "Axes", plan: Mapping[str, Any], number: int, scaled: bool, x: float, y: float
) -> None:
    """Below a block its parameters, and how fast it learns where that differs."""
    here = [leaf for leaf in plan["leaves"] if leaf["block_index"] == number]
    rates = {leaf["learning_rate_multiplier"] for leaf in here if leaf["group"] != "frozen"}
    if here:
        text = count(plan_rows.parameters(here))
        axes.text(x, y, text, size=6.5, ha="center", va="top", color=GREY)
    if scaled and len(rates) == 1:
        axes.text(
            x, y - 0.13, f"×{_short(rates.pop())}", size=6.5, ha="center", va="top", color=INK
        )


def _short(rate: float) -> str:
    """In five characters at most: 1, .056, .0024, 8e-4."""
    if rate < 1e-3:
        return f"{rate:.0e}".replace("e-0", "e-")
    return f"{rate:.2g}".removeprefix("0")


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none")
