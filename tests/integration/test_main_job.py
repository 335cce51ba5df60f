"""The main job on real weights and real data, cut down to minutes."""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from tl_jax import prepare
from tl_jax.main import main

WEIGHTS = os.environ.get("TL_JAX_REAL_WEIGHTS")
FASHION = os.environ.get("TL_JAX_FASHION_MNIST")
ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (WEIGHTS and FASHION),
    reason="TL_JAX_REAL_WEIGHTS and TL_JAX_FASHION_MNIST name no real weights and data",
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare.prepare("fashion_mnist", FASHION, str(folder))
    return str(folder)


def run(config, weights, workdir, data_dir, *overrides):
    arguments = [
        f"--config={ROOT / 'configs' / config}.py",
        f"--workdir={workdir}",
        f"--config.model.pretrained={WEIGHTS}/{weights}",
        f"--config.data.dir={data_dir}",
        *[f"--config.{override}" for override in overrides],
    ]
    assert main(arguments) == 0
    return json.loads((workdir / "summary.json").read_text())


def check_trunk(workdir, weights, prefix, head):
    """Every tensor of the source's trunk stands in the export, byte for byte."""
    source = load_file(f"{WEIGHTS}/{weights}/model.safetensors")
    exported = load_file(workdir / "export" / "model.safetensors")
    trunk = {
        key if key.startswith(f"{prefix}.") else f"{prefix}.{key}": value
        for key, value in source.items()
        if not key.startswith(head)
    }
    assert trunk.keys() == {key for key in exported if not key.startswith(head)}
    for key, value in trunk.items():
        assert exported[key].dtype == value.dtype and exported[key].tobytes() == value.tobytes()
    weight = next(value for key, value in exported.items() if key.startswith(head))
    assert weight.dtype == np.float32


def test_resnet(data_dir, tmp_path):
    summary = run(
        "resnet_fashion",
        "resnet50-thin",
        tmp_path,
        data_dir,
        "model.image_size=64",
        "data.splits.train=train[:4096]",
        "data.splits.validation=train[59000:]",
        "data.splits.test=test[:1000]",
        "train.epochs=4",
    )
    assert summary["freeze"]["certificate"]["ok"]
    # scikit-learn's figure for 5,000 images is 0.838; the standard error at 1,000 is 0.012.
    assert summary["metrics"]["test"]["accuracy"] > 0.78
    cost = summary["cost"]
    assert cost["flops_per_step"] <= 1.02 * cost["flops_minimum"]
    check_trunk(tmp_path, "resnet50-thin", "resnet", "classifier.")


def test_vit_in_half_precision(data_dir, tmp_path):
    summary = run(
        "vit_fashion",
        "vit-small",
        tmp_path,
        data_dir,
        "model.image_size=56",
        "data.splits.train=train[:1024]",
        "data.splits.validation=train[59744:]",
        "data.splits.test=test[:512]",
        "data.batch_size=128",
        "train.epochs=4",
    )
    assert summary["freeze"]["certificate"]["ok"]
    assert summary["metrics"]["test"]["accuracy"] > 0.6
    check_trunk(tmp_path, "vit-small", "vit", "classifier.")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["dtype"] == "float32" and len(config["id2label"]) == 10
