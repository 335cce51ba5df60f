"""The charts by Bokeh, as JSON that its script draws in a page."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tl_jax.figure_style import GREY, INK, PALE, label
from tl_jax.report.charts import Axis, Chart, Panel, Series, log_ticks
from tl_jax.report.styles import look

HEIGHT = 300  # of a panel, pixels
ROW = 24  # of a name
_DEFAULTS = ("selected", "selection_policy", "view")
_FONT = "system-ui, sans-serif"


def script() -> str:
    """Bokeh's own script: the core only, no widgets, no tables, no formulas."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)


def items(chart: Chart, first: int) -> list[dict[str, Any]]:
    """The chart's panels for `Bokeh.embed.embed_item`, one each.

    Args:
      chart: what to draw.
      first: number of the first panel on the page; `panel-{number}` is where it goes.
    """
    from bokeh.embed import json_item

    found = []
    for number, panel in enumerate(chart.panels, first):
        with _quiet():
            item: Any = json_item(_figure(panel), f"panel-{number}")  # type: ignore[arg-type]
        found.append(_renumbered(item, number))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Bokeh warns of plots without a title or data range; ours are complete."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _renumbered(item: Any, number: int) -> Any:
    """Bokeh counts its models through the life of a process; here they count from one.

    Models that are as the script would make them anyway are left out, and digits that no screen
    can show.
    """
    names: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            kept = ((key, content) for key, content in value.items() if key not in _DEFAULTS)
            found = {key: walk(content) for key, content in kept}
            own = value.get("id")
            if isinstance(own, str) and re.fullmatch(r"p\d+", own):
                found["id"] = names.setdefault(own, f"m{number}-{len(names) + 1}")
            return found
        return [walk(content) for content in value] if isinstance(value, list) else value

    item = walk(item)
    item["root_id"] = names[item["root_id"]]
    return item


def plain(text: str, limit: int = 60) -> str:
    """Untrusted text that Bokeh does not take for a formula: $$…$$, \\[…\\] and \\(…\\)."""
    return re.sub(r"(?<=[$\\])(?=[$\[\](){}])", "\u200b", label(text, limit))


def _figure(panel: Panel) -> Any:
    from bokeh.models import HoverTool, Range1d
    from bokeh.plotting import figure

    names = panel.y.ticks
    options: dict[str, Any] = {}
    if names is not None:
        options["y_range"] = Range1d(start=len(names) - 0.4, end=-0.6)
    plot = figure(
        height=HEIGHT if names is None else 80 + ROW * len(names),
        sizing_mode="stretch_width",
        min_width=260,
        x_axis_type="log" if panel.x.log else "linear",
        y_axis_type="log" if panel.y.log else "linear",
        tools="pan,box_zoom,reset,save",
        toolbar_location="above",
        title=plain(panel.title),
        x_axis_label=plain(panel.x.label),
        y_axis_label=plain(panel.y.label) or None,
        **options,
    )
    _restrain(plot)
    points = [point for series in panel.series for point in series.points]
    _set(plot.xaxis[0], panel.x, [x for x, _ in points])
    _set(plot.yaxis[0], panel.y, [y for _, y in points])
    drawn = []
    for series in panel.series:
        if series.points:
            drawn += _draw_series(plot, series, along_x=names is not None)
    # An at sign fills in the column's text, escaped.
    hover = HoverTool(
        renderers=drawn, tooltips=[("", "@name"), ("", "@note")], point_policy="snap_to_data"
    )
    plot.add_tools(hover)
    return plot


def _restrain(plot: Any) -> None:
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.outline_line_color = None
    plot.background_fill_color = plot.border_fill_color = "white"
    plot.xgrid.grid_line_color = plot.ygrid.grid_line_color = PALE
    plot.title.visible = bool(plot.title.text)
    plot.title.text_font = _FONT
    plot.title.text_font_size = "13px"
    plot.title.text_color = INK
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_line_color = axis.major_tick_line_color = GREY
        axis.minor_tick_line_color = None


def _set(axis: Any, description: Axis, values: Sequence[float]) -> None:
    """The ticks of an axis over these values."""
    from bokeh.models import BasicTickFormatter

    if description.ticks is not None:
        names = [plain(name, 24) for name in description.ticks]
        axis.ticker = list(range(len(names)))
        axis.major_label_overrides = dict(enumerate(names))
    elif description.log:
        axis.ticker = log_ticks(values)
        axis.formatter = BasicTickFormatter(use_scientific=False)
    elif description.whole:
        axis.ticker.min_interval = 1


def _draw_series(plot: Any, series: Series, *, along_x: bool) -> list[Any]:
    """Draws it, all under the style's name, and returns what a mouse may hover over."""
    from bokeh.models import ColumnDataSource

    kind = look(series.style)
    tag = "own" if series.own or series.style is None else f"style-{series.style}"
    x, y = (list(values) for values in zip(*series.points, strict=True))
    notes = list(series.notes) or [""] * len(x)
    data = ColumnDataSource({"x": x, "y": y, "name": [series.name] * len(x), "note": notes})
    if any(span is not None for span in series.spans):
        _draw_spans(plot, series, tag, along_x=along_x)
    found = []
    if series.line:
        width = 2 if series.style is not None else 1.5
        dash = kind.dash[1] or "solid"
        line: Any = {"color": kind.colour, "line_width": width, "line_dash": dash}
        _lighten(plot.line("x", "y", source=data, name=tag, **line))
    if series.marked:
        fill = "white" if series.hollow else kind.colour
        size = 8 if len(x) <= 30 else 4
        found.append(
            plot.scatter(
                "x",
                "y",
                source=data,
                marker=kind.marker[1],
                size=size,
                line_color=kind.colour,
                fill_color=fill,
                name=tag,
            )
        )
    return [_lighten(renderer) for renderer in found]


def _lighten(renderer: Any) -> Any:
    """Nothing can be selected or muted here, so looks for that are left out of the page."""
    renderer.nonselection_glyph = renderer.muted_glyph = None
    return renderer


def _draw_spans(plot: Any, series: Series, tag: str, *, along_x: bool) -> None:
    ends = [(p, s) for p, s in zip(series.points, series.spans, strict=False) if s is not None]
    colour = look(series.style).colour
    along, across = (0, 1) if along_x else (1, 0)
    columns: dict[int, Sequence[Any]] = {
        along: ([s[0] for _, s in ends], [s[1] for _, s in ends]),
        across: ([p[across] for p, _ in ends],) * 2,
    }
    (x0, x1), (y0, y1) = columns[0], columns[1]
    _lighten(plot.segment(x0, y0, x1, y1, color=colour, line_width=1.5, alpha=0.6, name=tag))
