"""Every test runs on 8 virtual CPU devices, offline, and never touches the user's caches."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import json
import pathlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """`network(name)`: a Hugging Face folder of one of the small random networks in golden/."""
    from golden import networks

    def folder(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / "networks" / name
        if not path.exists():
            with np.load(HERE / "golden" / f"{name}.npz") as golden:
                shapes = json.loads(str(golden["shapes"]))
            networks.write_folder(path, networks.CONFIGS[name], shapes, seed=name)
        return str(path)

    return folder


@pytest.fixture(scope="session")
def digits_config(network):
    """`digits_config(name, **fields)`: a short run of a small network on the real digits."""
    from tl_jax import config_files

    def resolve(name: str, **fields):
        base = {
            "model.pretrained": network(name),
            "data.source": "tfds:digits",
            "data.dir": str(HERE.parent / "quickstart" / "data"),
            "data.splits.train": "train[:192]",
            "data.splits.validation": "train[192:300]",
            "data.splits.test": "test[:130]",
            "data.batch_size": 64,
            "train.epochs": 2,
            "optimizer.learning_rate": 0.05,
            "logging.compilation_cache": None,
        }
        nested: dict = {}
        for dotted, value in {**base, **fields}.items():
            *sections, leaf = dotted.split(".")
            section = nested
            for key in sections:
                section = section.setdefault(key, {})
            section[leaf] = value
        return config_files.resolve(nested)

    return resolve
