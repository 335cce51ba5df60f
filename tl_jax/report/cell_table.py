"""Every cell with all its numbers: a table in the documents, and `results.csv`."""

import csv
import io
from collections.abc import Callable, Sequence

from tl_jax.report.answers import Answers
from tl_jax.report.cells import Cell, short_axis
from tl_jax.report.tables import (
    Column,
    Table,
    Value,
    bytes_text,
    count_text,
    flops_text,
    name,
    number,
    percent_text,
)
from tl_jax.report.words import points, seconds, short

# Of results.csv: the name there, the title in a page, how it is shown, whether a page has no room.
NUMBERS: Sequence[tuple[str, str, Callable[[float | None], str], bool]] = (
    ("learning_rate", "learning rate", short, False),
    ("accuracy", "accuracy", percent_text, False),
    ("accuracy_low", "accuracy from", percent_text, True),
    ("accuracy_high", "accuracy to", percent_text, True),
    ("loss", "loss", short, True),
    ("loss_low", "loss from", short, True),
    ("loss_high", "loss to", short, True),
    ("examples", "examples", count_text, True),
    ("validation_accuracy", "validation", percent_text, True),
    ("trainable_parameters", "trainable", count_text, True),
    ("optimizer_bytes", "optimizer", bytes_text, True),
    ("flops_per_step", "FLOPs a step", flops_text, True),
    ("training_flops", "FLOPs", flops_text, False),
    ("training_seconds", "training", seconds, False),
    ("train_seconds", "steps", seconds, True),
    ("total_seconds", "in all", seconds, True),
    ("cache_seconds", "caching", seconds, True),
    ("compile_seconds", "compiling", seconds, True),
    ("peak_memory_bytes", "peak memory of the process", bytes_text, True),
    ("shifted_accuracy", "shifted", percent_text, True),
    ("forgetting", "forgetting", points, True),
    ("drift_weights", "drift of weights", short, True),
    ("drift_cka", "1 − CKA", short, True),
)


def cells(answers: Answers) -> Table:
    """One row a cell, failed and missing ones too: what `results.csv` holds."""
    axes = list(answers.sweep.axes)
    columns = [
        *(Column(short_axis(axis)) for axis in axes),
        Column("status"),
        *(Column(title, numeric=True, wide=wide) for _, title, _, wide in NUMBERS),
        Column("certificate"),
        Column("error"),
        Column("work directory", wide=True),
        Column("command", wide=True),
    ]
    return Table("cells", columns, [_cell(cell, axes) for cell in answers.sweep.cells])


def _cell(cell: Cell, axes: Sequence[str]) -> list[Value]:
    return [
        *(name(cell.values[axis]) for axis in axes),
        name(cell.status),
        *(number(cell.numbers[key], form) for key, _, form, _ in NUMBERS),
        name(cell.certificate),
        name(cell.error),
        name(cell.workdir, code=True),
        name(cell.command, code=True),
    ]


def csv_text(answers: Answers) -> str:
    """`results.csv`: numbers with all their digits, accuracies as shares, times in seconds.

    An axis with the name of another column is `axis NAME` there. Text that a spreadsheet would take
    for a formula begins with an apostrophe.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    own = ["status", *(key for key, *_ in NUMBERS), "certificate", "error", "workdir", "command"]
    header = own
    for axis in reversed(list(answers.sweep.axes)):
        while axis in header:
            axis = f"axis {axis}"
        header = [axis, *header]
    writer.writerow(map(harmless, header))
    for row in cells(answers).rows:
        writer.writerow(harmless(value.exact) for value in row)
    return file.getvalue()


def harmless(text: str) -> str:
    """Text that no spreadsheet runs: an apostrophe before =, +, -, @, unless it is a number."""
    if text[:1] not in tuple("=+-@\t\r"):
        return text
    try:
        float(text)
    except ValueError:
        return "'" + text
    return text
