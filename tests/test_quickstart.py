"""The quickstart: what is committed for it, and a short run through the command line."""

import hashlib
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from summary_contract import SUMMARY, wrong_fields

from tl_jax import config_files, job, param_tree
from tl_jax.main import main
from tl_jax.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
TRUNK = ROOT / "quickstart" / "trunk"
CONFIG = ROOT / "configs" / "quickstart.py"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def load_json(path):
    return json.loads(Path(path).read_text())


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_what_is_committed_is_small():
    assert folder_bytes(TRUNK) <= 2_000_000
    assert folder_bytes(ROOT / "quickstart" / "data") <= 1_100_000


def test_the_trunk_is_the_one_that_its_provenance_describes():
    provenance = load_json(TRUNK / "provenance.json")
    for name in FILES:
        found = hashlib.sha256((TRUNK / name).read_bytes()).hexdigest()
        assert found == provenance["sha256"][name], name
    assert provenance["data"]["licence"] == "MIT"
    assert provenance["metrics"]["test"]["accuracy"] >= 0.90
    assert provenance["metrics"]["test"]["examples"] == 10_000
    assert (TRUNK / "README.md").is_file()


@pytest.fixture(scope="module")
def trunk():
    return load_pretrained(TRUNK)


def test_the_trunk_loads_with_its_own_head(trunk):
    assert trunk.class_names[0] == "T-shirt/top" and len(trunk.class_names) == 10
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    logits = trunk.apply(trunk.preprocess(images))
    assert logits.shape == (3, 10) and np.isfinite(logits).all()


def test_batch_norm_statistics_are_real(trunk):
    for path, leaf in param_tree.flatten(trunk.variables["batch_stats"]).items():
        untouched = 0.0 if path.endswith("/mean") else 1.0
        assert np.abs(np.asarray(leaf) - untouched).max() > 0.01, path
        assert np.ptp(leaf) > 0.01, path  # not one number for all channels
    for path, leaf in param_tree.flatten(trunk.variables["params"]).items():
        assert np.isfinite(leaf).all() and np.ptp(leaf) > 0, path


@pytest.mark.parametrize("name", ["quickstart", "pretrain_quickstart"])
def test_the_configurations_are_whole(name):
    config = config_files.resolve(config_files.load_config(str(ROOT / "configs" / f"{name}.py")))
    assert Path(config.model.pretrained) == TRUNK


def test_the_header_says_command_hardware_runtime_and_result():
    header = CONFIG.read_text().split('"""')[1]
    for word in ("Command", "Hardware", "Runtime", "Expected"):
        assert re.search(rf"^{word}\s", header, re.MULTILINE), word


def test_the_data_are_the_digits():
    config = config_files.resolve(config_files.load_config(str(CONFIG)))
    examples = job.prepare(config).examples
    assert set(examples) == {"train", "validation", "test"}
    assert len(examples["test"]) == 500
    assert len(examples["train"]) + len(examples["validation"]) <= 1297
    assert examples["train"].class_names == tuple("0123456789")
    assert examples["train"].image_shape == (8, 8, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Work directory of one epoch on 8 devices, and what was printed."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    arguments = [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        "--config.train.epochs=1",
        "--config.logging.compilation_cache=None",
    ]
    assert jax.device_count() == 8
    assert main(arguments) == 0
    return workdir


def test_the_summary_has_every_field_of_the_contract(run):
    for folder in (run, run / "control"):
        summary = load_json(folder / "summary.json")
        assert wrong_fields(summary, SUMMARY) == []
        for split, examples in (("test", 500), ("validation", None)):
            metrics = summary["metrics"][split]
            low, high = metrics["accuracy_ci95"]
            assert 0 <= low <= metrics["accuracy"] <= high <= 1
            assert examples in (None, metrics["examples"])
            assert math.isfinite(metrics["loss"])
        assert re.fullmatch("[0-9a-f]{64}", summary["config_hash"])


def test_the_trunk_stayed_frozen(run):
    for folder in (run, run / "control"):
        summary = load_json(folder / "summary.json")
        certificate, parameters = summary["freeze"]["certificate"], summary["model"]["parameters"]
        assert certificate["ok"] is True
        assert certificate["sha256_before"] == certificate["sha256_after"]
        head = 10 * 128 + 10
        assert parameters["trainable"] == head
        assert parameters["frozen"] == parameters["total"] - head
        plan = load_json(folder / "plan.json")
        frozen = [leaf for leaf in plan["leaves"] if leaf["group"] == "frozen"]
        statistics = param_tree.flatten(load_pretrained(TRUNK).variables["batch_stats"])
        assert certificate["leaves"] == len(frozen) + len(statistics)


def test_the_control_differs_in_the_trunk_alone(run):
    ours, control = load_json(run / "config.json"), load_json(run / "control" / "config.json")
    assert control["freeze"].pop("strategy") == "random_trunk"
    assert ours["freeze"].pop("strategy") == "linear_probe"
    assert (ours.pop("control"), control.pop("control")) == ("random_trunk", None)
    assert ours == control
    hashes = {
        load_json(folder / "summary.json")["freeze"]["certificate"]["sha256_before"]
        for folder in (run, run / "control")
    }
    assert len(hashes) == 2


def test_the_work_directory_holds_what_the_contract_names(run):
    for name in ("config.json", "plan.json", "metrics.jsonl", "summary.json"):
        assert (run / name).is_file(), name
    assert any((run / "checkpoints").iterdir())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)
    pictures = list((run / "figures").glob("*.png"))
    assert len(pictures) >= 3
    for picture in pictures:
        with Image.open(picture) as image:
            image.verify()


def test_the_export_keeps_the_trunk_bit_for_bit(run):
    source, export = load_pretrained(TRUNK), load_pretrained(run / "export")
    assert export.class_names == tuple("0123456789")
    ours, theirs = (param_tree.flatten(network.variables) for network in (export, source))
    for path, leaf in theirs.items():
        if not path.startswith("params/classifier_1"):
            assert np.asarray(leaf).tobytes() == np.asarray(ours[path]).tobytes(), path
    assert np.abs(ours["params/classifier_1/kernel"]).max() > 0


def test_started_again_it_says_that_it_is_finished(run, capsys):
    before = (run / "summary.json").stat().st_mtime_ns
    arguments = [f"--config={CONFIG}", f"--workdir={run}", "--config.train.epochs=1"]
    assert main([*arguments, "--config.logging.compilation_cache=None"]) == 0
    assert "finished" in capsys.readouterr().out
    assert (run / "summary.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused(run, capsys):
    arguments = [f"--config={CONFIG}", f"--workdir={run}", "--config.train.epochs=2"]
    assert main([*arguments, "--config.logging.compilation_cache=None"]) == 2
    assert "config.train.epochs" in capsys.readouterr().err
