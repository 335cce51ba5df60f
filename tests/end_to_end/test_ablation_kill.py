"""A sweep that is killed again and again ends with the table of one left alone."""

import random
import signal
import time

import ablation_example
import command_line

KILLS = 4


def test_killed_at_random_moments(network, tmp_path):
    config = ablation_example.write(tmp_path, network("resnet_basic"))
    arguments = ["--mode=ablate", f"--config={config}"]
    started = time.monotonic()
    command_line.run(*arguments, f"--workdir={tmp_path / 'alone'}")
    took = time.monotonic() - started

    chance, cut = random.Random(0), 0
    for _ in range(KILLS):
        process = command_line.start(
            *arguments, f"--workdir={tmp_path / 'cut'}", "--config.ablate.jobs=2"
        )
        time.sleep(chance.uniform(0.2, 0.8) * took)
        cut += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert cut >= 2, "most were over before they were killed"
    command_line.run(*arguments, f"--workdir={tmp_path / 'cut'}")
    theirs, ours = (ablation_example.rows(tmp_path / name) for name in ("alone", "cut"))
    for row in (*theirs, *ours):
        row.pop("command")  # which names the work directory
    assert ours == theirs
