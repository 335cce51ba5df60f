"""Beside a head of its own, an export's trunk is transformers' base model, output for output."""

import numpy as np
import pytest
from golden import networks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tl_jax import load_pretrained, save_pretrained  # noqa: E402
from tl_jax.models import Head  # noqa: E402

HEADS = [
    ("resnet_basic", Head("mlp", 6, init="normal", last_blocks=2)),
    ("resnet_bottleneck", Head("mlp", init="normal")),
    ("vit_plain", Head("mlp", init="normal", input="cls+mean", last_blocks=2)),
    ("vit_plain", Head(init="normal", input="pooled", last_blocks=2)),
]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_transformers_trunk_with_the_head_beside_it(name, head, network, tmp_path):
    ours = load_pretrained(network(name), 3, head=head)
    save_pretrained(ours, tmp_path)
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == ("ViTModel" if name == "vit_plain" else "ResNetModel")
    assert all(key.startswith("pooler.") for key in info.pop("missing_keys")), info
    assert not any(info.values()), info

    images = networks.images(name)
    features = _features(model.eval(), torch.from_numpy(images.transpose(0, 3, 1, 2)), head)
    _same(ours.features(images), features)
    prefix = f"{ours.family.head_key}."
    tensors = load_file(tmp_path / "head.safetensors")
    layer = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if head.kind == "mlp":
        inner = torch.nn.functional.linear(features, layer["hidden.weight"], layer["hidden.bias"])
        features = torch.nn.functional.gelu(inner)
        layer = {leaf: layer[f"output.{leaf}"] for leaf in ("weight", "bias")}
    _same(ours.apply(images), torch.nn.functional.linear(features, layer["weight"], layer["bias"]))


@torch.no_grad()
def _features(model, pixels, head):
    """By PyTorch, from what each of the last blocks gives to a hook."""
    outputs = []
    name = type(model).__name__
    wanted = {"ViTModel": "ViTLayer", "ResNetModel": ("ResNetBasicLayer", "ResNetBottleNeckLayer")}
    for module in model.modules():
        if type(module).__name__ in wanted[name]:
            module.register_forward_hook(
                lambda module, _, y: outputs.append(y if torch.is_tensor(y) else y[0])
            )
    model(pixels)
    outputs = outputs[-head.last_blocks :]
    if name == "ResNetModel":
        return torch.cat([y.mean((2, 3)) for y in outputs], -1)
    tokens = [model.layernorm(y) for y in outputs]
    if head.input == "pooled":
        return torch.cat([y[:, 1:].mean(1) for y in tokens], -1)
    # DINOv2's evaluation: n class tokens, and the mean patch of the last block alone.
    return torch.cat([*(y[:, 0] for y in tokens), tokens[-1][:, 1:].mean(1)], -1)


def _same(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
