"""The report as Markdown, with figures beside it."""

import re
from collections.abc import Iterable, Sequence

from tl_jax.report.answers import Answers
from tl_jax.report.charts import Chart
from tl_jax.report.sections import Block, Code, Paragraph, Plan, Section, headlines
from tl_jax.report.tables import Table, Value
from tl_jax.report.words import Name, Sentence

MARKS = {"warning": "> ⚠ ", "note": "> "}


def write(answers: Answers, sections: Sequence[Section]) -> str:
    """The document; figures are looked for under `figures/`."""
    lines = [f"# {escape(answers.sweep.name)}", ""]
    for paragraph in headlines(answers):
        lines += _block(paragraph)
    for section in sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += _block(block)
        if section.key == "cells":
            lines += _commands(answers)
    return "\n".join(lines).rstrip() + "\n"


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [MARKS.get(block.kind, "") + " ".join(map(_sentence, block.sentences)), ""]
    if isinstance(block, Table):
        return _table(block.brief())
    if isinstance(block, Chart):
        return _chart(block)
    if isinstance(block, Plan):
        return _picture(block.key, f"Plan of {block.caption}", "")
    return _code(block)


def _sentence(sentence: Sentence) -> str:
    return "".join(name(p.text) if isinstance(p, Name) else escape(p) for p in sentence)


def _chart(chart: Chart) -> list[str]:
    return _picture(chart.key, chart.title, chart.text)


def _picture(key: str, title: str, text: str) -> list[str]:
    head = f"**{escape(title)}.** {escape(text)}".rstrip()
    link = f"![{escape(title)}](figures/{key}.png)"
    return [f"{head} ([PDF](figures/{key}.pdf))", "", link, ""]


def _table(table: Table) -> list[str]:
    titles = [escape(column.title) for column in table.columns]
    rules = ["--:" if column.numeric else ":--" for column in table.columns]
    rows = [[_value(value) for value in row] for row in table.rows]
    return [*map(_row, (titles, rules, *rows)), ""]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(value: Value) -> str:
    return escape(value.text)


def _code(code: Code) -> list[str]:
    return [f"{escape(code.caption)}:", "", *fenced(code.text), ""]


def _commands(answers: Answers) -> list[str]:
    """How to make each cell again."""
    commands = [cell.command for cell in answers.sweep.cells if cell.command]
    if not commands:
        return []
    return ["To make them again, a line each:", "", *fenced("\n".join(commands)), ""]


def fenced(text: str) -> list[str]:
    """A block of code whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", text, fence]


def name(text: str) -> str:
    """A name set off: as code where it holds nothing that Markdown reads, else in bold."""
    if re.fullmatch(r"[\w.,:/+= -]+", text) and text == text.strip():
        return f"`{text}`"
    return f"**{escape(text)}**"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no link, one line."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text)
    return re.sub(r"(https?|ftp)(?=:)|(www)(?=\.)|@(?=\w)", _broken, text)


def _broken(found: re.Match[str]) -> str:
    """An address that no reader turns into a link."""
    return found[0] + "\u200b"
