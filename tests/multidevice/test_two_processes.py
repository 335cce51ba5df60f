"""Two real processes with two devices each are one process with four."""

import shutil
import socket

import command_line
import numpy as np
import pytest
from safetensors.numpy import load

TIMEOUT = 200


@pytest.fixture(scope="module")
def config(network, tmp_path_factory):
    """Synchronised BatchNorm, so that a statistic kept per process would show.

    Sums over devices are rounded in another order between processes; Adam would magnify that.
    """
    return command_line.write_config(
        tmp_path_factory.mktemp("config") / "short.py",
        network("resnet_no_shortcut"),
        **{
            "freeze.strategy": "full",
            "freeze.batch_norm": "batch",
            "data.augmentation": "flip",
            "train.checkpoint_every_steps": 2,
            "train.gradient_clip_norm": 1.0,
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.05,
        },
    )


def start_two(*arguments):
    """Both processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        command_line.start(
            *arguments,
            environment={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            },
        )
        for index in range(2)
    ]


def end(processes, code=0):
    """What both printed and complained of."""
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], said
    return said


def near(figures, names=None):
    return {name: pytest.approx(figures[name], rel=1e-5) for name in names or figures}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The work directory of one process with four devices."""
    path = tmp_path_factory.mktemp("one") / "run"
    command_line.run("--config", config, "--workdir", path, devices=4)
    return command_line.results(path)


@pytest.fixture(scope="module", params=["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def together(config, tmp_path_factory, request):
    """The work directory of two processes, the kind of parallelism, and what they said."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    arguments = ("--config", config, "--workdir", path, f"--config.parallel={request.param}")
    return path, arguments, end(start_two(*arguments))


def test_they_end_with_the_same_parameters(whole, together):
    path, _, _ = together
    found = command_line.results(path)
    assert found["freeze"] == whole["freeze"]
    ours, theirs = load(found["exported"]), load(whole["exported"])
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6, err_msg=key)
    for ours, theirs in zip(found["records"], whole["records"], strict=True):
        assert ours.pop("split") == theirs["split"]
        assert ours == near(theirs, ours)
    for split in ("validation", "test"):
        assert found["metrics"][split] == near(whole["metrics"][split])


def test_only_the_first_speaks(together):
    _, _, ((printed, _), (other, complained)) = together
    assert "test accuracy" in printed
    # Gloo's own remarks, which it may cut into one another.
    lines = (other + complained).splitlines()
    assert not [line for line in lines if line.strip() and "peer ranks" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("together", ["shard_map"], indirect=True)  # whose state is global
def test_they_resume(together, tmp_path):
    path, arguments, _ = together
    cut = tmp_path / "run"
    shutil.copytree(path, cut)
    for name in ("summary.json", "evaluation.json"):
        (cut / name).unlink()
    for name in ("export", "checkpoints/6"):
        shutil.rmtree(cut / name)
    end(start_two(*arguments[:2], "--workdir", cut, *arguments[4:]))
    assert command_line.results(cut) == command_line.results(path)


def test_both_leave_when_the_work_directory_cannot_be_used(config, tmp_path):
    (tmp_path / "file").touch()
    said = end(start_two("--config", config, "--workdir", tmp_path / "file" / "run"), code=2)
    for _, complained in said:
        assert "cannot be written: Not a directory" in complained and "Traceback" not in complained


@pytest.mark.slow
def test_they_share_a_cache_on_disk(config, tmp_path):
    """The first writes what both computed; one process with as many devices finds it there."""
    fields = {"freeze.strategy": "linear_probe", "freeze.batch_norm": "frozen", "cache": "disk"}
    fields["data.augmentation"] = "none"
    shared = [f"--config.{name}={value}" for name, value in fields.items()]
    shared += ["--config", config, f"--config.cache_dir={tmp_path / 'cache'}"]
    end(start_two(*shared, "--workdir", tmp_path / "two"))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert stamps
    command_line.run(*shared, "--workdir", tmp_path / "one", devices=4)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")} == stamps
    ours, theirs = (command_line.results(tmp_path / name) for name in ("two", "one"))
    for split in ("validation", "test"):
        assert ours["metrics"][split] == near(theirs["metrics"][split])
    ours, theirs = load(ours["exported"]), load(theirs["exported"])
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-6, err_msg=key)
