"""Heads: what each sees, computes and starts from; how it trains, and how it is kept."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import networks
from safetensors.numpy import load_file, save_file

from tl_jax import depth_map, inference, job, load_pretrained, param_tree, save_pretrained, trainer
from tl_jax.config import config_hash
from tl_jax.errors import UserError
from tl_jax.models import Head
from tl_jax.models.layers import drop

SEEN = [
    ("resnet_basic", "default", 1),
    ("resnet_basic", "pooled", 3),
    ("resnet_bottleneck", "default", 2),
    ("resnet_bottleneck", "default", 4),
    *(("vit_plain", seen, n) for seen in ("default", "pooled", "cls", "cls+mean") for n in (1, 2)),
]
OWN = [
    ("resnet_basic", Head("mlp")),
    ("resnet_bottleneck", Head("mlp", 5, init="normal", dropout=0.5, last_blocks=4)),
    ("resnet_basic", Head(last_blocks=2)),
    ("vit_plain", Head("mlp", 7, input="cls+mean", last_blocks=2)),
    ("vit_plain", Head(input="pooled", init="normal")),
]


def layer_norm(x: np.ndarray, parameters, epsilon: float = 1e-12) -> np.ndarray:
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return unit * np.asarray(parameters["scale"]) + np.asarray(parameters["bias"])


def expected_features(net, outputs, seen: str) -> np.ndarray:
    """By the definition, in float64: of each output what the head sees, the lowest first."""
    if net.family.model_type == "resnet":
        return np.concatenate([np.asarray(y, np.float64).mean((1, 2)) for y in outputs], -1)
    parts = []
    for y in outputs:
        tokens = layer_norm(y, net.variables["params"]["vit"]["layernorm"])
        cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
        parts.append(mean if seen == "pooled" else cls)
    # DINOv2's evaluation: n class tokens, and the mean patch of the last block alone.
    return np.concatenate([*parts, mean] if seen == "cls+mean" else parts, -1)


@pytest.mark.parametrize(("name", "seen", "last"), SEEN)
def test_the_head_sees_what_it_says(name, seen, last, network):
    plain, images = load_pretrained(network(name)), networks.images(name)
    head = Head(input=seen, last_blocks=last, init="normal")
    net = load_pretrained(network(name), 3, head=head)
    top = len(plain.blocks) - 2  # the blocks between the stem and the final norm or pool
    outputs = [plain.apply(images, last=end) for end in range(top - last + 1, top + 1)]
    expected = expected_features(net, outputs, seen)
    features = net.features(images)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    kernel = net.variables["params"][net.family.head]["kernel"]
    assert kernel.shape == (expected.shape[1], 3)
    np.testing.assert_allclose(net.apply(images), expected @ np.asarray(kernel), atol=2e-5)


@pytest.mark.parametrize(("name", "head"), OWN)
def test_a_range_and_the_rest_are_the_whole(name, head, network):
    net = load_pretrained(network(name), 3, head=dataclasses.replace(head, init="normal"))
    images = networks.images(name)
    whole = net.apply(images)
    assert float(jnp.abs(whole).max()) > 0.01
    for cut in range(len(net.blocks) + 1):
        halfway = net.apply(images, last=cut)
        rest = net.apply(halfway, first=cut)
        np.testing.assert_allclose(rest, whole, rtol=0, atol=1e-5, err_msg=str(cut))


def test_a_bfloat16_trunk_has_a_float32_head(network):
    for name, head in OWN:
        full = load_pretrained(network(name), 3, head=dataclasses.replace(head, init="normal"))
        half = full.module.clone(dtype=jnp.bfloat16)
        images = networks.images(name)
        features = dataclasses.replace(full, module=half).features(images)
        assert features.dtype == jnp.float32
        assert jax.eval_shape(half.apply, full.variables, images).dtype == jnp.float32
        error = jnp.abs(features - full.features(images)).max()
        assert 1e-5 < error < 0.1 * jnp.abs(features).max()


@pytest.mark.parametrize(("name", "head"), OWN)
def test_paths_shapes_and_the_places_in_the_depth_map(name, head, network):
    net = load_pretrained(network(name), 3, head=head)
    params = net.variables["params"]
    width = net.features(networks.images(name)).shape[1]
    inner = head.hidden or width
    shapes = {
        path: leaf.shape for path, leaf in param_tree.flatten(params[net.family.head]).items()
    }
    assert shapes == (
        {
            "hidden/bias": (inner,),
            "hidden/kernel": (width, inner),
            "output/bias": (3,),
            "output/kernel": (inner, 3),
        }
        if head.kind == "mlp"
        else {"bias": (3,), "kernel": (width, 3)}
    )
    found = depth_map.describe(net.family, net.chain, params, net.conversion.keys)
    of_head = [p for p in found.parameters if p.path.startswith(f"{net.family.head}/")]
    assert len(of_head) == len(shapes)
    for parameter in of_head:
        assert (parameter.kind, parameter.block, parameter.depth) == (
            "head", len(net.blocks) - 1, -2,
        )  # fmt: skip
        assert parameter.name.startswith(f"{net.family.head_key}.")
        assert parameter.name.endswith(".bias" if "bias" in parameter.kinds else ".weight")
    assert not any(p.kind == "head" for p in found.parameters if p not in of_head)


def test_an_mlp_is_two_dense_layers_with_gelu_between(network):
    images = networks.images("vit_plain")
    net = load_pretrained(network("vit_plain"), 3, head=Head("mlp", 9, init="normal"))
    hidden, output = (net.variables["params"]["classifier"][name] for name in ("hidden", "output"))
    x = np.asarray(net.features(images), np.float64) @ hidden["kernel"] + hidden["bias"]
    x = x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    np.testing.assert_allclose(net.apply(images), x @ output["kernel"] + output["bias"], atol=1e-5)


def test_new_heads_start_as_they_should(network):
    def leaves(seed=0, **fields):
        net = load_pretrained(network("vit_plain"), 50, head=Head(**fields), seed=seed)
        return param_tree.flatten(net.variables["params"]["classifier"])

    for kind in ("linear", "mlp"):
        zeros, normal = leaves(kind=kind, hidden=None), leaves(kind=kind, init="normal")
        assert all(leaf.dtype == jnp.float32 for leaf in zeros.values())
        for path in zeros:
            starts_normal = path == "hidden/kernel"
            assert bool(jnp.any(zeros[path])) == starts_normal, path
            assert bool(jnp.any(normal[path])) == path.endswith("kernel"), path
    wide = leaves(kind="mlp", hidden=4096, init="normal")
    for path in ("hidden/kernel", "output/kernel"):
        scaled = np.asarray(wide[path]) * wide[path].shape[0] ** 0.5
        assert abs(scaled.mean()) < 4 / scaled.size**0.5
        assert abs(scaled.std() - 1) < 3 / scaled.size**0.5
    again, other = (leaves(kind="mlp", init="normal", seed=seed) for seed in (0, 1))
    assert np.array_equal(normal["hidden/kernel"], again["hidden/kernel"])
    assert not np.array_equal(normal["hidden/kernel"], other["hidden/kernel"])
    assert not np.array_equal(normal["hidden/kernel"][:, :1], normal["output/kernel"][:, :1])


def test_dropout_is_of_the_example_and_only_in_training(network):
    images, rate = networks.images("resnet_basic", 4), 0.5
    head = Head(dropout=rate, init="normal", last_blocks=2)
    net = load_pretrained(network("resnet_basic"), 3, head=head)
    keys, last = jax.random.split(jax.random.key(0), 4), len(net.blocks) - 1

    def logits(part=slice(None), training=(last,), keys=keys):
        keys = keys if keys is None else keys[part]
        return net.module.apply(net.variables, images[part], training=training, keys=keys)

    plain = logits(training=())
    assert np.array_equal(plain, logits(training=tuple(range(last))))
    assert np.array_equal(plain, logits(keys=None))
    dropped = drop(net.features(images), keys, rate, "head")
    assert 0.2 < float((dropped == 0).mean()) < 0.8
    kernel = net.variables["params"]["classifier_1"]["kernel"]
    np.testing.assert_allclose(logits(), dropped @ kernel, atol=1e-5)
    parts = jnp.concatenate([logits(slice(0, 1)), logits(slice(1, 4))])
    np.testing.assert_allclose(parts, logits(), atol=1e-5)


def perturbed(net):
    """Every parameter of the head moved, as by training."""
    head = net.variables["params"][net.family.head]
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size, head)
    params = {**net.variables["params"], net.family.head: moved}
    return dataclasses.replace(net, variables={**net.variables, "params": params})


@pytest.mark.parametrize(("name", "head"), OWN)
def test_an_export_comes_back_bit_for_bit(name, head, network, tmp_path):
    net = perturbed(load_pretrained(network(name), 3, head=head, class_names=["a", "b", "c"]))
    save_pretrained(net, tmp_path / "export")
    back = load_pretrained(tmp_path / "export")
    assert back.class_names == ("a", "b", "c") and back.own_head == net.own_head
    before, after = param_tree.flatten(net.variables), param_tree.flatten(back.variables)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    images = networks.images(name)
    assert np.array_equal(net.apply(images), back.apply(images))
    # And once more, the same files.
    save_pretrained(back, tmp_path / "again")
    for file in sorted(path.name for path in (tmp_path / "export").iterdir()):
        again = (tmp_path / "again" / file).read_bytes()
        assert again == (tmp_path / "export" / file).read_bytes(), file
    # The trunk's tensors are the source's, and the head's lie beside them.
    source = load_file(f"{network(name)}/model.safetensors")
    trunk = load_file(tmp_path / "export" / "model.safetensors")
    own = {key for key in source if key.startswith(net.family.head_key)}
    assert trunk.keys() == source.keys() - own
    assert all(trunk[key].tobytes() == source[key].tobytes() for key in trunk)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == [{"resnet": "ResNetModel"}.get(name[:6], "ViTModel")]
    assert config["tl_jax_head"]["kind"] == head.kind
    assert config["tl_jax_head"]["input"] != "default"
    # Another head in its place: nothing of it is left.
    standard = load_pretrained(tmp_path / "export", 4)
    assert standard.own_head is None and standard.module.num_classes == 4
    save_pretrained(standard, tmp_path / "standard")
    assert not (tmp_path / "standard" / "head.safetensors").exists()
    assert "tl_jax_head" not in json.loads((tmp_path / "standard" / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet_basic", Head(input="pooled", dropout=0.3)),
        ("vit_plain", Head(input="cls", init="normal")),
    ],
)
def test_the_usual_head_is_exported_as_ever(name, head, network, tmp_path):
    net = load_pretrained(network(name), 3, head=head)
    default = load_pretrained(network(name), 3)
    same = dataclasses.replace(default, variables=net.variables)
    for folder, classifier in (("head", net), ("default", same)):
        save_pretrained(classifier, tmp_path / folder)
    files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("head", "default")]
    assert files[0] == files[1] == ["config.json", "model.safetensors", "preprocessor_config.json"]
    for file in files[0]:
        assert (tmp_path / "head" / file).read_bytes() == (tmp_path / "default" / file).read_bytes()


def test_heads_that_do_not_fit_are_refused(network):
    def refused(name="resnet_basic", num_classes=3, **fields):
        with pytest.raises(UserError) as error:
            load_pretrained(network(name), num_classes, head=Head(**fields))
        return str(error.value)

    assert "a resnet has no class token" in refused(input="cls")
    assert "a resnet has no class token" in refused(input="cls+mean", kind="mlp")
    assert "last_blocks: must be a whole number, 1 to 3, is 4" in refused(last_blocks=4)
    assert "1 to 2, is 3" in refused("vit_plain", last_blocks=3)
    both = refused(kind="mpl", dropout=1.0, hidden=5)
    assert all(word in both for word in ("kind", "dropout", "hidden"))
    assert "give num_classes" in refused(num_classes=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([1], "must be an object"),
        ({"kind": ["mlp"]}, "kind: must be one of linear, mlp"),
        ({"kind": "mlp", "hidden": 10**9}, "hidden"),
        ({"kind": "mlp", "hidden": True}, "hidden"),
        ({"kind": "linear", "hidden": 4}, "hidden"),
        ({"kind": "mlp", "input": 3}, "input"),
        ({"kind": "mlp", "last_blocks": 0}, "last_blocks"),
        ({"kind": "mlp", "dropout": "0.5"}, "dropout"),
        ({"kind": "mlp", "code": "import os"}, "'code': no such field"),
        ({"kind": "mlp", "hidden": 6, "input": "cls"}, "wrong shape: classifier.hidden.weight"),
        ({"kind": "linear", "last_blocks": 2}, "unexpected: classifier.hidden.weight"),
    ],
)
def test_a_head_from_elsewhere_is_checked(change, said, network, tmp_path):
    folder = tmp_path / "export"
    save_pretrained(load_pretrained(network("vit_plain"), 3, head=Head("mlp", 5)), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tl_jax_head": change}))
    with pytest.raises(UserError, match="export") as error:
        load_pretrained(folder)
    assert said in str(error.value)
    load_pretrained(folder, 3)  # which has no use for it


def test_a_head_file_that_is_missing_or_doubled(network, tmp_path):
    folder = tmp_path / "export"
    save_pretrained(load_pretrained(network("vit_plain"), 3, head=Head("mlp", 5)), folder)
    tensors = load_file(folder / "head.safetensors")
    assert tensors.keys() == {
        f"classifier.{layer}.{leaf}"
        for layer in ("hidden", "output")
        for leaf in ("weight", "bias")
    }
    shutil.copy(folder / "model.safetensors", folder / "head.safetensors")
    with pytest.raises(UserError, match=r"head\.safetensors and model\.safetensors both hold"):
        load_pretrained(folder)
    save_file({key: np.zeros(2, np.float32) for key in tensors}, folder / "head.safetensors")
    with pytest.raises(UserError, match="wrong shape"):
        load_pretrained(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no head\.safetensors"):
        load_pretrained(folder)


def test_the_configurations_fields_are_checked_and_have_effect(digits_config):
    plain = digits_config("resnet_basic")
    for fields in ({"kind": "mlp"}, {"init": "normal"}, {"dropout": 0.1}, {"last_blocks": 2}):
        changed = digits_config("resnet_basic", **{f"head.{k}": v for k, v in fields.items()})
        assert config_hash(changed) != config_hash(plain)
    with pytest.raises(UserError) as error:
        digits_config(
            "resnet_basic",
            **{"head.hidden": 5, "head.input": "clss", "head.dropout": 1, "head.last_blocks": 0},
        )
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "config.head.dropout", "config.head.hidden", "config.head.input", "config.head.last_blocks",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "name", "head"),
    [("random_trunk", *OWN[0]), ("from_scratch", *OWN[3]), ("random_trunk", *OWN[4])],
)
def test_a_random_trunk_keeps_the_head(strategy, name, head, digits_config):
    fields = {f"head.{field}": value for field, value in dataclasses.asdict(head).items()}
    made = job.prepare(digits_config(name, seed=3, **fields, **{"freeze.strategy": strategy}))
    source = load_pretrained(made.pretrained.checkpoint.source, 10, head=head, seed=3)
    ours, theirs = (param_tree.flatten(n.variables["params"]) for n in (made.pretrained, source))
    assert ours.keys() == theirs.keys()
    same = {path for path in ours if np.array_equal(ours[path], theirs[path])}
    of_head = {path for path in ours if path.startswith(f"{source.family.head}/")}
    assert of_head <= same
    assert not any(path.endswith("kernel") for path in same - of_head)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_plain", {"freeze.strategy": "lora", "head.input": "cls+mean"}),
        ("resnet_basic", {"freeze.strategy": "top_k", "head.dropout": 0.2}),
    ],
)
def test_a_run_is_evaluated_from_its_folder_as_it_was(name, fields, digits_config, tmp_path):
    own = {"head.kind": "mlp", "head.hidden": 12, "head.last_blocks": 2}
    config = digits_config(name, **own, **fields, **{"train.epochs": 1})
    summary = trainer.train(config, tmp_path / "run")
    assert summary["freeze"]["certificate"]["ok"]
    found = inference.evaluate(config, str(tmp_path / "run"))
    assert found["test"]["accuracy"] == summary["metrics"]["test"]["accuracy"]
    assert found["test"]["loss"] == pytest.approx(summary["metrics"]["test"]["loss"], rel=1e-4)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "library_name: tl_jax" in card
    assert "AutoModelForImageClassification" not in card
    assert card.count("`tl_jax.load_pretrained` loads all of it") == 1
