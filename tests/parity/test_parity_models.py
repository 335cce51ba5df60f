"""Live against transformers' PyTorch: forward pass, and what it makes of an exported folder."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from golden import networks

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden import reference  # noqa: E402

from tl_jax import load_pretrained, save_pretrained  # noqa: E402
from tl_jax.models.layers import ACTIVATIONS, bicubic_matrix  # noqa: E402


def relative(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def resnet(draw: np.random.Generator) -> tuple[dict, tuple[int, int]]:
    stages = int(draw.integers(1, 5))
    kind = str(draw.choice(["basic", "bottleneck"]))
    return {
        "model_type": "resnet",
        "num_channels": int(draw.integers(1, 6)),
        "embedding_size": int(draw.integers(2, 12)),
        "hidden_sizes": [int(size) for size in draw.integers(4, 24, stages)],
        "depths": [int(depth) for depth in draw.integers(1, 4, stages)],
        "layer_type": kind,
        "hidden_act": str(draw.choice(sorted(ACTIVATIONS))),
        "downsample_in_first_stage": bool(draw.integers(2)),
        "downsample_in_bottleneck": bool(draw.integers(2)),
        "num_labels": int(draw.integers(1, 9)),
    }, tuple(int(side) for side in draw.integers(9, 70, 2))


def vit(draw: np.random.Generator) -> tuple[dict, tuple[int, int]]:
    heads, square = int(draw.integers(1, 5)), bool(draw.integers(4))
    patch = [int(side) for side in draw.integers(2, 9, 2)]
    image = [int(side) for side in draw.integers(9, 50, 2)]
    config = {
        "model_type": "vit",
        "hidden_size": heads * int(draw.integers(2, 7)),
        "num_hidden_layers": int(draw.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(draw.integers(2, 40)),
        "hidden_act": str(draw.choice(sorted(ACTIVATIONS))),
        "layer_norm_eps": float(draw.choice([1e-12, 1e-6, 1e-5, 1e-2])),
        "image_size": image[0] if square else image,
        "patch_size": patch[0] if square else patch,
        "num_channels": int(draw.choice([1, 3])),
        "qkv_bias": bool(draw.integers(2)),
        "num_labels": int(draw.integers(1, 9)),
    }
    # transformers interpolates square grids of square patches only.
    other = tuple(int(side) for side in draw.integers(patch[0], 60, 2))
    same = (image[0], image[0]) if square else tuple(image)
    return config, other if square and draw.integers(2) else same


def compare(net, model, images) -> None:
    expected = reference.run(model, images)
    names = net.blocks[: len(expected)]
    assert set(names) == set(expected)

    @jax.jit
    def run(variables, x):
        outputs = []
        for i in range(len(names)):
            x = net.module.apply(variables, x, first=i, last=i + 1)
            outputs.append(x)
        return outputs

    for name, output in zip(names, run(net.variables, images), strict=True):
        assert relative(output, expected[name]) < 1e-4, name


@pytest.mark.parametrize("family", [resnet, vit])
@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_both_ways(family, seed, tmp_path):
    config, size = family(np.random.default_rng([seed, 17]))
    shapes = reference.random_shapes(config, base=False)
    source = networks.write_folder(tmp_path / "source", config, shapes, seed=str(seed))
    net = load_pretrained(tmp_path / "source")
    images = networks.random(f"sweep {seed}", (2, *size, config["num_channels"]))
    model, _ = reference.load(tmp_path / "source", config)
    compare(net, model, images)

    save_pretrained(net, tmp_path / "export")
    exported, info = reference.load(tmp_path / "export", config)
    assert not any(info.values()), info
    state = exported.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    assert sum(value.numel() for value in state.values()) == sum(v.size for v in source.values())
    assert exported.config.id2label == {i: f"class {i}" for i in range(config["num_labels"])}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["resnet_base", "vit_base"])
def test_base_models_export_as_classifiers(name, dtype, tmp_path):
    config = networks.CONFIGS[name]
    shapes = reference.random_shapes(config, base=True)
    if name == "resnet_base":
        shapes = {key: shape for key, shape in shapes.items() if "num_batches" not in key}
    networks.write_folder(tmp_path / "source", config, shapes, name, dtype)
    net = load_pretrained(tmp_path / "source", 7, class_names=list("abcdefg"))
    head = networks.random("head", net.variables["params"][net.family.head]["kernel"].shape)
    params = net.variables["params"] | {
        net.family.head: {"kernel": head, "bias": np.arange(7, dtype="f")}
    }
    net = dataclasses.replace(net, variables=net.variables | {"params": params})
    save_pretrained(net, tmp_path / "export")

    architecture = reference._class(config, base=False)
    model, info = architecture.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert model.config.id2label[6] == "g" and model.config.num_labels == 7
    compare(net, model.eval(), networks.images(name))


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "vit_plain"])
def test_flax_files_export_to_pytorch(name, tmp_path):
    folder = pathlib.Path(reference.__file__).parent / "flax" / name
    save_pretrained(load_pretrained(folder), tmp_path)
    model, info = reference.load(tmp_path, networks.CONFIGS[name])
    assert not any(info.values()), info
    size = (32, 32) if name.startswith("vit") else networks.SIZES[name]
    images = networks.random(f"flax/{name}", (2, *size, 3))
    with np.load(folder / "outputs.npz") as file:
        assert relative(reference.run(model, images)["head"], file["logits"]) < 1e-5


def test_keys_as_transformers_has_them_in_memory(tmp_path):
    import transformers

    config = networks.CONFIGS["vit_plain"]
    model = reference._class(config, base=False)(reference._config(config)).eval()
    assert isinstance(model, transformers.ViTForImageClassification)
    model.save_pretrained(tmp_path, save_original_format=False)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"})
    )
    compare(load_pretrained(tmp_path), model, networks.images("vit_plain"))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=2e-6, rtol=2e-6)


def test_every_activation_of_transformers_is_known_or_has_parameters():
    from transformers.activations import ACT2CLS

    assert set(ACT2CLS) - set(ACTIVATIONS) == {"prelu", "xielu"}


@pytest.mark.parametrize("sizes", [(16, 16), (14, 37), (37, 14), (1, 5), (7, 1), (3, 100)])
def test_bicubic_matrix(sizes):
    row = networks.random("row", (1, 1, 1, sizes[0]))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(row), size=(1, sizes[1]), mode="bicubic", align_corners=False
    )
    actual = bicubic_matrix(*sizes) @ row[0, 0, 0]
    np.testing.assert_allclose(actual, expected[0, 0, 0].numpy(), atol=2e-5)


def test_batch_statistics(tmp_path):
    name = "resnet_bottleneck"
    config = networks.CONFIGS[name]
    shapes = reference.random_shapes(config, base=False)
    networks.write_folder(tmp_path, config, shapes, name)
    net, images = load_pretrained(tmp_path), networks.images(name, 4)
    model, _ = reference.load(tmp_path, config)
    model.train()
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    logits, moved = jax.jit(
        lambda v, x: net.module.apply(v, x, batch_norm=range(99), mutable="batch_stats")
    )(net.variables, images)
    assert relative(logits, expected) < 1e-4
    stem = moved["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]
    theirs = model.resnet.embedder.embedder.normalization
    np.testing.assert_allclose(stem["mean"], theirs.running_mean.numpy(), rtol=1e-4, atol=1e-6)
    # PyTorch's running variance is unbiased, Flax's is not: n / (n - 1) of the batch's part.
    before = net.variables["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]["var"]
    n = 4 * 16 * 16
    unbiased = 0.9 * before + (stem["var"] - 0.9 * before) * n / (n - 1)
    np.testing.assert_allclose(unbiased, theirs.running_var.numpy(), rtol=1e-4)
