"""Writes the `flax_model.msgpack` fixtures: `cd tests && python -m golden.make_flax`.

Needs transformers 4.57 (the last with Flax classes); weights as in `networks.py`.
"""

import json
import pathlib
import shutil

import flax
import jax
import numpy as np
import transformers
from golden import networks

HERE = pathlib.Path(__file__).parent / "flax"
NETWORKS = ("resnet_basic", "resnet_bottleneck", "vit_plain", "vit_base")


def main() -> None:
    """A folder a network, with the model's outputs."""
    for name in NETWORKS:
        config = networks.CONFIGS[name]
        family = {"resnet": "ResNet", "vit": "ViT"}[config["model_type"]]
        base = name.endswith("_base")
        values = {key: value for key, value in config.items() if key != "model_type"}
        model = getattr(
            transformers, f"Flax{family}" + ("Model" if base else "ForImageClassification")
        )(
            getattr(transformers, f"{family}Config")(**values),
            input_shape=(1, *networks.SIZES[name], 3) if family == "ResNet" else (1, 32, 32, 3),
        )
        flat = flax.traverse_util.flatten_dict(dict(model.params), sep="/")
        params = {}
        for key, leaf in flat.items():
            value = networks.random(f"{name}/{key}", leaf.shape) * 0.3
            params[key] = np.exp(value) if key.endswith(("var", "scale")) else value
        params = flax.traverse_util.unflatten_dict(params, sep="/")
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, params=params)
        size = (32, 32) if family == "ViT" else networks.SIZES[name]
        images = networks.random(f"flax/{name}", (2, *size, 3))
        result = model(images.transpose(0, 3, 1, 2), params=params)
        outputs = {"keys": json.dumps(sorted(flat))}
        if base:
            outputs["features"] = np.asarray(result.last_hidden_state)[:, 0]
        else:
            outputs["logits"] = np.asarray(result.logits)
        np.savez_compressed(folder / "outputs.npz", **outputs)
        print(name, jax.tree.map(np.shape, outputs))


if __name__ == "__main__":
    main()
