"""No module of the package brings PyTorch or TensorFlow into the process."""

import json
import subprocess
import sys

FORBIDDEN = ("torch", "tensorflow")

PROGRAM = """
import importlib, json, pkgutil, sys
import tl_jax
after_package = sorted(sys.modules)
names = [m.name for m in pkgutil.walk_packages(tl_jax.__path__, "tl_jax.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps({"package": after_package, "all": sorted(sys.modules), "names": names}))
"""


def roots(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_neither_torch_nor_tensorflow_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "tl_jax.preprocessing" in loaded["names"]
    assert roots(loaded["package"]).isdisjoint(FORBIDDEN)
    assert roots(loaded["all"]).isdisjoint(FORBIDDEN)
