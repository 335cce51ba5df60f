"""A sweep from its config file to its report, each run in a process of its own."""

import json
import os
import random
import shlex
import shutil
import signal
import time

import ablation_example
import command_line
import fsspec
import fsspec.implementations.memory
import jax
import pytest

from tl_jax import (
    ablation,
    ablation_config,
    ablation_results,
    ablation_search,
    ablation_work,
    config_files,
    recipes,
    report,
)
from tl_jax.config import Measure
from tl_jax.errors import UserError
from tl_jax.main import main
from tl_jax.report import pictures
from tl_jax.workdir import WorkDir


def start(config, workdir, *more):
    return main(["--mode=ablate", f"--config={config}", f"--workdir={workdir}", *more])


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Eight would spend the time of these small runs on each other."""
    jax.devices()  # this process keeps its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")  # as command_line
        yield


@pytest.fixture(scope="module")
def finished(network, tmp_path_factory):
    """Config file and work directory of a small sweep that ran to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    config = ablation_example.write(folder, network("resnet_basic"))
    assert start(config, folder / "run") == 0
    return config, folder / "run"


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, which take longer than all else of a sweep started again."""
    monkeypatch.setattr(pictures, "render", lambda *_: (b"png", b"pdf"))


def test_every_cell_is_a_finished_run_with_its_measures(finished):
    _, workdir = finished
    rows = ablation_example.rows(workdir)
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"finished"}
    for name in ("linear_probe,seed=0", "top_k,seed=1"):
        cell = workdir / "cells" / name
        summary = command_line.read_json(cell / "summary.json")
        assert summary["freeze"]["certificate"]["ok"]
        assert summary["cost"]["peak_memory_bytes"] > 1e7
        measures = command_line.read_json(cell / "measures.json")
        assert (measures["gradients"] is not None) == name.startswith("linear_probe")
        assert [row["kind"] for row in measures["shifts"]] == ["contrast"]
    assert (workdir / "ablation" / "report.html").stat().st_size > 10_000


def test_the_rate_is_chosen_on_validation_and_the_test_split_is_untouched_until_then(finished):
    _, workdir = finished
    for strategy in ablation_example.STRATEGIES:
        folder = workdir / "search" / strategy
        found = command_line.read_json(folder / "search.json")
        good, diverged = found["trials"]
        assert (good["learning_rate"], diverged["learning_rate"]) == ablation_example.RATES
        assert 0 < good["accuracy"] <= 1
        assert diverged["accuracy"] is None and diverged["loss"] is None
        assert found["learning_rate"] == good["learning_rate"]
        for summary in folder.glob("*/summary.json"):
            assert set(command_line.read_json(summary)["metrics"]) == {"validation"}
        for seed in (0, 1):
            cell = workdir / "cells" / f"{strategy},seed={seed}"
            fields = command_line.read_json(cell / "config.json")
            assert fields["optimizer"]["learning_rate"] == good["learning_rate"]
            assert fields["seed"] == seed


def test_heads_are_searched_as_one_program_and_agree_with_lone_runs(finished):
    _, workdir = finished
    assert [p.name for p in (workdir / "search/linear_probe").glob("*/")] == ["grid"]
    trials = command_line.read_json(workdir / "search/linear_probe/search.json")["trials"]
    chosen = trials[0]
    alone = command_line.read_json(workdir / "cells/linear_probe,seed=0/summary.json")
    assert alone["metrics"]["validation"]["accuracy"] == chosen["accuracy"]
    assert alone["metrics"]["validation"]["loss"] == pytest.approx(chosen["loss"], abs=1e-5)


def test_a_card_says_how_its_cell_is_made_again(finished):
    _, workdir = finished
    row = ablation_example.rows(workdir)[0]
    assert row["command"] in (workdir / row["workdir"] / "export" / "README.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_finished_sweep_may_get_more_seeds(finished, network, tmp_path, capsys):
    _, whole = finished
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    axes = (ablation_example.AXES[0], ("seed", (0, 1, 2)))
    config = ablation_example.write(tmp_path, network("resnet_basic"), axes=axes)
    stamps = {p: os.stat(p).st_mtime_ns for p in workdir.glob("cells/*/summary.json")}
    assert start(config, workdir) == 0
    assert {p: os.stat(p).st_mtime_ns for p in stamps} == stamps
    assert len(ablation_example.rows(workdir)) == 6
    axes = (ablation_example.AXES[0], ("seed", (3, 0, 1, 2)))  # whose first was not searched with
    config = ablation_example.write(tmp_path, network("resnet_basic"), axes=axes)
    assert start(config, workdir) == 2
    assert "was searched with another" in capsys.readouterr().err


DAMAGE = (
    ("summary.json", '{"cost": null, "metrics": {"test": {"accuracy": 0.5, "examples": 130}}}'),
    ("measures.json", '{"drift": 3, "made_of": {}}'),
    ("metrics.jsonl", "[1]\nnull\n"),
    ("predictions_test.csv", None),
    ("summary.json", {"environment": [1]}),
    ("metrics.jsonl", "[" * 100_000),
    ("predictions_test.csv", "\0" * 200_000),
    ("predictions_test.csv", os.mkdir),
    ("config.json", "{}"),
    ("config.json", None),
    ("plan.json", "{}"),
    ("plan.json", {"phases": 3}),
    ("plan.json", {"leaves": [{"path": "a"}]}),
    ("summary.json", {"cost": "x"}),
    ("summary.json", {"metrics": {}}),
    ("summary.json", {"metrics": {"test": {"accuracy": float("nan"), "examples": 130}}}),
    ("measures.json", {"forgetting": {"before": {"accuracy": 0.5}}}),
    ("measures.json", {"shifts": [{"severity": 3, "accuracy": 0.5}]}),
    ("measures.json", {"gradients": {"random_head": []}}),
    ("config.json", {"seed": 5}),
    ("measures.json", '{"asked": 1, "made_of": {}}'),
    ("measures.json", {"made_of": [1]}),
    ("measures.json", {"shifts": [{"kind": "contrast", "severity": 3, "accuracy": "x"}]}),
    ("summary.json", lambda s: {"cost": s["cost"] | {"cache_seconds": None}}),
    ("summary.json", lambda s: {"cost": s["cost"] | {"train_seconds": -1.0}}),
    ("summary.json", {"made_of": [1]}),
    ("summary.json", {"made_of": {"weights": [1]}}),
    ("summary.json", {"probe": "x"}),
    ("summary.json", {"probe": {"settings": [{"learning_rate": []}] * 2, "chosen": 3}}),
)


@pytest.mark.usefixtures("undrawn")
def test_json_of_another_shape_is_damage_of_its_cell(finished, tmp_path):
    """And a sweep's own files are made again, or one message."""
    config, whole = finished
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    estimates = command_line.read_json(workdir / "ablation" / "estimates.json")["groups"]
    searched = {
        group: command_line.read_json(workdir / f"search/{group}/search.json")
        for group in sweep.groups
    }

    def statuses():
        found = ablation_results.collect(
            sweep, WorkDir(str(workdir)), ("python",), searched, {}, estimates
        )
        return [cell["status"] for cell in found["cells"]]

    cell = workdir / "cells" / sweep.cells[0].name
    assert statuses() == ["finished"] * 4
    for name, content in DAMAGE:
        before = (cell / name).read_bytes()
        (cell / name).unlink()
        if callable(content) and content is not os.mkdir:
            content = content(json.loads(before))
        if isinstance(content, dict):  # these fields alone are wrong
            content = json.dumps(json.loads(before) | content)
        if content is os.mkdir:
            os.mkdir(cell / name)
        elif content is not None:
            (cell / name).write_text(content)
        assert statuses() == ["failed"] + ["finished"] * 3, name
        if (cell / name).is_dir():
            (cell / name).rmdir()
        (cell / name).write_bytes(before)
    for file in (cell / "export").glob("*.safetensors"):
        file.unlink()
    assert WorkDir(str(cell)).finished() is None
    rates = ablation_example.RATES
    group = next(iter(searched.values()))
    assert ablation_search.is_search(group, rates)
    assert not ablation_search.is_search(group, (0.5,))
    lost = [{**trial, "loss": None} for trial in group["trials"]]
    for wrong in (
        {},
        {"trials": 3},
        {**group, "trials": []},
        {**group, "learning_rate": 7.0},
        {**group, "trials": lost},
        {**group, "at_edge": "no"},
        {**group, "made_of": None},
        {**group, "trials": [t | {"accuracy": None, "loss": None} for t in group["trials"]]},
    ):
        assert not ablation_search.is_search(wrong, rates)
    for estimate in estimates.values():
        assert ablation_work.is_estimate(estimate)
        for name in estimate:
            assert not ablation_work.is_estimate({**estimate, name: None})
        of = estimate["made_of"]
        for wrong in ({"weights": "a"}, {**of, "run": {"weights": 3}}, {**of, "measures": None}):
            assert not ablation_work.is_estimate({**estimate, "made_of": wrong})
        for wrong in (-1.0, float("inf"), float("nan")):
            assert not ablation_work.is_estimate({**estimate, "flops": wrong})
            assert not ablation_work.is_estimate({n: v for n, v in estimate.items() if n != name})
    for wrong in ("{}", '{"cells": [], "compared": 3, "measure": 1}', '{"cells": {"a": 3}}'):
        (workdir / "ablation" / "sweep.json").write_text(wrong)
        assert start(config, workdir) == 2


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
    """An object store, as epath asks fsspec for one."""

    protocol, store, pseudo_dirs = "s3", {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.mark.usefixtures("undrawn")
def test_results_come_together_from_an_object_store(finished):
    """From and on any path that epath knows."""
    config, whole = finished
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket().put(str(whole), "bucket/", recursive=True)
    far, near = WorkDir(f"s3://bucket/{whole.name}"), WorkDir(str(whole))
    estimates = ablation._known_estimates(sweep, far)
    assert estimates is not None
    searched = ablation._known_searches(sweep, far)
    there, here = (
        ablation_results.collect(sweep, folder, ("python",), searched, {}, estimates["groups"])
        for folder in (far, near)
    )
    assert [cell["status"] for cell in there["cells"]] == ["finished"] * 4
    for cell, other in zip(there["cells"], here["cells"], strict=True):
        assert {**cell, "command": ""} == {**other, "command": ""}
    report.write(far, there)
    table = (far.path / "ablation/results.csv").read_text()
    assert table.replace(str(far.path), str(near.path)) == (
        (near.path / "ablation/results.csv").read_text()
    )


@pytest.mark.usefixtures("undrawn")
def test_started_again_it_runs_nothing_and_says_the_same(finished, capsys):
    config, workdir = finished
    before = ablation_example.rows(workdir)
    stamps = {p: os.stat(p).st_mtime_ns for p in workdir.glob("cells/*/summary.json")}
    file = workdir / "ablation" / "estimates.json"
    estimates = command_line.read_json(file)
    older = {n: {**e, "by_seed": None} for n, e in estimates["groups"].items()}
    file.write_text(json.dumps({**estimates, "groups": older}))  # as another version's
    assert start(config, workdir) == 0
    again = command_line.read_json(file)["groups"]
    for group in (*again.values(), *estimates["groups"].values()):
        for cache in group["cache"]:
            del cache["reason"]  # which names the memory that is free now
    assert again == estimates["groups"]
    assert {p: os.stat(p).st_mtime_ns for p in stamps} == stamps
    assert ablation_example.rows(workdir) == before


@pytest.mark.usefixtures("undrawn")
def test_results_of_other_images_or_weights_are_not_gone_on_with(
    finished, tmp_path, monkeypatch, capsys
):
    """Between two starts of a sweep anything may have changed, and in the middle of one."""
    config, whole = finished
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    estimates = command_line.read_json(whole / "ablation" / "estimates.json")
    searched = {
        group: command_line.read_json(whole / f"search/{group}/search.json")
        for group in sweep.groups
    }
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    odd = f"cells/{sweep.cells[0].name}"
    [trial] = (f"search/top_k/{p.parent.name}" for p in whole.glob("search/top_k/*/summary.json"))
    asked = []
    source = "images of ablate.measure.source"
    for group in estimates["groups"].values():
        group["made_of"]["measures"] = {source: "1" * 64}
    for file in workdir.glob("cells/*/measures.json"):
        content = command_line.read_json(file)
        file.write_text(json.dumps({**content, "made_of": {source: "1" * 64}}))

    def now(sweep, launch):
        asked.append(sweep)
        return estimates

    monkeypatch.setattr(ablation, "_estimates", now)

    def change(name, what):
        content = command_line.read_json(workdir / name)
        content["made_of"][what] = "0" * 64
        (workdir / name).write_text(json.dumps(content))

    kinds = list(estimates["groups"]["top_k"]["made_of"]["run"])
    assert kinds == [
        "weights",
        "network",
        "images of train",
        "images of validation",
        "images of test",
        "preparation of images",
        "parameters trained by the strategy",
        "order of the examples",
    ]
    for number, what in enumerate(kinds, 1):
        seen = what != "images of test"  # by a search
        change(f"{odd}/summary.json", what)
        found = ablation_results.collect(
            sweep, WorkDir(str(workdir)), ("python",), searched, {}, estimates["groups"]
        )
        failed = {cell["workdir"]: cell["error"] for cell in found["cells"] if cell["error"]}
        assert failed.keys() == {odd}
        assert f"{odd} was made with other {what} than when" in failed[odd]
        if seen:
            change("search/top_k/search.json", what)
            change(f"{trial}/summary.json", what)
        assert start(config, workdir) == 2
        assert len(asked) == number  # what is there now
        names = shlex.join([odd, "search/top_k"] if seen else [odd])
        assert f"  {what}: {names}\n" in capsys.readouterr().err
        (workdir / "search/top_k/search.json").unlink()
        assert start(config, workdir) == 2
        asked.pop()
        names = shlex.join([odd, trial] if seen else [odd])
        assert f"  {what}: {names}\n" in capsys.readouterr().err
        for name in (f"{odd}/summary.json", f"{trial}/summary.json", "search/top_k/search.json"):
            shutil.copy(whole / name, workdir / name)
    assert start(config, workdir) == 0
    assert len(asked) == len(kinds)  # of the file, as nothing is left to run

    change(f"{odd}/measures.json", source)
    (workdir / "search/top_k/search.json").unlink()  # something is left to run
    assert start(config, workdir) == 2
    assert f"  {source}: {odd}/measures.json\n" in capsys.readouterr().err
    found = ablation_results.collect(
        sweep, WorkDir(str(workdir)), ("python",), searched, {}, estimates["groups"]
    )
    change(f"{odd}/summary.json", "weights")
    assert start(config, workdir) == 2
    said = capsys.readouterr().err
    assert f"  weights: {odd}\n" in said and "measures.json" not in said  # lies in it
    shutil.copy(whole / odd / "summary.json", workdir / odd / "summary.json")
    [error] = [cell["error"] for cell in found["cells"] if cell["error"]]
    assert f"{odd}/measures.json was made with other {source} than when" in error


@pytest.mark.usefixtures("undrawn")
def test_a_trial_of_other_images_is_not_searched_among(finished, tmp_path, monkeypatch):
    """They may change while a sweep runs."""
    config, whole = finished
    monkeypatch.setattr(ablation_work, "_start", lambda cache: None)
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    estimates = command_line.read_json(whole / "ablation/estimates.json")["groups"]
    for group, (cell, *_) in sweep.groups.items():  # of heads together, and of lone trials
        folder = tmp_path / group
        shutil.copytree(whole / "search" / group, folder)
        (folder / "search.json").unlink()
        now = estimates[group]["made_of"]["search"]
        what = (str(config), cell.overrides, cell.rates, str(folder))
        with pytest.raises(UserError, match="made with other images of train than are there now"):
            ablation_search.search(*what, {**now, "images of train": "0" * 64})
        found = ablation_search.search(*what, now)
        assert found == command_line.read_json(whole / "search" / group / "search.json")
        (folder / "search.json").unlink()
        for file in folder.glob("*/summary.json"):
            summary = command_line.read_json(file)
            file.write_text(json.dumps({**summary, "metrics": {}, "probe": {}}))
        with pytest.raises(UserError, match=r"summary\.json in .* is damaged"):
            ablation_search.search(*what, now)


def test_a_prefix_counts_for_every_view(digits_config):
    def shared(views):
        fields = {"train.epochs": 12, "data.augmentation": "flip", "data.views": views}
        config = digits_config("resnet_basic", **fields)
        return ablation_work._estimate(config, Measure())["shared"]

    assert shared(4) == pytest.approx(4 * shared(1)) and shared(1) > 0


def test_a_strategy_of_one_s_own_is_asked_again(finished, monkeypatch):
    """Its run compares what its function does now with what it did."""
    config, workdir = finished
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    path, cell = WorkDir(str(workdir)), sweep.cells[0]
    assert ablation._finished(sweep, path, cell)
    assert ablation._known_estimates(sweep, path) is not None
    monkeypatch.setattr(recipes, "is_own", lambda name: True)
    assert ablation._known_estimates(sweep, path) is None
    assert not ablation._finished(sweep, path, cell)


@pytest.mark.usefixtures("undrawn")
def test_estimates_are_of_this_start_s_configuration(finished, tmp_path):
    """Fields without an effect on results have one on costs. Lost measures are taken again."""
    config, whole = finished
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    measures = workdir / "cells/linear_probe,seed=0/measures.json"
    before, lost = measures.read_bytes(), workdir / "cells/top_k,seed=1/measures.json"
    measures.write_text('{"drift": 3}')
    older = command_line.read_json(lost)
    del older["made_of"]
    lost.write_text(json.dumps(older))  # as an earlier version's
    stamps = {p: os.stat(p).st_mtime_ns for p in workdir.glob("cells/*/summary.json")}
    assert start(config, workdir, "--config.cache=off") == 0
    assert measures.read_bytes() == before
    assert command_line.read_json(lost) == {**older, "made_of": {}}
    assert {p: os.stat(p).st_mtime_ns for p in stamps} == stamps
    cached, uncached = (
        command_line.read_json(folder / "ablation" / "estimates.json")["groups"]["linear_probe"]
        for folder in (whole, workdir)
    )
    assert cached["shared"] > 0 == uncached["shared"]
    assert cached["flops"] < uncached["flops"]


@pytest.mark.usefixtures("undrawn")
def test_answers_cut_short_are_no_result(finished, tmp_path):
    """A comparison of fewer answers than were given would be another one."""
    config, whole = finished
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    damaged = ablation_example.rows(workdir)[0]
    answers = workdir / damaged["workdir"] / "predictions_test.csv"
    content = answers.read_text()
    header, *lines = content.splitlines()
    right = [
        ",".join([i, label, label, *rest]) for i, label, _, *rest in (r.split(",") for r in lines)
    ]
    for damage in (content[:200], "\n".join([header, *right, ""])):  # cut short; all of them right
        assert damage != content
        answers.write_text(damage)
        assert start(config, workdir) == 1
    found = ablation_example.rows(workdir)
    assert [row["status"] for row in found] == ["failed"] + ["finished"] * (len(found) - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_what_is_damaged_is_mended_or_named_and_stops_no_other_cell(finished, tmp_path):
    config, whole = finished
    workdir = tmp_path / whole.name
    shutil.copytree(whole, workdir)
    before = ablation_example.rows(workdir)
    export, summary = (workdir / row["workdir"] for row in before[:2])
    weights = (export / "export/model.safetensors").read_bytes()
    (export / "export/model.safetensors").write_bytes(weights[:-100])
    (summary / "summary.json").write_text("{")
    (workdir / "search/top_k/search.json").write_text("{")
    assert start(config, workdir) == 1
    found = ablation_example.rows(workdir)
    assert [row["status"] for row in found] == ["finished"] + ["failed"] * 3
    assert (export / "export/model.safetensors").read_bytes() == weights
    assert str(summary / "summary.json") in found[1]["error"]
    assert str(workdir / "search/top_k/search.json") in found[2]["error"]
    (summary / "summary.json").unlink()
    (workdir / "search/top_k/search.json").unlink()
    assert start(config, workdir) == 0
    assert ablation_example.rows(workdir) == [
        {**row, "command": row["command"].replace(str(whole), str(workdir))} for row in before
    ]


def test_a_cell_can_be_run_again_by_its_command(finished, tmp_path):
    _, workdir = finished
    command = ablation_example.rows(workdir)[3]["command"].split()
    assert command[:2] == ["python", "run.py"]
    alone = tmp_path / "alone"
    command_line.run(*command[2:-1], f"--workdir={alone}")  # on as many devices
    ours = command_line.read_json(workdir / "cells/top_k,seed=1/summary.json")
    assert command_line.read_json(alone / "summary.json")["metrics"] == ours["metrics"]


def test_another_sweep_or_a_single_run_is_refused(finished, network, tmp_path, capsys):
    _, workdir = finished
    other = ablation_example.write(tmp_path, network("resnet_basic"), learning_rates=(0.1, 0.5))
    assert start(other, workdir) == 2
    assert "holds another sweep" in (said := capsys.readouterr().err)
    assert "learning_rates" in said
    assert main([f"--config={other}", f"--workdir={workdir}"]) == 2
    assert "holds a sweep" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert start(other, tmp_path / "run") == 2
    assert "holds a single run" in capsys.readouterr().err


def progress(workdir):
    """How far a sweep is: it only grows, over restarts too."""
    folders = os.walk(workdir)  # passes over what is removed meanwhile
    return sum(
        name.endswith(".json")
        for path, _, names in folders
        if "checkpoints" not in path
        for name in names
    )


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(finished, tmp_path):
    config, workdir = finished
    chance, whole, cut = random.Random(0), progress(workdir), tmp_path / "cut"
    arguments = ["--mode=ablate", f"--config={config}", f"--workdir={cut}"]
    # Of its own, whose files a kill may tear.
    arguments.append(f"--config.logging.compilation_cache={tmp_path / 'compilation'}")
    for share in sorted(chance.uniform(0.1, 0.9) for _ in range(3)):
        process = command_line.start(*arguments, "--config.ablate.jobs=2")
        while progress(cut) < share * whole and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, "it was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    command_line.run(*arguments)
    theirs, ours = (ablation_example.rows(folder) for folder in (workdir, cut))
    for row in (*theirs, *ours):
        row.pop("command")  # which names the work directory
    assert ours == theirs


@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_fails_stops_no_other(network, tmp_path, capsys):
    axes = (("optimizer.learning_rate", (0.1, 1e38)),)
    nothing = {"probe_images": 0, "shifts": (), "gradient_steps": 0}
    config = ablation_example.write(
        tmp_path, network("resnet_basic"), axes=axes, learning_rates=None, measure=nothing
    )
    assert start(config, tmp_path / "run", "--config.train.epochs=2") == 1
    assert "no result of 1 of 2 cells" in capsys.readouterr().err
    good, bad = ablation_example.rows(tmp_path / "run")
    assert (good["optimizer.learning_rate"], good["status"]) == ("0.1", "finished")
    assert (bad["optimizer.learning_rate"], bad["status"]) == ("1e+38", "failed")
    assert "step" in bad["error"]


def test_plan_mode_shows_the_sweep_and_writes_nothing(finished, tmp_path, capsys):
    config, _ = finished
    arguments = ["--mode=plan", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "4 runs and 4 trials of learning rates in 2 groups" in said
    sweep = ablation_config.read(str(config), config_files.load_config(str(config)), ())
    groups = command_line.read_json(finished[1] / "ablation" / "estimates.json")["groups"]
    own = sum((g["flops"] - g["shared"]) * (2 + 2) for g in groups.values())  # runs and trials
    shared = {g["prefix"]: g["shared"] for g in groups.values()}
    assert len(sweep.groups) == len(groups) == 2 and "" not in shared
    total = (own + sum(shared.values())) / 1e9
    assert f"Training takes about {total:,.3g} GFLOP, " in said and " min at the " in said
    assert f"frozen prefix: 2; prefixes that differ: {len(shared)}." in said
    for group, estimate in groups.items():
        [line] = [line for line in said.splitlines() if line.strip().startswith(group)]
        assert f"{estimate['trainable']:,}" in line and "device" in line
        assert f"{estimate['flops'] / 1e9:,.1f}" in line
    assert not (tmp_path / "run").exists()


def test_the_plan_comes_before_the_first_run(finished, capsys, monkeypatch):
    """In the sweep's own output, too."""
    config, workdir = finished
    monkeypatch.setattr(ablation, "_search", lambda *_: exit("the first trial"))
    with pytest.raises(SystemExit):
        start(config, workdir)
    assert "4 runs and 4 trials" in capsys.readouterr().out


def test_what_cannot_run_at_all_is_refused_before_anything_runs(network, tmp_path, capsys):
    gridded = {"freeze.strategy": "top_k", "probe.grid.weight_decay": (0.1, 1.0)}
    blind = {"name": "blind", "freeze.strategy": "linear_probe", "probe.grid.input": ("cls",)}
    axes = (("data.examples_per_class", (7, 1000)), ("strategy", (gridded, blind)))
    config = ablation_example.write(tmp_path, network("resnet_basic"), axes=axes)
    assert start(config, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "examples_per_class" in said and "top_k trains more than the head" in said
    assert "config.probe.grid.input: 'cls': the head of a resnet can see pooled" in said
    assert not (tmp_path / "run" / "cells").exists()


def test_measures_that_cannot_be_are_refused_before_anything_runs(network, tmp_path, capsys):
    measure = {**ablation_example.MEASURE, "source": "tfds:nope"}
    config = ablation_example.write(tmp_path, network("resnet_basic"), measure=measure)
    assert start(config, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.count("config.ablate.measure.source: TFDS knows no data set 'nope'") == 1
    assert said.startswith("error: linear_probe, top_k: ")
    assert not (tmp_path / "run" / "cells").exists()


def test_modes_and_sections_that_do_not_go_together(network, tmp_path, capsys):
    plain = command_line.write_config(tmp_path / "plain.py", network("resnet_basic"))
    assert start(plain, tmp_path / "run") == 2
    assert "no `ablate` section" in capsys.readouterr().err
    sweep = ablation_example.write(tmp_path, network("resnet_basic"))
    assert main([f"--config={sweep}", "--config.ablate.jobs=2"]) == 2
    assert "without effect in --mode train" in capsys.readouterr().err


def test_ray_is_optional(network, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    config = ablation_example.write(tmp_path, network("resnet_basic"))
    assert start(config, tmp_path / "run", "--config.ablate.launcher=ray") == 2
    assert "tl_jax[ray]" in capsys.readouterr().err


def test_json_of_a_sweep_names_every_cell(finished):
    _, workdir = finished
    content = json.loads((workdir / "ablation" / "sweep.json").read_text())
    assert len(content["cells"]) == 4
