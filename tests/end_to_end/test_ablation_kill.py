"""A sweep that is killed again and again ends with the table of one left alone."""

import random
import signal
import time

import ablation_example
import command_line

KILLS = 4


def progress(workdir):
    """How far a sweep is: it only grows, over restarts too."""
    return sum(1 for path in workdir.rglob("*.json") if "checkpoints" not in path.parts)


def test_killed_at_random_moments(network, tmp_path):
    config = ablation_example.write(tmp_path, network("resnet_basic"))
    arguments = ["--mode=ablate", f"--config={config}"]
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    command_line.run(*arguments, f"--workdir={alone}")

    chance, whole = random.Random(0), progress(alone)
    for share in sorted(chance.uniform(0.1, 0.9) for _ in range(KILLS)):
        process = command_line.start(*arguments, f"--workdir={cut}", "--config.ablate.jobs=2")
        while progress(cut) < share * whole and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, "it was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    command_line.run(*arguments, f"--workdir={cut}")
    theirs, ours = (ablation_example.rows(folder) for folder in (alone, cut))
    for row in (*theirs, *ours):
        row.pop("command")  # which names the work directory
    assert ours == theirs
