"""Small random networks, the same on every machine: configs, weights and images from seeds."""

import json
import math
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

RESNETS = {
    "resnet_basic": dict(
        depths=[2, 1], hidden_sizes=[8, 12], embedding_size=8, layer_type="basic", num_labels=5
    ),
    "resnet_bottleneck": dict(
        depths=[1, 2, 1], hidden_sizes=[16, 24, 32], embedding_size=8, num_labels=3
    ),
    "resnet_early_stride": dict(
        depths=[2, 2],
        hidden_sizes=[12, 20],
        embedding_size=6,
        downsample_in_bottleneck=True,
        downsample_in_first_stage=True,
        hidden_act="gelu",
    ),
    "resnet_gray": dict(
        depths=[1, 1],
        hidden_sizes=[8, 8],
        embedding_size=8,
        layer_type="basic",
        downsample_in_first_stage=True,
        hidden_act="silu",
        num_channels=1,
    ),
    "resnet_four_stages": dict(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 12, 16, 20],
        embedding_size=5,
        hidden_act="gelu_new",
        num_channels=4,
        num_labels=7,
    ),
    "resnet_no_shortcut": dict(
        depths=[2],
        hidden_sizes=[7],
        embedding_size=7,
        layer_type="basic",
        hidden_act="leaky_relu",
        num_channels=1,
        num_labels=1,
    ),
    "resnet_base": dict(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, downsample_in_bottleneck=True
    ),
}
_SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VITS = {
    "vit_plain": dict(_SMALL, image_size=32, patch_size=8, num_labels=5),
    "vit_gray": dict(
        _SMALL,
        image_size=28,
        patch_size=7,
        num_channels=1,
        qkv_bias=False,
        hidden_act="gelu_new",
        layer_norm_eps=1e-6,
    ),
    "vit_oblong": dict(_SMALL, image_size=[24, 40], patch_size=[4, 8], num_labels=3),
    "vit_remainder": dict(_SMALL, image_size=30, patch_size=8, num_attention_heads=4),
    "vit_larger": dict(_SMALL, image_size=32, patch_size=8, hidden_act="quick_gelu"),
    "vit_smaller": dict(
        _SMALL, image_size=35, patch_size=5, num_attention_heads=1, hidden_dropout_prob=0.3
    ),
    "vit_base": dict(_SMALL, image_size=32, patch_size=8, layer_norm_eps=1e-3),
}
# Height and width of the images; what a ViT has no position embeddings for is interpolated.
SIZES = {
    "resnet_basic": (33, 41),
    "resnet_bottleneck": (32, 32),
    "resnet_early_stride": (37, 29),
    "resnet_gray": (28, 28),
    "resnet_four_stages": (65, 50),
    "resnet_no_shortcut": (19, 23),
    "resnet_base": (40, 31),
    "vit_plain": (32, 32),
    "vit_gray": (28, 28),
    "vit_oblong": (24, 40),
    "vit_remainder": (30, 30),
    "vit_larger": (50, 75),
    "vit_smaller": (15, 20),
    "vit_base": (16, 64),
}
CONFIGS = {
    **{name: {"model_type": "resnet", **config} for name, config in RESNETS.items()},
    **{name: {"model_type": "vit", **config} for name, config in VITS.items()},
}


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 from the name alone (NumPy keeps RandomState's stream for ever)."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("f")


def tensor(seed: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A value for every tensor such that activations keep their scale through the network."""
    if key.endswith("num_batches_tracked"):
        return np.array(zlib.crc32(f"{seed}/{key}".encode()) % 1000, np.int64)
    normal = random(f"{seed}/{key}", shape)
    if key.endswith("running_var") or ("norm" in key and key.endswith("weight")):
        return np.exp(0.3 * normal)
    if len(shape) in (2, 4) and key.endswith("weight"):
        return normal / np.float32(math.sqrt(np.prod(shape[1:])))
    return 0.3 * normal


def images(name: str, count: int = 2) -> np.ndarray:
    """float32 [count, H, W, C] for one of the configs."""
    channels = CONFIGS[name].get("num_channels", 3)
    return random(f"images/{name}", (count, *SIZES[name], channels))


def write_folder(
    folder: pathlib.Path,
    config: Mapping[str, object],
    shapes: Mapping[str, list[int]],
    seed: str,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """A Hugging Face folder with these tensors, random; returns them."""
    tensors = {key: tensor(seed, key, tuple(shape)) for key, shape in shapes.items()}
    tensors = {
        key: value.astype(dtype) if value.dtype == np.float32 else value
        for key, value in tensors.items()
    }
    config = {"dtype": dtype, **config}
    if "num_labels" in config:
        labels = [f"class {i}" for i in range(int(config.pop("num_labels")))]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * int(config.get("num_channels", 3)),
        "image_std": [0.5] * int(config.get("num_channels", 3)),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return tensors
