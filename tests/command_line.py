"""run.py as a user starts it: short runs of a small network on the quickstart's digits."""

import json
import os
import pathlib
import pprint
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]

SHORT = {
    "data.source": "tfds:digits",
    "data.dir": str(ROOT / "quickstart" / "data"),
    "data.splits.train": "train[:192]",
    "data.splits.validation": "train[192:300]",
    "data.splits.test": "test[:130]",
    "data.batch_size": 64,
    "train.epochs": 2,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.01,
    "logging.every_steps": 1,
    "logging.figures": False,  # which take longer than the rest of such a run
    "logging.compilation_cache": None,  # but the tests' own, in conftest.py
}


def write_config(file: pathlib.Path, network: str, **fields: Any) -> pathlib.Path:
    """A config file with these fields, by dotted name, over those of a short run."""
    nested: dict = {}
    for dotted, value in {"model.pretrained": network, **SHORT, **fields}.items():
        *sections, leaf = dotted.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    file.write_text(f"def get_config():\n    return {pprint.pformat(nested)}\n")
    return file


def start(
    *arguments: Any, devices: int = 2, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """run.py in a process of its own, on so many virtual CPU devices; its output is text."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "COLUMNS": "160", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments: Any, code: int = 0, **options: Any) -> tuple[str, str]:
    """What run.py prints and complains of, once it has ended with this exit code."""
    process = start(*arguments, **options)
    try:
        printed, complained = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, printed + complained
    return printed, complained


def read_json(file: pathlib.Path) -> Any:
    """Content of a JSON file."""
    return json.loads(file.read_text())


def results(workdir: pathlib.Path) -> dict[str, Any]:
    """All that a run leaves behind and that does not depend on the clock."""
    summary = read_json(workdir / "summary.json")
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        "exported": (workdir / "export" / "model.safetensors").read_bytes(),
        "records": [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records],
        "evaluation": read_json(workdir / "evaluation.json"),
        **{name: summary[name] for name in ("metrics", "steps", "freeze", "config_hash")},
    }
