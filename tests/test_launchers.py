"""Tasks in processes of their own: results, failures, deaths, retries."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tl_jax import launchers
from tl_jax.errors import RunFailed, UserError
from tl_jax.launchers import Local, Outcome, Task

ROOT = pathlib.Path(__file__).resolve().parents[1]


def double(number):
    return 2 * number


def pid(_):
    return os.getpid()


def fail(kind, text):
    raise kind(text)


def die(file):
    """The first time the process dies, the second time it lives."""
    path = pathlib.Path(file)
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    if len(path.read_text()) < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def die_always():
    os.kill(os.getpid(), signal.SIGKILL)


def by_name(outcomes):
    return {outcome.task.name: outcome for outcome in outcomes}


def test_tasks_come_back_with_their_results_from_other_processes():
    tasks = [Task(str(i), double, (i,)) for i in range(5)] + [Task("pid", pid, (0,))]
    found = by_name(Local(2, 0)(tasks))
    assert [found[str(i)].result for i in range(5)] == [0, 2, 4, 6, 8]
    assert found["pid"].result != os.getpid()


def meet(folder, name, other):
    """Returns when two processes are here at once."""
    (pathlib.Path(folder) / name).touch()
    while not (pathlib.Path(folder) / other).exists():
        time.sleep(0.01)
    return os.getpid()


def test_a_process_waits_for_the_next_call_and_is_given_what_it_knows(tmp_path):
    launch, ran = Local(2, 0), []
    for number, kinds in enumerate(("ab", "ba", "ab", "ba", "ba")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tasks = [Task(k, meet, (str(folder), k, {"a": "b", "b": "a"}[k]), k) for k in kinds]
        found = by_name(launch(tasks))
        ran.append((found["a"].result, found["b"].result))
    assert len(set(ran)) == 1
    launch.close()
    for process in ran[0]:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_process_that_died_while_it_waited_is_replaced():
    launch = Local(1, 0)
    (first,) = launch([Task("pid", pid, (0,))])
    os.kill(first.result, signal.SIGKILL)
    while any(child.pid == first.result for child in multiprocessing.active_children()):
        time.sleep(0.01)
    (second,) = launch([Task("pid", pid, (0,))])
    assert second.error is None
    assert second.result != first.result
    launch.close()


def test_a_failure_stops_no_other_task():
    tasks = [
        Task("user", fail, (UserError, "mend it")),
        Task("run", fail, (RunFailed, "not finite")),
        Task("bug", fail, (ValueError, "a bug")),
        Task("good", double, (4,)),
    ]
    found = by_name(Local(1, 3)(tasks))
    assert found["user"].error == "mend it"
    assert found["run"].error == "not finite"
    assert found["bug"].error == "ValueError: a bug"
    assert found["good"].result == 8
    with pytest.raises(UserError, match="user: mend it"):
        launchers.results(list(found.values()))
    several = [Outcome(task, error="mend it") for task in tasks[:3]]
    with pytest.raises(UserError, match=r"^user, run, bug: mend it$"):  # once
        launchers.results(several)


def test_a_task_whose_process_died_is_tried_again(tmp_path):
    tasks = [Task("dies", die, (str(tmp_path / "a"),)), Task("good", double, (1,))]
    found = by_name(Local(1, 1)(tasks))
    assert found["dies"].result == "lived"
    assert found["good"].result == 2


def test_a_task_whose_process_always_dies_is_given_up():
    found = by_name(Local(2, 1)([Task("dies", die_always, ()), Task("good", double, (1,))]))
    assert found["dies"].error == "its process died (exit code -9)"
    assert found["good"].result == 2


def has_children(folder):
    """Starts a process, as those that read images are (`data.workers`), which lives on."""
    child = multiprocessing.get_context("spawn").Process(
        target=wait, args=(f"{folder}/child",), daemon=True
    )
    child.start()
    while not (pathlib.Path(folder) / "child").exists():
        time.sleep(0.01)
    return child.pid


def test_a_process_may_have_its_own_and_takes_them_along(tmp_path):
    launch = Local(1, 0)
    [outcome] = launch([Task("children", has_children, (str(tmp_path),))])
    assert outcome.error is None
    os.kill(outcome.result, 0)
    launch.close()
    assert is_gone(outcome.result)


def test_a_call_left_in_the_middle_leaves_nobody(tmp_path):
    launch = Local(2, 0)
    outcomes = launch([Task("sleep", wait, (str(tmp_path / "pid"),)), Task("good", double, (1,))])
    assert next(outcomes).task.name == "good"
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    launch.close()
    assert is_gone(int((tmp_path / "pid").read_text()))


def group(_):
    return os.getpgrp()


def test_control_c_reaches_the_sweep_alone():
    [outcome] = Local(1, 0)([Task("group", group, (0,))])
    assert outcome.result != os.getpgrp()


def test_a_task_that_no_node_has_room_for(caplog):
    nodes = [{"CPU": 2.0, "memory": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    launchers._check_nodes(nodes, 8, 1, grows=False)
    with pytest.raises(UserError, match="no node has 1 CPUs and 2 GPUs; there are: 2 CPUs, 0 GPUs"):
        launchers._check_nodes(nodes, 1, 2, grows=False)
    launchers._check_nodes(nodes, 16, 0, grows=True)
    assert "no node has 16 CPUs" in caplog.text


PARENT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_launchers
from tl_jax.launchers import Local, Task
if __name__ == "__main__":
    list(Local(1, 0)([Task("sleep", test_launchers.wait, ({file!r},))]))
"""


def wait(file):
    pathlib.Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def test_nobody_outlives_a_killed_parent(tmp_path):
    file, script = tmp_path / "pid", tmp_path / "parent.py"
    script.write_text(PARENT.format(root=str(ROOT), tests=str(ROOT / "tests"), file=str(file)))
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(file.read_text())
    parent.kill()
    parent.wait()
    assert is_gone(child), "the worker outlived its parent"


def is_gone(process):
    """Whether it ended, or does so soon."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = pathlib.Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
