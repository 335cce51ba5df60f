"""A sweep's results → `results.csv`, `report.html`, `report.md` and figures."""

from collections.abc import Mapping
from typing import Any

from tl_jax.plan_figure import draw_plan
from tl_jax.report import answers as answers_lib
from tl_jax.report import cell_table, cells, markdown, page, pictures, sections
from tl_jax.report.answers import Answers
from tl_jax.report.charts import Chart
from tl_jax.report.sections import Plan, Section
from tl_jax.report.words import plain
from tl_jax.workdir import WorkDir

__all__ = ["check", "write"]

FOLDER = "ablation"


def _compose(results: Mapping[str, Any]) -> tuple[Answers, list[Section]]:
    answers = answers_lib.find(cells.read(results))
    return answers, sections.find(answers)


def check(results: Mapping[str, Any]) -> None:
    """Makes of results all that the report says of them, and writes nothing.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: they are not what runs write.
    """
    answers, found = _compose(results)
    cell_table.csv_text(answers)
    markdown.write(answers, found)
    for section in found:
        for block in section.blocks:
            if isinstance(block, Plan):
                draw_plan(block.plan)


def write(workdir: WorkDir, results: Mapping[str, Any]) -> list[str]:
    """Writes the report on a sweep under `ablation/`; the same results give the same bytes.

    Args:
      workdir: of the sweep.
      results: name, axes, compared, command, environment and cells, each with its values, status,
        and where it is finished summary, plan, curves, hits, measures. Its text is untrusted.

    Returns:
      What the report says first, a paragraph a string.
    """
    answers, found = _compose(results)
    plans: dict[str, bytes] = {}
    for section in found:
        for block in section.blocks:
            if isinstance(block, Chart | Plan):
                what = (
                    (pictures.draw, block) if isinstance(block, Chart) else (draw_plan, block.plan)
                )
                png, pdf = pictures.render(*what)
                workdir.write_bytes(f"{FOLDER}/figures/{block.key}.png", png)
                workdir.write_bytes(f"{FOLDER}/figures/{block.key}.pdf", pdf)
                plans[block.key] = png
    workdir.write_bytes(f"{FOLDER}/results.csv", cell_table.csv_text(answers).encode())
    workdir.write_bytes(f"{FOLDER}/report.md", markdown.write(answers, found).encode())
    html = page.write(answers, found, lambda plan: plans[plan.key])
    workdir.write_bytes(f"{FOLDER}/report.html", html.encode())
    return [" ".join(map(plain, paragraph.sentences)) for paragraph in sections.headlines(answers)]
