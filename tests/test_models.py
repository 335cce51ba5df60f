"""Every block of every family against goldens from transformers' PyTorch, and the chain's rules."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden import networks
from jax.extend import core

from tl_jax import costs, models, param_tree
from tl_jax.errors import UserError
from tl_jax.models.layers import ACTIVATIONS, Dropout, Head, bicubic_matrix
from tl_jax.pretrained import Pretrained, load_pretrained

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        outputs = {key: file[key] for key in file.files if key != "shapes"}
        return json.loads(str(file["shapes"])), outputs


def network(name: str, folder: pathlib.Path, num_classes: int | None = None) -> Pretrained:
    networks.write_folder(folder, networks.CONFIGS[name], golden(name)[0], seed=name)
    return load_pretrained(folder, num_classes)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", networks.CONFIGS)
def test_every_block_equals_pytorch(name, tmp_path):
    net, images = network(name, tmp_path), networks.images(name)
    expected = golden(name)[1]
    assert list(expected) == [block for block in net.blocks if block in expected]
    assert len(net.blocks) - len(expected) == (0 if "head" in expected else 1)
    names = net.blocks[: len(expected)]
    inputs = [images, *(expected[name] for name in names[:-1])]

    @jax.jit
    def run(variables, images, inputs):
        """Every block on what came out of the blocks before it, and on what PyTorch gave there."""
        chained = [images]
        for i in range(len(names)):
            chained.append(net.module.apply(variables, chained[-1], first=i, last=i + 1))
        alone = [net.module.apply(variables, x, first=i, last=i + 1) for i, x in enumerate(inputs)]
        return chained[1:], alone

    for name, *outputs in zip(names, *run(net.variables, images, inputs), strict=True):
        for output in outputs:
            assert relative(output, expected[name]) < 1e-5, name
    assert net.features(images).dtype == np.float32


@pytest.mark.parametrize("name", ["resnet_basic", "vit_plain"])
def test_chain_ranges_compose_and_own_all_parameters(name, tmp_path):
    net, images = network(name, tmp_path), networks.images(name)
    for cut in range(len(net.blocks) + 1):
        halfway = net.apply(images, last=cut)
        np.testing.assert_allclose(net.apply(halfway, first=cut), net.apply(images), atol=1e-5)
    paths = param_tree.flatten(net.variables["params"])
    owners = {path: [block.name for block in net.chain if block.owns(path)] for path in paths}
    assert all(len(names) == 1 for names in owners.values()), owners
    heads = [path for path, names in owners.items() if names == ["head"]]
    assert heads == [f"{net.family.head}/bias", f"{net.family.head}/kernel"]
    # The parameters a block owns are all that it needs.
    for index, block in enumerate(net.chain):
        own = {kind: param_tree.split(tree, block.owns)[0] for kind, tree in net.variables.items()}
        x = net.apply(images, last=index)
        net.module.apply(own, x, first=index, last=index + 1)


def test_the_top_layer_computes_the_tokens_that_are_read(tmp_path):
    net, images = network("vit_larger", tmp_path), networks.images("vit_larger")
    top = [block.name for block in net.chain].index("norm") - 1
    whole = net.apply(images, last=top + 1)
    assert whole.shape == net.apply(images, last=top).shape  # all tokens, where it stands alone
    np.testing.assert_allclose(
        net.features(images), net.apply(whole, first=top + 1, last=top + 2), atol=1e-5
    )

    def products(**head):
        module = net.module.clone(head=Head(**head))
        return costs.product_flops(lambda v, x: module.apply(v, x, last=-1), net.variables, images)

    count, tokens, width = whole.shape
    wide = net.config["intermediate_size"]
    per_token = 2 * (2 * width * width + 2 * width * wide)  # query, output, and the MLP's two
    attention = 2 * 2 * tokens * width
    saved = products(input="cls+mean") - products()
    assert saved == count * (tokens - 1) * (per_token + attention)


def test_block_prefixes_do_not_swallow_their_neighbours():
    chain = models.FAMILIES["vit"].chain({"num_hidden_layers": 12})
    path = "vit/encoder/layer_11/output/dense/kernel"
    assert [block.name for block in chain if block.owns(path)] == ["layer_11"]
    assert chain[-1].owns("classifier/kernel") and not chain[-1].owns("classifier_1/kernel")


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32(tmp_path):
    for name in ("resnet_bottleneck", "vit_larger"):
        folder = tmp_path / name
        full, images = network(name, folder), networks.images(name)
        half = load_pretrained(folder, dtype=jnp.bfloat16)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.variables))
        assert half.apply(images, last=2).dtype == jnp.bfloat16
        logits = half.apply(images)
        assert logits.dtype == jnp.float32
        assert 1e-5 < relative(logits, np.asarray(full.apply(images))) < 0.1


def test_batch_norm_trains_only_in_the_blocks_named(tmp_path):
    net, images = network("resnet_basic", tmp_path), networks.images("resnet_basic")
    logits, moved = jax.jit(
        lambda v: net.module.apply(v, images, batch_norm=(1,), mutable="batch_stats")
    )(net.variables)
    assert float(jnp.abs(logits - net.apply(images)).max()) > 1e-3
    before = param_tree.flatten(net.variables["batch_stats"])
    after = param_tree.flatten(moved["batch_stats"])
    assert before.keys() == after.keys()
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if net.chain[1].owns(path)}
    # The stored mean moves a tenth of the way to the batch's.
    path = "resnet/encoder/stages_0/layers_0/layer_0"
    kernel = param_tree.flatten(net.variables["params"])[f"{path}/convolution/kernel"]
    x = jax.lax.conv_general_dilated(
        net.apply(images, last=1),
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for name, batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        key = f"{path}/normalization/{name}"
        np.testing.assert_allclose(after[key], 0.9 * before[key] + 0.1 * batch, rtol=1e-5)


def test_batch_norm_is_synchronised_over_the_axis(tmp_path):
    net = network("resnet_basic", tmp_path)
    images = networks.random("sync", (8, 33, 41, 3))

    def apply(module, x):
        return module.apply(net.variables, x, batch_norm=range(99), mutable="batch_stats")

    logits, whole = jax.jit(lambda x: apply(net.module, x))(images)
    synced = net.module.clone(axis_name="data")
    parts, split = jax.pmap(lambda x: apply(synced, x), axis_name="data")(
        images.reshape(4, 2, *images.shape[1:])
    )
    np.testing.assert_allclose(parts.reshape(logits.shape), logits, atol=2e-4)
    first = jax.tree.map(lambda leaf: leaf[0], split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), first, whole)


def test_dropout_is_keyed_by_example_and_block(tmp_path):
    config = networks.CONFIGS["vit_plain"] | {
        "num_hidden_layers": 1,
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.25,
    }
    shapes = {key: shape for key, shape in golden("vit_plain")[0].items() if "layer.1" not in key}
    networks.write_folder(tmp_path, config, shapes, seed="vit_plain")
    net, images = load_pretrained(tmp_path), networks.images("vit_plain", 4)
    keys = jax.random.split(jax.random.key(3), 4)

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def apply(x, keys, training, last=None):
        return net.module.apply(net.variables, x, last=last, training=training, keys=keys)

    still, everywhere = apply(images, None, ()), (0, 1, 2, 3)
    np.testing.assert_array_equal(apply(images, None, everywhere), still)
    np.testing.assert_array_equal(apply(images, keys, ()), still)
    whole = apply(images, keys, everywhere)
    assert float(jnp.abs(whole - still).max(axis=1).min()) > 1e-2
    half = apply(images[2:], keys[2:], everywhere)
    np.testing.assert_allclose(half, whole[2:], atol=1e-5)
    order = np.array([2, 0, 3, 1])  # the mask goes with the key
    reordered = apply(images[order], keys[order], everywhere)
    np.testing.assert_allclose(reordered, whole[order], atol=1e-5)
    assert np.abs(apply(images, keys[order], everywhere) - whole).max() > 1e-2
    # Only the blocks named: the embeddings' dropout alone.
    embedded = apply(images, keys, (0,), 1)
    assert (embedded == 0).mean() > 0.2
    np.testing.assert_array_equal(apply(images, keys, (1, 2, 3), 1), apply(images, None, (), 1))


def test_dropout_keeps_the_mean_and_the_right_share():
    keys = jax.random.split(jax.random.key(0), 64)
    dropped = Dropout(0.25).apply({}, jnp.ones((64, 500)), keys)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1.0) < 0.01
    assert len({row.tobytes() for row in np.asarray(dropped)}) == 64

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, keys):
            return Dropout(0.25, name="a")(x, keys), Dropout(0.25, name="b")(x, keys)

    first, second = Two().apply({}, jnp.ones((64, 500)), keys)
    assert abs(float((first == second).mean()) - (0.75**2 + 0.25**2)) < 0.02


def test_bicubic_matrix_keeps_polynomials_and_borders():
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5, dtype=np.float32))
    np.testing.assert_allclose(bicubic_matrix(3, 7).sum(1), 1, atol=1e-6)
    # Twice as fine: output 7 lies at 3.25, output 0 at -0.25, where the border stands in.
    weights = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    np.testing.assert_allclose(bicubic_matrix(8, 16)[7, 2:6], weights, atol=1e-7)
    np.testing.assert_allclose(
        bicubic_matrix(8, 16)[0, :2], [1 - weights[0], weights[0]], atol=1e-7
    )


def test_activations_cover_those_of_transformers_without_parameters():
    x = np.linspace(-4, 4, 9, dtype=np.float32)
    for name, function in ACTIVATIONS.items():
        assert function(jnp.asarray(x)).shape == x.shape, name
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.float32(1)), 0.8413447, rtol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_new"](jnp.float32(1)), 0.8411920, rtol=1e-6)


def test_images_that_do_not_fit_are_refused(tmp_path):
    for name in ("resnet_basic", "vit_plain"):
        net = network(name, tmp_path / name)
        with pytest.raises(UserError, match=r"\[N, H, W, 3\].*\[2, 32, 32, 1\]"):
            net.apply(np.zeros((2, 32, 32, 1), np.float32))
    with pytest.raises(UserError, match="smaller than one patch of 8×8"):
        net.apply(np.zeros((2, 32, 7, 3), np.float32))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"model_type": "beit"}, ["'beit'", "resnet, vit"]),
        ({"model_type": ["vit"]}, ["supported: resnet, vit"]),
        ({}, ["None", "resnet, vit"]),
        (
            {"model_type": "resnet", "depths": [1, 2], "hidden_sizes": [8], "hidden_act": "prelu"},
            ["depths: must be 1, as hidden_sizes", "hidden_act: must be one of gelu, gelu_10,"],
        ),
        (
            {
                "model_type": "resnet",
                "hidden_sizes": [3, 8],
                "depths": [1, 0],
                "num_channels": True,
            },
            ["hidden_sizes", "depths", "num_channels"],
        ),
        (
            {"model_type": "resnet", "layer_type": "wide", "downsample_in_bottleneck": 1},
            ["layer_type: must be one of basic, bottleneck, is 'wide'", "downsample_in_bottleneck"],
        ),
        ({"model_type": "resnet", "depths": [400, 400], "hidden_sizes": [8, 8]}, ["≤ 500 in all"]),
        ({"model_type": "resnet", "depths": None}, ["depths"]),
        (
            {"model_type": "vit", "num_attention_heads": 5},
            ["num_attention_heads: must be a divisor"],
        ),
        (
            {"model_type": "vit", "hidden_size": 0, "image_size": [8, 8, 8], "patch_size": -1},
            ["hidden_size", "image_size", "patch_size"],
        ),
        ({"model_type": "vit", "image_size": 8}, ["patch_size: must be at most image_size"]),
        (
            {"model_type": "vit", "layer_norm_eps": "1e-6", "hidden_dropout_prob": 1.0},
            ["layer_norm_eps", "hidden_dropout_prob"],
        ),
        (
            {"model_type": "vit", "layer_norm_eps": float("nan"), "num_hidden_layers": 10**9},
            ["layer_norm_eps", "num_hidden_layers"],
        ),
    ],
)
def test_untrusted_configs_are_refused_naming_every_field(config, fields):
    with pytest.raises(UserError) as caught:
        models.family_of(config, "some/where")
    assert str(caught.value).startswith("some/where: ")
    for field in fields:
        assert field in str(caught.value)


def test_shapes_of_resnet50():
    module = models.FAMILIES["resnet"].module({}, 1000)
    shapes = models.variable_shapes(module, (1, 32, 32, 3))
    assert param_tree.size(jax.tree.leaves(shapes["params"])) == 25_557_032


def precisions(jaxpr) -> set:
    """The precision of every product in a program, inside of its calls too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(equation.params["precision"])
        for inner in core.jaxprs_in_params(equation.params):
            found |= precisions(inner)
    return found


@pytest.mark.parametrize("precision", ["float32", "tensorfloat32"])
@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_plain"])
def test_every_product_has_the_precision_asked_for(name, precision, tmp_path):
    folder = tmp_path / name
    network(name, folder)
    net = load_pretrained(folder, precision=precision)
    images = jnp.asarray(networks.images(name))

    def loss(params):
        return net.module.apply({**net.variables, "params": params}, images).sum()

    level = {"float32": "HIGHEST", "tensorfloat32": "HIGH"}[precision]
    wanted = jax.lax.Precision[level]
    program = jax.make_jaxpr(jax.grad(loss))(net.variables["params"])
    assert precisions(program.jaxpr) == {(wanted, wanted)}
