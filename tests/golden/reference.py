"""What transformers' PyTorch models give, block by block. Needs PyTorch."""

import pathlib
from collections.abc import Mapping

import numpy as np
import torch
import transformers


def random_shapes(config: Mapping[str, object], base: bool) -> dict[str, list[int]]:
    """Keys and shapes of the file that transformers writes for a config."""
    import tempfile

    from safetensors import safe_open

    model = _class(config, base)(_config(config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def load(folder: pathlib.Path, config: Mapping[str, object], base: bool = False):
    """The model of a folder in float32, and what transformers says of its keys."""
    model, info = _class(config, base).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    return model.eval(), info


def run(model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Block name → output, channels last; images [N, H, W, C]."""
    outputs: dict[str, np.ndarray] = {}

    def record(name: str):
        def hook(_module, _inputs, output):
            output = output.detach()
            outputs[name] = (output.movedim(1, -1) if output.ndim == 4 else output).numpy()

        return hook

    kind = model.config.model_type
    trunk = getattr(model, kind, model)
    hooks = []
    if kind == "resnet":
        hooks.append(trunk.embedder.register_forward_hook(record("stem")))
        for i, stage in enumerate(trunk.encoder.stages):
            for j, layer in enumerate(stage.layers):
                hooks.append(layer.register_forward_hook(record(f"stages_{i}/layers_{j}")))
        arguments = {}
    else:
        hooks.append(trunk.embeddings.register_forward_hook(record("embeddings")))
        for i, layer in enumerate(trunk.layers):
            hooks.append(layer.register_forward_hook(record(f"layer_{i}")))
        # transformers interpolates square grids of square patches only.
        native = model.config.image_size
        native = (native, native) if isinstance(native, int) else tuple(native)
        arguments = {"interpolate_pos_encoding": images.shape[1:3] != native}
    with torch.no_grad():
        result = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), **arguments)
        if kind == "resnet":
            last = outputs[f"stages_{i}/layers_{j}"]
            outputs["pool"] = trunk.pooler(torch.from_numpy(last).movedim(-1, 1)).flatten(1).numpy()
        else:
            last = torch.from_numpy(outputs[f"layer_{i}"])
            outputs["norm"] = trunk.layernorm(last)[:, 0].numpy()
    if hasattr(result, "logits"):
        outputs["head"] = result.logits.numpy()
    for hook in hooks:
        hook.remove()
    return outputs


def _config(config: Mapping[str, object]):
    classes = {"resnet": transformers.ResNetConfig, "vit": transformers.ViTConfig}
    return classes[config["model_type"]](
        **{key: value for key, value in config.items() if key != "model_type"}
    )


def _class(config: Mapping[str, object], base: bool):
    name = {"resnet": "ResNet", "vit": "ViT"}[config["model_type"]]
    return getattr(transformers, name + ("Model" if base else "ForImageClassification"))
