"""The work directories of a sweep → one table of results."""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tl_jax import ablation_work, report
from tl_jax.ablation_config import RATE, Cell, Sweep
from tl_jax.config import Config
from tl_jax.errors import DAMAGE, UserError
from tl_jax.workdir import WorkDir

_FILES = {"summary": "summary.json", "plan": "plan.json", "measures": "measures.json"}


def cell_path(cell: Cell) -> str:
    """Of its work directory inside the sweep's."""
    return f"cells/{cell.name}"


def overrides_of(cell: Cell, searched: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A cell's fields, the learning rate that was found for its group with them."""
    if not cell.rates:
        return list(cell.overrides)
    return [*cell.overrides, (RATE, repr(searched[cell.group]["learning_rate"]))]


def config_of(cell: Cell, searched: Mapping[str, Any]) -> Config:
    """What a cell runs with, the learning rate that was found for its group in it."""
    if not cell.rates:
        return cell.config
    optimizer = cell.config.optimizer
    rate = float(searched[cell.group]["learning_rate"])
    return replace(cell.config, optimizer=replace(optimizer, learning_rate=rate))


def collect(
    sweep: Sweep,
    workdir: WorkDir,
    command: Sequence[str],
    searched: Mapping[str, Any],
    errors: Mapping[str, str],
    estimates: Mapping[str, Any],
) -> dict[str, Any]:
    """What the cells left behind, as `report.write` takes it.

    Args:
      sweep: whose cells they are.
      workdir: of the sweep.
      command: its command line.
      searched: by group, the content of `search.json`.
      errors: by cell, why it has no result.
      estimates: by group, what `ablation_work.estimate` gave.
    """
    rows = [
        {
            **_row(cell, sweep, workdir, searched, errors.get(cell.name), estimates[cell.group]),
            "training_flops": estimates[cell.group]["flops"],
        }
        for cell in sweep.cells
    ]
    axes = {axis: list(names) for axis, names in sweep.axes.items()}
    cells = [_readable(row, sweep.compared, axes, workdir) for row in rows]
    finished = [cell["summary"] for cell in cells if cell["summary"]]
    return {
        "name": workdir.path.name,
        "axes": axes,
        "compared": sweep.compared,
        "command": shlex.join(command),
        "environment": finished[0]["environment"] if finished else {},
        "cells": cells,
    }


def _row(
    cell: Cell,
    sweep: Sweep,
    workdir: WorkDir,
    searched: Mapping[str, Any],
    error: str | None,
    estimate: Mapping[str, Any],
) -> dict[str, Any]:
    path = workdir.path / cell_path(cell)
    found = searched.get(cell.group)
    own = WorkDir(path)
    files: dict[str, Any] = dict.fromkeys(_FILES)
    curves, hits, command = [], None, ""
    rate = found["learning_rate"] if found else cell.config.optimizer.learning_rate
    if found is not None or not cell.rates:
        fields = overrides_of(cell, searched)
        command = ablation_work.command_of(sweep.config_file, fields, str(path))
    if error is None:
        try:
            files = {name: own.read_json(file) for name, file in _FILES.items()}
            if empty := [file for name, file in _FILES.items() if not files[name]]:
                raise LookupError(f"{' and '.join(empty)}: missing or empty")
            _check_config(own, config_of(cell, searched))
            for kind, name in (("run", "summary"), ("measures", "measures")):
                _check_made_of(own, _FILES[name], files[name] or {}, estimate["made_of"][kind])
            _check_numbers(files["summary"] or {}, files["measures"] or {})
            curves, hits = _curves(own), _hits(own, cell, files["summary"])
            if cell.config.probe.grid.learning_rate:
                rate = (files["summary"] or {})["probe"]["chosen"]["learning_rate"]
        except UserError as damaged:
            files, error = dict.fromkeys(_FILES), str(damaged)
        except DAMAGE as damaged:
            files = dict.fromkeys(_FILES)
            error = (
                f"its files are damaged ({type(damaged).__name__}: {damaged}): remove {path} and "
                "start the sweep again"
            )
    done = files["summary"] is not None and error is None
    return {
        "name": cell.name,
        "status": "finished" if done else "missing" if error is None else "failed",
        "error": error,
        "values": dict(cell.values),
        "workdir": cell_path(cell),
        "command": command,
        "learning_rate": rate,
        "search": found,
        **files,
        "curves": curves,
        "hits": hits,
    }


def _readable(
    row: dict[str, Any],
    compared: str,
    axes: Mapping[str, Sequence[str]],
    workdir: WorkDir,
) -> dict[str, Any]:
    """The row, or one that failed where its files hold something else than a run writes."""
    try:
        own = {} if row["summary"] is None else row["summary"]["environment"]
        alone = {"name": "", "compared": compared, "axes": axes, "environment": own}
        report.check({**alone, "cells": [row]})
        return row
    except DAMAGE as error:
        path = workdir.path / row["workdir"]
        what = f"{type(error).__name__}: {error}"
        nothing = dict.fromkeys((*_FILES, "hits"))
        why = f"its JSON files are damaged ({what}): remove {path} and start the sweep again"
        return {**row, **nothing, "curves": [], "status": "failed", "error": why}


def _check_config(own: WorkDir, config: Config) -> None:
    """Raises UserError if the run that lies there is not of this configuration."""
    if not own.read_json("config.json"):
        raise LookupError("config.json is missing or empty")
    if different := own.differences(config):
        raise UserError(
            f"{own.path} holds another run ({'; '.join(different)}): remove it and start the sweep "
            "again"
        )


def _check_made_of(
    own: WorkDir, file: str, content: Mapping[str, Any], now: Mapping[str, str]
) -> None:
    """Raises UserError if the file that lies there was not made of what all others are."""
    if not isinstance(content["made_of"], dict):
        raise TypeError("made_of is no object")
    if other := ablation_work.otherwise_made(content["made_of"], now):
        path = own.path if file == _FILES["summary"] else own.path / file
        raise UserError(
            f"{path} was made with other {', '.join(other)} than when the sweep was started: "
            "remove it and start the sweep again"
        )


def _check_numbers(summary: Mapping[str, Any], measures: Mapping[str, Any]) -> None:
    """Raises one of `DAMAGE` where times or measures are none that a run writes."""
    for name in ("train_seconds", "cache_seconds", "total_seconds"):
        if not 0 <= summary["cost"][name] < math.inf:
            raise ValueError(f"cost.{name} is {summary['cost'][name]}")
    for name in ("drift", "shifts", "gradients", "forgetting"):
        measures[name]
    for row in measures["shifts"] or ():
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"an accuracy of {row['accuracy']} on shifted images")


