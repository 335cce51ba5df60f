"""A sweep, from its cells to one answer: read it from top to bottom."""

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tl_jax import (
    ablation_results,
    ablation_search,
    ablation_work,
    launchers,
    recipes,
    report,
    sweep_display,
)
from tl_jax import config as config_lib
from tl_jax.ablation_axes import SEED
from tl_jax.ablation_config import Cell, Sweep
from tl_jax.errors import DAMAGE, RunFailed, UserError
from tl_jax.launchers import Launcher, Task
from tl_jax.workdir import WorkDir

SWEEP, ESTIMATES = "ablation/sweep.json", "ablation/estimates.json"


def plan(sweep: Sweep) -> None:
    """Prints the runs, what they cost and what they share; nothing is trained or written."""
    with _launcher(sweep) as launch:
        sweep_display.plan(sweep, _estimates(sweep, launch))


def run(sweep: Sweep, path: Any, command: Sequence[str]) -> dict[str, Any]:
    """Runs every cell that is not finished yet, and writes the report on all.

    Args:
      sweep: to run.
      path: its work directory.
      command: the command line that was typed, for the report.

    Returns:
      What `report.write` was given.

    Raises:
      UserError: the directory holds something else, results of other images, weights or strategies'
        functions among it, or nothing can be computed at all.
      RunFailed: a cell failed; the others are done, and the report says so.
    """
    workdir = WorkDir(path)
    _claim(sweep, workdir)
    workdir.check_writable()
    with workdir.lock():
        with _launcher(sweep) as launch:
            estimates = _known_estimates(sweep, workdir) or _estimates(sweep, launch)
            _check_made_of(sweep, workdir, estimates["groups"])
            sweep_display.plan(sweep, estimates)
            workdir.write_json(SWEEP, sweep.identity())
            workdir.write_json(ESTIMATES, estimates)
            searched, errors = _search(sweep, workdir, launch, estimates["groups"])
            errors |= _run(sweep, workdir, launch, searched, errors)
        results = ablation_results.collect(
            sweep, workdir, command, searched, errors, estimates["groups"]
        )
        answers = report.write(workdir, results)
    sweep_display.answers(answers, workdir.path / "ablation")
    failed = [cell["name"] for cell in results["cells"] if cell["status"] != "finished"]
    if failed:
        raise RunFailed(
            f"no result of {len(failed)} of {len(sweep.cells)} cells: {', '.join(failed[:5])}"
            + (" …" if len(failed) > 5 else "")
            + "; the report says why, and the same command tries again what is not damaged"
        )
    return results


def _launcher(sweep: Sweep) -> contextlib.closing[Launcher]:
    return contextlib.closing(launchers.make(sweep.options.launcher, sweep.options))


def _claim(sweep: Sweep, workdir: WorkDir) -> None:
    """Refuses a directory that holds a run, or another sweep; this one may have more cells.

    Raises:
      UserError: says which, or what differs.
    """
    if (workdir.path / "config.json").exists():
        raise UserError(f"{workdir.path} holds a single run: give the sweep another --workdir")
    theirs = workdir.read_json(SWEEP)
    ours = json.loads(json.dumps(sweep.identity()))
    if theirs is None or theirs == ours:
        return
    cells = theirs.get("cells")
    whole = isinstance(cells, dict) and all(isinstance(cell, dict) for cell in cells.values())
    if theirs.keys() != ours.keys() or not whole:
        raise UserError(
            f"{workdir.path / SWEEP} is damaged: remove it, if the cells there are this sweep's"
        )
    lines = [f"{name}: there only" for name in theirs["cells"] if name not in ours["cells"]]
    if not theirs["cells"].keys() & ours["cells"].keys():
        lines += [f"{name}: here only" for name in ours["cells"]]
    there = {sweep_cell.group for sweep_cell in sweep.cells if sweep_cell.name in theirs["cells"]}
    lines += [  # a search is of the first seed
        f"{cells[0].name}: here only, and its group {group} was searched with another"
        for group, cells in sweep.groups.items()
        if group in there and cells[0].rates and cells[0].name not in theirs["cells"]
    ]
    for name in ours["cells"].keys() & theirs["cells"].keys():
        mine, other = ours["cells"][name], theirs["cells"][name]
        lines += [
            f"config.{field}: {other.get(field)!r} there, {mine.get(field)!r} here"
            for field in {**mine, **other}
            if mine.get(field) != other.get(field)
        ]
    lines += [
        f"config.ablate.{name}: {theirs[name]!r} there, {ours[name]!r} here"
        for name in ("compared", "measure")
        if theirs[name] != ours[name]
    ]
    if not lines:
        return
    raise UserError(
        f"{workdir.path} holds another sweep:{_some(list(dict.fromkeys(lines)))}"
        "\nGive another --workdir, or the configuration that it was started with."
    )


