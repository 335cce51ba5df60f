"""Writes the goldens: `cd tests && python -m golden.make` (needs PyTorch and transformers).

Weights and images come from `networks.py`; a golden holds the file's keys and shapes as
transformers writes them, and the output of every block of transformers' model in float32.
"""

import json
import pathlib
import tempfile

import numpy as np
from golden import networks, reference

HERE = pathlib.Path(__file__).parent


def main() -> None:
    """One file a network."""
    for name, config in networks.CONFIGS.items():
        base = name.endswith("_base")
        shapes = reference.random_shapes(config, base)
        with tempfile.TemporaryDirectory() as folder:
            networks.write_folder(pathlib.Path(folder), config, shapes, seed=name)
            model, _ = reference.load(pathlib.Path(folder), config, base)
            outputs = reference.run(model, networks.images(name))
        np.savez_compressed(HERE / f"{name}.npz", shapes=json.dumps(shapes), **outputs)
        print(name, {key: value.shape for key, value in outputs.items()})


if __name__ == "__main__":
    main()
