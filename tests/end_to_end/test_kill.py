"""Killed at any moment and started again, a run ends bit for bit as if nothing had happened."""

import random
import shutil
import time

import command_line
import pytest


@pytest.fixture(scope="module")
def config(network, tmp_path_factory):
    """Everything that a checkpoint can hold: trunk, statistics and Adam's moments."""
    return command_line.write_config(
        tmp_path_factory.mktemp("config") / "short.py",
        network("resnet_bottleneck"),
        **{
            "train.epochs": 4,
            "train.checkpoint_every_steps": 2,
            "freeze.strategy": "full",
            "freeze.batch_norm": "batch",
            "data.augmentation": "random_resized_crop",
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The work directory of a run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    command_line.run("--config", config, "--workdir", path)
    return path


def start_and_kill(moment, config, path):
    """Starts run.py and kills it as soon as `moment(seconds since the start)` is true.

    Returns whether the kill came before the end.
    """
    process = command_line.start("--config", config, "--workdir", path)
    started = time.monotonic()
    while process.poll() is None and not moment(time.monotonic() - started):
        assert time.monotonic() - started < 100
        time.sleep(0.0005)
    process.kill()
    _, complained = process.communicate()
    assert process.returncode in (0, -9), complained
    return process.returncode != 0


def lines(path):
    return (path / "metrics.jsonl").read_text().count("\n") if path.exists() else 0


def test_killed_while_it_trains(config, whole, tmp_path):
    path = tmp_path / "run"
    draw = random.Random(0)
    total = len((whole / "metrics.jsonl").read_text().splitlines())
    start_and_kill(lambda seconds: seconds > draw.uniform(0, 2), config, path)
    reached = draw.randint(1, 3)
    while reached < total:
        # Up to so many lines, and then a moment more: steps, evaluations and saves are all hit.
        later = draw.uniform(0, 0.05)
        deadline = []

        def moment(seconds, reached=reached, later=later, deadline=deadline):
            if not deadline and (path / "metrics.jsonl").exists() and lines(path) >= reached:
                deadline.append(seconds + later)
            return bool(deadline) and seconds > deadline[0]

        assert start_and_kill(moment, config, path)
        assert not (path / "summary.json").exists()
        reached += draw.randint(3, 6)
    command_line.run("--config", config, "--workdir", path)
    assert command_line.results(path) == command_line.results(whole)


def test_killed_while_it_saves(config, whole, tmp_path):
    path = tmp_path / "run"
    saving = path / "checkpoints"
    assert start_and_kill(lambda _: any(saving.glob("2.orbax*/state*")), config, path)
    assert start_and_kill(lambda _: any(saving.glob("*.orbax*/*/d")), config, path)
    assert start_and_kill(lambda _: (saving / "9").exists(), config, path)
    command_line.run("--config", config, "--workdir", path)
    assert command_line.results(path) == command_line.results(whole)
    names = {folder.name for folder in saving.iterdir()}
    assert names == {folder.name for folder in (whole / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    "appears", ["evaluation.json", "figures/.plan.png.part", ".export.part", "export"]
)
def test_killed_while_it_writes_its_results(config, whole, tmp_path, appears):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    for name in ("summary.json", "evaluation.json"):
        (path / name).unlink()
    for name in ("export", "figures"):
        shutil.rmtree(path / name)
    start_and_kill(lambda _: (path / appears).exists(), config, path)
    command_line.run("--config", config, "--workdir", path)
    assert command_line.results(path) == command_line.results(whole)
    left = sorted(
        file.relative_to(path) for file in path.rglob("*") if "checkpoints" not in str(file)
    )
    assert left == sorted(
        f.relative_to(whole) for f in whole.rglob("*") if "checkpoints" not in str(f)
    )