def _some(lines: Sequence[str]) -> str:
    """Up to ten of the lines, each on its own, and how many there are besides."""
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "".join(f"\n  {line}" for line in [*lines[:10], *more])


def _estimates(sweep: Sweep, launch: Launcher) -> dict[str, Any]:
    """By group what a run of it takes, the speed that an estimate of time rests on, and of what.

    Raises:
      UserError: names every group that cannot run at all.
    """
    first = {group: cells[0] for group, cells in sweep.groups.items()}
    measure = sweep.options.measure
    tasks = [
        Task(
            group,
            ablation_work.estimate,
            (sweep.config_file, cell.overrides, measure),
            _kind(sweep, cell),
        )
        for group, cell in first.items()
    ]
    outcomes = {outcome.task.name: outcome for outcome in launch(tasks)}
    launchers.results(list(outcomes.values()))
    speed = Task("speed", ablation_work.speed, (sweep.config_file, sweep.cells[0].overrides))
    [flops] = launchers.results(list(launch([speed])))
    return {
        "groups": {group: outcomes[group].result for group in first},
        "flops_per_second": flops,
        "made_of": _made_of(sweep),
    }


def _made_of(sweep: Sweep) -> str:
    """SHA-256 of the configurations of all groups, fields without an effect on results included."""
    groups = {group: config_lib.to_dict(cells[0].config) for group, cells in sweep.groups.items()}
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()


def _known_estimates(sweep: Sweep, workdir: WorkDir) -> dict[str, Any] | None:
    """What `_estimates` gave when the sweep was started before, if nothing is left to run."""
    searching = {group for group, cells in sweep.groups.items() if cells[0].rates}
    ended = all(_finished(sweep, workdir, cell) for cell in sweep.cells)
    if not ended or searching - _known_searches(sweep, workdir).keys():
        return None  # images and weights may have changed since
    with contextlib.suppress(UserError, *DAMAGE):  # then they are made anew
        found = workdir.read_json(ESTIMATES) or {}
        right = found["made_of"] == _made_of(sweep) and 0 < found["flops_per_second"] < math.inf
        whole = right and all(ablation_work.is_estimate(found["groups"][g]) for g in sweep.groups)
        if whole and not _otherwise_made(sweep, workdir, found["groups"]):
            return found
    return None


def _check_made_of(sweep: Sweep, workdir: WorkDir, estimates: Mapping[str, Any]) -> None:
    """Refuses results of an earlier start that are not of what would be computed now.

    Raises:
      UserError: names them.
    """
    if found := _otherwise_made(sweep, workdir, estimates):
        lines = [f"\n  {what}: {shlex.join(paths)}" for what, paths in found.items()]
        raise UserError(
            f"{workdir.path} holds results of an earlier start that were made otherwise, by the "
            f"hashes in their files. What differs, and what there is made of it:{''.join(lines)}\n"
            "Bring it back (the network with its weights and preparation of images: "
            "config.model.pretrained; images: config.data.source; what a function does: the "
            "configuration), remove all these, or give another --workdir."
        )


