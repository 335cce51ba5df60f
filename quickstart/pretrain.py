"""Makes the trunk of the quickstart: a small ResNet, pretrained on Fashion-MNIST by tl_jax itself.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747,
https://github.com/zalandoresearch/fashion-mnist; licence: MIT. The idx files are those of Debian's
package dataset-fashion-mnist.

Run: apt-get install dataset-fashion-mnist
     python -m tl_jax.prepare fashion_mnist --from /usr/share/datasets/fashion-mnist --data-dir DIR
     python quickstart/pretrain.py --data-dir DIR [--config.FIELD=VALUE …]
It writes a folder in Hugging Face format with random weights, trains it by
`run.py --config configs/pretrain_quickstart.py` and puts the export into quickstart/trunk. The
result is committed: this script is not needed to run the quickstart.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from tl_jax import models, param_tree, weight_conversion

ROOT = Path(__file__).resolve().parent.parent
TRUNK = ROOT / "quickstart" / "trunk"
CONFIG = "configs/pretrain_quickstart.py"
SEED = 0
EXPORTED = ("config.json", "model.safetensors", "preprocessor_config.json")
NETWORK: dict[str, Any] = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [2, 2, 1],
    "layer_type": "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.286, 0.286, 0.286],  # of the training images
    "image_std": [0.353, 0.353, 0.353],
}
DATA = {
    "name": "Fashion-MNIST",
    "licence": "MIT",
    "source": "https://github.com/zalandoresearch/fashion-mnist",
    "paper": "https://arxiv.org/abs/1708.07747",
    "package": "Debian's dataset-fashion-mnist",
}


def main() -> None:
    """Trains and fills quickstart/trunk."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="holds the prepared fashion_mnist")
    parser.add_argument("--workdir", help="kept if given: the run continues where it was cut off")
    flags, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(flags.workdir or temporary).resolve()
        blank = write_blank(workdir / "blank")
        run = workdir / "run"
        command = [
            *("python", "run.py", "--config", CONFIG, f"--config.model.pretrained={blank}"),
            *(f"--config.data.dir={flags.data_dir}", f"--workdir={run}", *overrides),
        ]
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)
        TRUNK.mkdir(exist_ok=True)
        for name in EXPORTED:
            shutil.copyfile(run / "export" / name, TRUNK / name)
        found = provenance(run, overrides)
    (TRUNK / "provenance.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (TRUNK / "README.md").write_text(readme(found), "utf-8")


def write_blank(folder: Path) -> Path:
    """The network before any training as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"id2label": {"0": "none"}, "label2id": {"none": 0}}
    (folder / "config.json").write_text(json.dumps(NETWORK | labels, indent=2), "utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), "utf-8")
    save_file(blank_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def blank_tensors() -> dict[str, np.ndarray]:
    """Random tensors by their keys in a file of transformers' PyTorch class, in its layout."""
    family = models.FAMILIES["resnet"]
    module = family.module(NETWORK, 1)
    variables = jax.jit(module.init)(jax.random.key(SEED), np.zeros((1, 28, 28, 3), np.float32))
    tensors = {}
    for path, leaf in param_tree.flatten(variables).items():
        owner, _, name = path.partition("/")[2].rpartition("/")
        key = re.sub(r"_(\d+)", r".\1", owner).replace("/", ".")
        axes = weight_conversion.TO_TORCH[leaf.ndim] if name == "kernel" else range(leaf.ndim)
        array = np.ascontiguousarray(np.transpose(leaf, axes))
        tensors[f"{key}.{weight_conversion.TORCH_NAMES.get(name, name)}"] = array
        if name == "mean":
            tensors[f"{key}.{weight_conversion.COUNTER}"] = np.zeros((), np.int64)
    return tensors


def provenance(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Where the trunk comes from, and how good it was at what it was trained for."""
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    return {
        "data": DATA | {"fingerprint": summary["data"]["fingerprint"]},
        "made_by": " ".join(["python quickstart/pretrain.py --data-dir DIR", *overrides]),
        "config": CONFIG,
        "config_hash": summary["config_hash"],
        "parameters": summary["model"]["parameters"]["total"],
        "metrics": summary["metrics"],
        "train_seconds": round(summary["cost"]["train_seconds"], 1),
        "versions": summary["environment"]["versions"],
        "sha256": {
            name: hashlib.sha256((TRUNK / name).read_bytes()).hexdigest() for name in EXPORTED
        },
        "licence": "Apache-2.0, as the rest of this repository",
    }


def readme(found: dict[str, Any]) -> str:
    """What a reader of the folder should know."""
    test = found["metrics"]["test"]
    low, high = test["accuracy_ci95"]
    return f"""# The quickstart's trunk

A ResNet with {found["parameters"]:,} parameters (basic blocks, 28 px) in Hugging Face format,
trained from random weights on [Fashion-MNIST]({DATA["source"]}) (Zalando Research, MIT licence)
by tl_jax itself: `quickstart/pretrain.py` says how. Its BatchNorm statistics are the training's.
Test accuracy on Fashion-MNIST: {test["accuracy"]:.4f} (95 % interval {low:.4f} to {high:.4f},
{test["examples"]:,} images). `provenance.json` holds hashes, versions and the source of the data.
"""


if __name__ == "__main__":
    main()
