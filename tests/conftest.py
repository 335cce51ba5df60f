"""Every test runs on 8 virtual CPU devices, offline, and never touches the user's caches."""

import os

import compiler_flags

# What `command_line.py` starts compiles as it does for users.
os.environ["XLA_FLAGS"] = " ".join(
    (
        compiler_flags.DEVICES,
        *compiler_flags.FAST,
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import atexit
import gc
import json
import pathlib
import shutil
import tempfile

# What one test compiled the next one need not: a cache for this session and all its processes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tl_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Each holds memory maps, of which Linux gives a process 65,530; loading one more is fatal."""
    yield
    jax.clear_caches()
    gc.collect()


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
            "logging.figures": False,  # which take longer than the rest of such a run
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