def _curves(own: WorkDir) -> list[dict[str, Any]]:
    file = own.path / "metrics.jsonl"
    try:
        lines = file.read_bytes().splitlines() if file.exists() else []
        found = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) for record in found):
            raise ValueError("a line is no JSON object")
        return found
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}): remove the cell's folder and start the sweep again"
        ) from error


def _hits(own: WorkDir, cell: Cell, summary: Mapping[str, Any] | None) -> list[int] | None:
    """Per test example, in the order of the split, whether it was classified rightly."""
    file = own.path / "predictions_test.csv"
    if summary is None or not cell.config.data.splits.test:
        return None
    if not file.exists():
        raise UserError(f"{file} is missing: remove the cell's folder and start the sweep again")
    rows = csv.DictReader(io.StringIO(file.read_text()))
    hits = [int(row["label"] == row["prediction"]) for row in rows]
    examples = summary["metrics"]["test"]["examples"]
    accuracy = summary["metrics"]["test"]["accuracy"]
    if len(hits) != examples or not abs(sum(hits) - accuracy * examples) < 0.5:
        raise UserError(
            f"{file} is damaged: {sum(hits)} of {len(hits)} answers are right, and summary.json "
            f"has {accuracy:.4f} of {examples}; remove the cell's folder and start the sweep again"
        )
    return hits
