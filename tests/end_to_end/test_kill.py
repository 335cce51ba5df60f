"""Killed at any moment and started again, a run ends bit for bit as if nothing had happened."""

import glob
import os
import random
import shutil
import signal
import time

import command_line
import pytest


@pytest.fixture(scope="module")
def config(network, tmp_path_factory):
    """Everything that a checkpoint can hold: trunk, statistics and Adam's moments."""
    folder = tmp_path_factory.mktemp("config")
    return command_line.write_config(
        folder / "short.py",
        network("resnet_no_shortcut"),
        **{
            "logging.compilation_cache": str(folder / "compilation"),  # whose files a kill may tear
            "train.epochs": 4,
            "train.checkpoint_every_steps": 2,
            "freeze.strategy": "full",
            "freeze.batch_norm": "batch",
            "data.augmentation": "flip",
            "logging.figures": True,
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The work directory of a run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    command_line.run("--config", config, "--workdir", path)
    return path


UNDRAWN = "--config.logging.figures=False"  # whose time is spent where it is looked at


def start_and_kill(config, path, moment, *more):
    """Starts run.py and kills it as soon as `moment(seconds since the start)` is true.

    Returns whether the kill came before the end.
    """
    process = command_line.start("--config", config, "--workdir", path, *more)
    started = time.monotonic()
    while process.poll() is None and not moment(time.monotonic() - started):
        time.sleep(0.0005)
    process.kill()
    _, complained = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), complained
    return process.returncode != 0


def test_killed_while_it_trains(config, whole, tmp_path):
    path = tmp_path / "run"
    log = path / "metrics.jsonl"
    draw = random.Random(0)
    total = len((whole / "metrics.jsonl").read_text().splitlines())
    early = draw.uniform(0, 2)
    start_and_kill(config, path, lambda seconds: seconds > early, UNDRAWN)
    reached = draw.randint(1, 3)
    while reached < total:
        # Up to so many lines, and then a moment more: steps, evaluations and saves are all hit.
        later, since = draw.uniform(0, 0.05), []

        def moment(seconds, reached=reached, later=later, since=since):
            if not since and log.exists() and log.read_text().count("\n") >= reached:
                since.append(seconds)
            return since and seconds > since[0] + later

        assert start_and_kill(config, path, moment, UNDRAWN)
        assert not (path / "summary.json").exists()
        reached += draw.randint(4, 7)
    command_line.run("--config", config, "--workdir", path, UNDRAWN)
    assert command_line.results(path) == command_line.results(whole)


def test_killed_while_it_saves(config, whole, tmp_path):
    path = tmp_path / "run"
    kills = [
        start_and_kill(
            config, path, lambda _, p=pattern: glob.glob(f"{path}/checkpoints/{p}"), UNDRAWN
        )
        for pattern in ("*.orbax*/*/d", "9")
    ]
    assert any(kills)  # these moments are short
    command_line.run("--config", config, "--workdir", path, UNDRAWN)
    assert command_line.results(path) == command_line.results(whole)
    assert set(os.listdir(path / "checkpoints")) == set(os.listdir(whole / "checkpoints"))


@pytest.mark.parametrize("appears", [".export.part", "export"])
def test_killed_while_it_writes_its_results(config, whole, tmp_path, appears):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    for name in ("summary.json", "evaluation.json"):
        (path / name).unlink()
    for name in ("export", "figures"):
        shutil.rmtree(path / name)
    start_and_kill(config, path, lambda _: (path / appears).exists())
    command_line.run("--config", config, "--workdir", path)
    assert command_line.results(path) == command_line.results(whole)
    assert files(path) == files(whole)


def files(folder):
    """Names of all files but the checkpoints' own."""
    found = (file.relative_to(folder) for file in folder.rglob("*"))
    return sorted(file for file in found if file.parts[0] != "checkpoints")