def _otherwise_made(
    sweep: Sweep, workdir: WorkDir, estimates: Mapping[str, Any]
) -> dict[str, list[str]]:
    """By what is not as in the estimates: the cells, searches, trials and measures made of it."""
    found: dict[str, list[str]] = {}
    gone = set()  # with all that lies in them
    measure = sweep.options.measure
    for group, cells in sweep.groups.items():
        search = workdir.path / f"search/{group}"
        ended = (search / "search.json").exists()
        searches = [search / "search.json"] if ended else sorted(search.glob("*/summary.json"))
        paths = [workdir.path / ablation_results.cell_path(cell) for cell in cells]
        files = [
            *(("search", file) for file in searches),
            *(("run", path / "summary.json") for path in paths),
            *(("measures", path / "measures.json") for path in paths),
        ]
        for kind, file in files:
            content: dict[str, Any] = {}
            with contextlib.suppress(UserError):  # what is damaged, or has none, its cell says
                content = WorkDir(file.parent).read_json(file.name) or {}
            then = content.get("made_of")
            if not isinstance(then, dict):
                continue
            if kind == "measures" and not ablation_work.is_measured(content, measure):
                continue  # will be made anew
            if kind == "measures" and file.parent in gone:
                continue
            if other := ablation_work.otherwise_made(then, estimates[group]["made_of"][kind]):
                gone.add(file.parent)
                whole = file if kind == "measures" else file.parent  # what to remove
                what = found.setdefault(", ".join(other), [])
                what.append(str(whole.relative_to(workdir.path)))
    return found


def _known_searches(sweep: Sweep, workdir: WorkDir) -> dict[str, Any]:
    """By group, what an earlier start found."""
    known = {}
    for group, cells in sweep.groups.items():
        with contextlib.suppress(UserError):  # its search will say what is damaged
            found = WorkDir(workdir.path / f"search/{group}").read_json("search.json")
            if found is not None and ablation_search.is_search(found, cells[0].rates):
                known[group] = found
    return known


def _search(
    sweep: Sweep, workdir: WorkDir, launch: Launcher, estimates: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The learning rates of all groups, and by cell what went wrong in looking for them."""
    searched = _known_searches(sweep, workdir)
    tasks = [
        Task(
            group,
            ablation_search.search,
            (
                sweep.config_file,
                cells[0].overrides,
                cells[0].rates,
                str(workdir.path / f"search/{group}"),
                estimates[group]["made_of"]["search"],
            ),
            _kind(sweep, cells[0]),
        )
        for group, cells in sweep.groups.items()
        if cells[0].rates and group not in searched
    ]
    errors: dict[str, str] = {}
    for outcome in sweep_display.track("learning rates", len(tasks), launch(tasks)):
        group = outcome.task.name
        if outcome.error is None:
            searched[group] = outcome.result
        else:
            errors |= {cell.name: f"learning rate: {outcome.error}" for cell in sweep.groups[group]}
    return searched, errors


def _run(
    sweep: Sweep,
    workdir: WorkDir,
    launch: Launcher,
    searched: Mapping[str, Any],
    failed: Mapping[str, str],
) -> dict[str, str]:
    """Runs the cells that are not finished; by cell what went wrong."""
    tasks = [
        Task(
            cell.name,
            ablation_work.run,
            (
                sweep.config_file,
                tuple(ablation_results.overrides_of(cell, searched)),
                str(workdir.path / ablation_results.cell_path(cell)),
                sweep.options.measure,
            ),
            _kind(sweep, cell),
        )
        for cell in sorted(sweep.cells, key=lambda cell: _neighbours(sweep, cell))
        if cell.name not in failed and not _finished(sweep, workdir, cell)
    ]
    errors = {}
    for outcome in sweep_display.track("cells", len(tasks), launch(tasks)):
        if outcome.error is not None:
            errors[outcome.task.name] = outcome.error
    return errors


def _kind(sweep: Sweep, cell: Cell) -> str:
    """Cells of one kind run the same programs, most often."""
    return cell.values[sweep.compared]


def _neighbours(sweep: Sweep, cell: Cell) -> list[str]:
    """Cells with the same images come one after the other, so that they share what is computed."""
    own = {axis: name for axis, name in cell.values.items() if axis not in (sweep.compared, SEED)}
    return [*own.values(), cell.values.get(SEED, "")]


def _finished(sweep: Sweep, workdir: WorkDir, cell: Cell) -> bool:
    own = WorkDir(workdir.path / ablation_results.cell_path(cell))
    if recipes.is_own(cell.config.freeze.strategy):
        return False  # its run compares what the strategy's function does now
    try:
        ended, measures = own.finished() is not None, own.read_json("measures.json")
    except UserError:
        return False  # its run will say what is damaged
    return ended and ablation_work.is_measured(measures, sweep.options.measure)
