"""The Ray launcher on a real Ray of this machine."""

import os
import pathlib
import signal
import time

import ablation_example
import command_line
import pytest
import test_launchers

from tl_jax.errors import UserError
from tl_jax.launchers import Ray, Task

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster(monkeypatch):
    """Ray on this machine, with room for two tasks."""
    tests = pathlib.Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}{os.pathsep}{tests}")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_a_task_whose_worker_is_killed_is_tried_again(cluster, tmp_path):
    tasks = [
        Task("dies", test_launchers.die, (str(tmp_path / "a"),)),
        Task("quick", test_launchers.double, (4,)),
        Task("wrong", test_launchers.fail, (UserError, "mend it")),
    ]
    found = {outcome.task.name: outcome for outcome in Ray(None, 1, 0, 2)(tasks)}
    assert found["dies"].result == "lived"
    assert found["quick"].result == 8
    assert found["wrong"].error == "mend it"


def test_a_sweep_whose_worker_is_killed_gives_the_same_table(network, tmp_path):
    config = ablation_example.write(tmp_path, network("resnet_basic"))
    arguments = ["--mode=ablate", f"--config={config}"]
    command_line.run(*arguments, f"--workdir={tmp_path / 'local'}")
    process = command_line.start(
        *arguments, f"--workdir={tmp_path / 'ray'}", "--config.ablate.launcher=ray"
    )
    cells = tmp_path / "ray" / "cells"
    while not list(cells.glob("*/plan.json")) and process.poll() is None:
        time.sleep(0.02)
    children = {int(pid) for pid in os.listdir("/proc") if pid.isdigit()}
    victims = [pid for pid in children if b"ray::_call_in" in _command(pid)]
    assert victims, "no worker is busy"
    os.kill(victims[0], signal.SIGKILL)
    printed, complained = process.communicate(timeout=240)
    assert process.returncode == 0, printed + complained
    tables = [ablation_example.rows(tmp_path / name) for name in ("local", "ray")]
    for row in (*tables[0], *tables[1]):
        row.pop("command")
    assert tables[0] == tables[1]


def _command(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
