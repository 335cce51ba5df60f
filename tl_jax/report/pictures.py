"""The charts by matplotlib: PNG for Markdown, PDF for papers; same numbers, same bytes."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_jax.figure_style import GREY, PALE, label, new_figure, style
from tl_jax.report.charts import Axis, Chart, Panel, Series, log_ticks
from tl_jax.report.styles import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
WIDTH, HEIGHT = 3.5, 2.9  # of a panel, inches
ROW = 0.22  # of a name


def render(draw: Callable[..., "Figure"], *args: Any) -> tuple[bytes, bytes]:
    """A figure built by `draw(*args)`, as PNG and, without a date, as PDF."""
    with style():
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = draw(*args)
        FigureCanvasAgg(figure)
        png, pdf = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            metadata = {"CreationDate": None, "Producer": None, "Creator": None}
            figure.savefig(pdf, format="pdf", metadata=metadata)
    return png.getvalue(), pdf.getvalue()


def draw(chart: Chart) -> "Figure":
    """The chart's panels, three in a row, and below them who is who."""
    count = len(chart.panels)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    names = max((len(panel.y.ticks or ()) for panel in chart.panels), default=0)
    legend = _legend(chart.panels)
    width = max(columns * WIDTH + (1.2 if names else 0), 5.0)
    per_line = max(1, int(width / 1.7))
    below = ROW * -(-len(legend) // per_line)
    height = rows * max(HEIGHT if not names else 0.9, 0.9 + ROW * names) + below
    figure = new_figure(width, height, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.04)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_axis_off()
    for one, panel in zip(axes, chart.panels, strict=False):
        _draw_panel(one, panel)
    if legend:
        handles = [_handle(series) for series in legend]
        figure.legend(
            handles=handles, loc="outside lower left", ncols=per_line, fontsize=8, handlelength=2.8
        )
    figure.draw_without_rendering()  # settles the layout that the names must fit into
    figure.set_layout_engine("none")
    for one, panel in zip(axes, chart.panels, strict=False):
        _name_points(one, [series for series in panel.series if series.named])
    return figure


def _legend(panels: Sequence[Panel]) -> list[Series]:
    """One series of each name, unless their names stand at the axis already."""
    found: dict[str, Series] = {}
    for panel in panels:
        for series in panel.series:
            if series.points and panel.y.ticks is None:
                found.setdefault(series.name, series)
    return sorted(found.values(), key=lambda series: -1 if series.style is None else series.style)


def _handle(series: Series) -> Any:
    from matplotlib.lines import Line2D

    kind = look(series.style)
    return Line2D(
        [],
        [],
        color=kind.colour,
        marker=kind.marker[0] if series.style is not None else None,
        ls=kind.dash[0] if series.line else "none",
        ms=5,
        label=label(series.name, 22),
    )


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    axes.set_title(label(panel.title, 44), size=9)
    axes.set_axisbelow(True)
    axes.grid(color=PALE)
    points = [point for series in panel.series for point in series.points]
    _set(axes.xaxis, panel.x, [x for x, _ in points])
    _set(axes.yaxis, panel.y, [y for _, y in points])
    if panel.y.ticks is not None:
        axes.set_ylim(len(panel.y.ticks) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    for series in panel.series:
        if series.points:
            _draw_series(axes, series, along_x=panel.y.ticks is not None)


def _set(axis: Any, description: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis.set_label_text(label(description.label, 60))
    if description.ticks is not None:
        names = [label(name, 22) for name in description.ticks]
        axis.set_ticks(range(len(names)), names, size=8)
    elif description.log:
        axis._set_axes_scale("log")
        axis.set_major_locator(FixedLocator(log_ticks(values)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    elif description.whole:
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_series(axes: "Axes", series: Series, *, along_x: bool) -> None:
    kind = look(series.style)
    x, y = zip(*series.points, strict=True)
    axes.plot(
        x,
        y,
        color=kind.colour,
        ls=kind.dash[0] if series.line else "none",
        lw=1.4 if series.style is not None else 1.0,
        marker=kind.marker[0] if series.marked else None,
        mfc="white" if series.hollow else kind.colour,
        ms=5 if len(x) <= 30 else 0,
        zorder=2 if series.style is not None else 1,
    )
    for (px, py), span in zip(series.points, series.spans, strict=False):
        if span is not None:
            lines = axes.hlines if along_x else axes.vlines
            lines(py if along_x else px, *span, color=kind.colour, lw=1.2, alpha=0.7)


def _name_points(axes: "Axes", named: Sequence[Series]) -> None:
    """Writes names beside their points where there is room; the others are in the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(axes.figure)  # type: ignore[arg-type]
    renderer = canvas.get_renderer()
    taken = []
    strokes = [line.get_xydata() for line in axes.lines]
    strokes += [one for group in axes.collections for one in group.get_segments()]  # type: ignore[attr-defined]
    for stroke in strokes:
        ends = axes.transData.transform(stroke)
        reach = 5 if len(ends) == 1 else 1
        steps = np.linspace(0, len(ends) - 1, 60 * (len(ends) - 1) + 1)
        every = [np.interp(steps, range(len(ends)), ends[:, axis]) for axis in (0, 1)]
        for x, y in zip(*every, strict=True):
            taken.append((x - reach, y - reach, x + reach, y + reach))
    room = axes.get_window_extent(renderer)
    for series in named:
        for dx, dy, across, up in (
            (6, 0, "left", "center"),
            (-6, 0, "right", "center"),
            (0, 6, "center", "bottom"),
            (0, -6, "center", "top"),
            (5, 6, "left", "bottom"),
            (5, -6, "left", "top"),
            (-5, 6, "right", "bottom"),
            (-5, -6, "right", "top"),
        ):
            text = axes.annotate(
                label(series.name, 20),
                series.points[0],
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                size=7,
                color=GREY if series.style is None else look(series.style).colour,
            )
            box = text.get_window_extent(renderer)
            edges = (box.x0, box.y0, box.x1, box.y1)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 + 8 and room.y0 <= box.y0
            if inside and box.y1 <= room.y1 + 4 and not any(_meet(edges, one) for one in taken):
                taken.append(edges)
                break
            text.remove()


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart
