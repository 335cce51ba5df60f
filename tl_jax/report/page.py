"""The report as one HTML file that needs nothing from anywhere."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources

from tl_jax.report import plots
from tl_jax.report.answers import Answers
from tl_jax.report.charts import Chart
from tl_jax.report.sections import Block, Code, Paragraph, Plan, Section, headlines
from tl_jax.report.styles import look
from tl_jax.report.tables import Column, Table, Value
from tl_jax.report.words import NOTHING, Name, Sentence

LONG = 60  # characters: longer text is wrapped in its cell, longer code is cut but can be copied
# SVG paths of the markers on a 12 × 12 grid, in the order of `styles.MARKERS`.
SHAPES = {
    "circle": "M2 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M2.5 2.5h7v7h-7z",
    "triangle": "M6 2l4.5 8h-9z",
    "diamond": "M6 1l4 5l-4 5l-4-5z",
    "inverted_triangle": "M6 10l4.5-8h-9z",
    "hex": "M6 1.5l4 2.25v4.5l-4 2.25l-4-2.25v-4.5z",
}


def write(answers: Answers, sections: Sequence[Section], picture: Callable[[Plan], bytes]) -> str:
    """The document.

    Args:
      answers: for its name and first sentences.
      sections: what follows.
      picture: a plan → PNG.
    """
    writer = _Writer(answers, picture)
    body = writer.body(sections)
    style = _asset("report.css")
    scripts = [_asset("report.js")]
    if writer.panels:
        scripts.insert(0, plots.script())
    # Only these scripts run, by their hashes; Bokeh's style sheets are made as the page runs.
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(answers.sweep.name)}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        body,
        f'<script type="application/json" id="plots">{_json(writer.panels)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Untrusted text for an element or an attribute."""
    return html.escape(text, quote=True)


def _json(content: object) -> str:
    """JSON that no text inside can end."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (resources.files("tl_jax.report") / name).read_text("utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _Writer:
    """Writes the blocks and collects the plots' panels on the way."""

    def __init__(self, answers: Answers, picture: Callable[[Plan], bytes]):
        self.panels: list[object] = []
        self._answers, self._picture = answers, picture

    def body(self, sections: Sequence[Section]) -> str:
        links = "".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections)
        parts = [
            f"<header><h1>{escape(self._answers.sweep.name)}</h1>",
            *map(self._block, headlines(self._answers)),
            f'<nav aria-label="Sections">{links}</nav></header>',
            '<noscript><p class="note">The figures need JavaScript; report.md beside this file '
            "has them as pictures. All tables are complete.</p></noscript>",
            "<main>",
        ]
        inner = [self._section(section) for section in sections]  # before the key: it draws
        return "\n".join([*parts, self._key(), *inner, "</main>"])

    def _key(self) -> str:
        """Who is who in the plots; a click hides or shows."""
        if not self.panels:
            return ""
        shown = dict.fromkeys(s.strategy for a in self._answers.settings for s in a.standings)
        buttons = "".join(
            f'<button type="button" aria-pressed="true" data-style="style-{number}">'
            f"{_swatch(number)}{escape(strategy)}</button>"
            for number, strategy in enumerate(self._answers.sweep.strategies)
            if strategy in shown
        )
        return f'<div class="key" role="group" aria-label="Shown in the plots">{buttons}</div>'

    def _section(self, section: Section) -> str:
        blocks = "\n".join(map(self._block, section.blocks))
        title = escape(section.title)
        return f'<section id="{section.key}"><h2>{title}</h2>\n{blocks}\n</section>'

    def _block(self, block: Block) -> str:
        if isinstance(block, Paragraph):
            text = " ".join(map(_sentence, block.sentences))
            role = ' role="alert"' if block.kind == "warning" else ""
            return f'<p class="{block.kind or "plain"}"{role}>{text}</p>'
        if isinstance(block, Table):
            return _table(block)
        if isinstance(block, Chart):
            return self._chart(block)
        if isinstance(block, Plan):
            return self._plan(block)
        return _code(block)

    def _chart(self, chart: Chart) -> str:
        items = plots.items(chart, len(self.panels))
        places = "".join(f'<div class="plot" id="{item["target_id"]}"></div>' for item in items)
        self.panels += items
        own = _own_key(chart)
        return (
            f'<figure class="chart"><figcaption><b>{escape(chart.title)}.</b> '
            f'{escape(chart.text)}{own}</figcaption><div class="panels">{places}</div></figure>'
        )

    def _plan(self, plan: Plan) -> str:
        data = base64.b64encode(self._picture(plan)).decode()
        caption = escape(f"Plan of {plan.caption}")
        return (
            f'<figure class="plan"><img src="data:image/png;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _own_key(chart: Chart) -> str:
    """Lines that are no strategies are named where they are drawn."""
    every = (series for panel in chart.panels for series in panel.series if series.own)
    names = {series.name: series.style for series in every}
    return "".join(
        f' <span class="own">{_swatch(style)}{escape(name)}</span>' for name, style in names.items()
    )


def _sentence(sentence: Sentence) -> str:
    return "".join(
        f"<b>{escape(part.text)}</b>" if isinstance(part, Name) else _together(escape(part))
        for part in sentence
    )


def _together(text: str) -> str:
    """A number stays on the line of its unit."""
    return re.sub(r"(?<=\d) (?=[%×]|[KMGTP]?FLOP|(?:s|min|h|K|M) )", "\u00a0", text)


def _swatch(style: int | None) -> str:
    kind = look(style)
    dashes = ",".join(map(str, kind.dash[1])) or "none"
    return (
        '<svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path d="M0 6h28" stroke="{kind.colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        f'<path transform="translate(8)" d="{SHAPES[kind.marker[1]]}" fill="{kind.colour}"/></svg>'
    )


def _table(table: Table) -> str:
    heads = "".join(map(_head, table.columns))
    rows = "\n".join(
        "<tr>" + "".join(map(_cell, row, table.columns)) + "</tr>" for row in table.rows
    )
    # What the filter and the buttons are, the script adds: without it they would do nothing.
    return (
        f'<div class="scroll" tabindex="0"><table id="table-{table.key}">'
        f"<thead><tr>{heads}</tr></thead>"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _head(column: Column) -> str:
    kind = ' class="number"' if column.numeric else ""
    return f'<th scope="col"{kind}>{escape(column.title)}</th>'


def _cell(value: Value, column: Column) -> str:
    text = escape(value.text)
    text = f"<code>{text}</code>" if value.code else text
    kind = ' class="number"' if column.numeric else ""
    if len(value.text) > LONG:
        kind = f' title="{escape(value.text)}"' if value.code else ' class="long"'
    if value.text == NOTHING:
        text = f'<span class="nothing">{NOTHING}</span>'
    own = "" if value.exact == value.text else f' data-value="{escape(value.exact)}"'
    return f"<td{kind}{own}>{text}</td>"


def _code(code: Code) -> str:
    return f"<p>{escape(code.caption)}:</p><pre><code>{escape(code.text)}</code></pre>"
