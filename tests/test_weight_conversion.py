"""The table between file and tree: total both ways, bit-exact back, for both layouts."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import networks
from safetensors.numpy import load_file, save_file

from tl_jax import models, param_tree, weight_conversion
from tl_jax.errors import UserError
from tl_jax.hub import Checkpoint, open_checkpoint
from tl_jax.weight_conversion import Conversion, classifier_key, file_key_to_path

GOLDEN = pathlib.Path(__file__).parent / "golden"
RESNET, VIT = models.FAMILIES["resnet"], models.FAMILIES["vit"]


def shapes_of(name: str) -> dict[str, list[int]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return json.loads(str(file["shapes"]))


def write(name, folder, shapes=None, dtype="float32", **changes) -> tuple[Checkpoint, dict]:
    config = networks.CONFIGS[name] | changes
    tensors = networks.write_folder(folder, config, shapes or shapes_of(name), name, dtype)
    return open_checkpoint(str(folder)), tensors


def load(checkpoint, num_classes, new_head=False, param_dtype=jnp.float32):
    family = models.family_of(checkpoint.config, "here")
    module = family.module(checkpoint.config, num_classes)
    template = models.variable_shapes(module, family.example_shape(checkpoint.config))
    return weight_conversion.load(checkpoint, family, template, param_dtype, new_head)


@pytest.mark.parametrize(
    ("key", "family", "expected"),
    [
        (
            "encoder.stages.0.layers.1.layer.0.convolution.weight",
            RESNET,
            "resnet/encoder/stages_0/layers_1/layer_0/convolution/weight",
        ),
        ("resnet.embedder.embedder.normalization.running_var", RESNET, None),
        ("classifier.1.bias", RESNET, "classifier_1/bias"),
        ("embeddings.cls_token", VIT, "vit/embeddings/cls_token"),
        ("vit.encoder.layer.11.output.dense.bias", VIT, "vit/encoder/layer_11/output/dense/bias"),
        ("classifier.weight", VIT, "classifier/weight"),
        (
            "vit.layers.3.attention.o_proj.bias",
            VIT,
            "vit/encoder/layer_3/attention/output/dense/bias",
        ),
        (
            "layers.3.attention.q_proj.weight",
            VIT,
            "vit/encoder/layer_3/attention/attention/query/weight",
        ),
        ("layers.3.mlp.fc2.weight", VIT, "vit/encoder/layer_3/output/dense/weight"),
    ],
)
def test_paths_are_keys_with_the_prefix(key, family, expected):
    path = file_key_to_path(classifier_key(key, "torch", family))
    assert path == (expected or key.replace(".", "/"))


def test_a_trailing_number_is_an_index_and_lambda_1_is_not():
    assert file_key_to_path("a.lambda_1") == "a/lambda_1"
    assert file_key_to_path("a.3.b.12") == "a_3/b_12"
    assert file_key_to_path("a.3x.b") == "a/3x/b"


def test_layout_by_kind_of_layer(tmp_path):
    checkpoint, tensors = write("vit_plain", tmp_path)
    variables, conversion = load(checkpoint, 5)
    params = variables["params"]
    assert variables.keys() == {"params"}
    patch = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    dense = tensors["vit.encoder.layer.1.intermediate.dense.weight"]
    np.testing.assert_array_equal(
        params["vit"]["embeddings"]["patch_embeddings"]["projection"]["kernel"],
        patch.transpose(2, 3, 1, 0),
    )
    layer = params["vit"]["encoder"]["layer_1"]
    np.testing.assert_array_equal(layer["intermediate"]["dense"]["kernel"], dense.T)
    np.testing.assert_array_equal(
        layer["layernorm_after"]["scale"], tensors["vit.encoder.layer.1.layernorm_after.weight"]
    )
    assert len(conversion.keys) == len(tensors) == len(jax.tree.leaves(variables))
    assert not conversion.ignored and not conversion.counters


def test_leaves_do_not_hang_on_the_file(tmp_path):
    checkpoint, tensors = write("vit_plain", tmp_path)
    variables, _ = load(checkpoint, 5)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    token = tensors["vit.embeddings.cls_token"]
    np.testing.assert_array_equal(variables["params"]["vit"]["embeddings"]["cls_token"], token)
    # Donated like any other array.
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(variables)
    np.testing.assert_array_equal(double["params"]["vit"]["embeddings"]["cls_token"], 2 * token)


def test_statistics_and_counters(tmp_path):
    checkpoint, tensors = write("resnet_basic", tmp_path)
    variables, conversion = load(checkpoint, 5)
    name = "resnet.encoder.stages.1.layers.0.shortcut.normalization"
    layer = variables["batch_stats"]["resnet"]["encoder"]["stages_1"]["layers_0"]["shortcut"]
    np.testing.assert_array_equal(layer["normalization"]["mean"], tensors[f"{name}.running_mean"])
    np.testing.assert_array_equal(layer["normalization"]["var"], tensors[f"{name}.running_var"])
    counters = {key for key in tensors if key.endswith("num_batches_tracked")}
    assert conversion.counters == {key: key for key in counters}
    assert len(conversion.keys) + len(counters) == len(tensors)


@pytest.mark.parametrize("name", networks.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unload_gives_back_every_bit(name, dtype, tmp_path):
    checkpoint, tensors = write(name, tmp_path, dtype=dtype)
    base = name.endswith("_base")
    variables, conversion = load(checkpoint, 4 if base else None or _classes(name), base)
    family = models.family_of(checkpoint.config, "")
    back = weight_conversion.unload(variables, conversion, checkpoint, family)
    used = {key: value for key, value in tensors.items() if key not in conversion.ignored}
    named = {classifier_key(key, "torch", family): value for key, value in used.items()}
    heads = {key for key in back if key.startswith(family.head_key)}
    assert back.keys() == named.keys() | heads and len(heads) == 2
    for key, value in back.items():
        if key in heads:
            assert value.dtype == np.float32
        else:
            assert value.dtype == named[key].dtype
            assert value.tobytes() == named[key].tobytes(), key
        if key in named:
            np.testing.assert_array_equal(value, named[key])
    if name == "vit_base":
        assert conversion.ignored == ("pooler.dense.bias", "pooler.dense.weight")


def _classes(name: str) -> int:
    return networks.CONFIGS[name].get("num_labels", 2)


def test_only_what_changed_becomes_float32(tmp_path):
    checkpoint, tensors = write("resnet_basic", tmp_path, dtype="float16")
    variables, conversion = load(checkpoint, 5)
    flat = param_tree.flatten(variables)
    kernel = "params/resnet/encoder/stages_1/layers_0/shortcut/convolution/kernel"
    mean = "batch_stats/resnet/embedder/embedder/normalization/mean"
    zero = "params/resnet/embedder/embedder/normalization/bias"
    flat[kernel] = flat[kernel].at[0, 0, 3, 2].add(1e-6)
    flat[mean] = flat[mean] + 1
    flat[zero] = -flat[zero]
    back = weight_conversion.unload(param_tree.unflatten(flat), conversion, checkpoint, RESNET)
    changed = {key for key in tensors if back[key].tobytes() != tensors[key].tobytes()}
    assert changed == {conversion.keys[path] for path in (kernel, mean, zero)} | {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    assert {back[key].dtype for key in changed} == {np.dtype(np.float32)}
    key = conversion.keys[kernel]
    np.testing.assert_array_equal(np.asarray(flat[kernel])[0, 0].T, back[key][:, :, 0, 0])


def test_bfloat16_files_and_parameters(tmp_path):
    checkpoint, tensors = write("vit_plain", tmp_path, dtype="bfloat16")
    variables, _ = load(checkpoint, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    key = "vit.embeddings.cls_token"
    token = variables["params"]["vit"]["embeddings"]["cls_token"]
    np.testing.assert_array_equal(token, tensors[key].astype(np.float32))
    # Rounded parameters still know where they came from.
    full, tensors = write("resnet_basic", tmp_path / "full")
    variables, conversion = load(full, 5, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.bfloat16.dtype}
    assert {x.dtype for x in jax.tree.leaves(variables["batch_stats"])} == {jnp.dtype("float32")}
    back = weight_conversion.unload(variables, conversion, full, RESNET)
    assert all(
        back[key].tobytes() == tensors[key].tobytes() for key in back if "classifier" not in key
    )


def test_tensors_that_are_not_finite_are_named(tmp_path, recwarn):
    write("resnet_basic", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kernels = sorted(key for key in tensors if key.endswith("convolution.weight"))
    tensors |= {key: tensors[key] * np.float64(1e300) for key in kernels}  # too large for float32
    variance = "resnet.embedder.embedder.normalization.running_var"
    tensors[variance][3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(open_checkpoint(str(tmp_path)), 5)
    named = [f"{key} (as float32)" for key in sorted([*kernels, variance])]
    listing = f"impossible numbers: {', '.join(named[:5])} and {len(named) - 5} more. "
    assert str(tmp_path) in str(caught.value) and listing in str(caught.value)
    assert not recwarn.list
    # What a new head replaces is not read.
    write("vit_plain", tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    save_file({**load_file(file), "classifier.bias": np.full(5, np.nan, np.float32)}, file)
    load(open_checkpoint(str(tmp_path / "vit")), 3, new_head=True)
    with pytest.raises(UserError, match=r"numbers: classifier.bias \(as float32\)\. "):
        load(open_checkpoint(str(tmp_path / "vit")), 5)


def test_a_negative_variance_is_named(tmp_path):
    """Its root would be NaN in one program and cut off in another."""
    write("resnet_basic", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    variance = "resnet.embedder.embedder.normalization.running_var"
    tensors[variance][3] = -1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{variance} \(negative variances\)"):
        load(open_checkpoint(str(tmp_path)), 5)


def test_a_flipped_zero_is_a_change(tmp_path):
    write("vit_plain", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.layernorm.bias"] = np.zeros_like(tensors["vit.layernorm.bias"])
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    variables, conversion = load(checkpoint, 5)
    variables["params"]["vit"]["layernorm"]["bias"] *= -1
    back = weight_conversion.unload(variables, conversion, checkpoint, VIT)
    assert np.signbit(back["vit.layernorm.bias"]).all()


def test_changed_half_precision_parameters_become_float32(tmp_path):
    checkpoint, _ = write("vit_plain", tmp_path, dtype="float16")
    variables, conversion = load(checkpoint, 5, param_dtype=jnp.bfloat16)
    variables["params"]["vit"]["layernorm"]["bias"] += 1
    back = weight_conversion.unload(variables, conversion, checkpoint, VIT)
    full = {key for key, value in back.items() if value.dtype == np.float32}
    assert full == {"vit.layernorm.bias", "classifier.weight", "classifier.bias"}


def test_missing_counters_are_written_as_zeros(tmp_path):
    shapes = {key: s for key, s in shapes_of("resnet_basic").items() if "num_batches" not in key}
    checkpoint, _ = write("resnet_basic", tmp_path, shapes)
    variables, conversion = load(checkpoint, 5)
    back = weight_conversion.unload(variables, conversion, checkpoint, RESNET)
    assert back.keys() == shapes_of("resnet_basic").keys()
    counter = back["resnet.embedder.embedder.normalization.num_batches_tracked"]
    assert counter.dtype == np.int64 and counter.shape == () and counter == 0


def test_what_masked_image_modelling_adds_is_ignored(tmp_path):
    extra = {
        "vit.embeddings.mask_token": [1, 1, 16],
        "decoder.0.weight": [192, 16, 1, 1],
        "vit.pooler.dense.bias": [16],
    }
    checkpoint, _ = write("vit_plain", tmp_path, shapes_of("vit_plain") | extra)
    variables, conversion = load(checkpoint, 5)
    assert conversion.ignored == tuple(sorted(extra))
    back = weight_conversion.unload(variables, conversion, checkpoint, VIT)
    assert back.keys() == shapes_of("vit_plain").keys()


def test_one_error_lists_everything(tmp_path):
    shapes = shapes_of("vit_plain")
    del shapes["vit.layernorm.bias"], shapes["vit.encoder.layer.1.attention.attention.key.weight"]
    shapes |= {
        "vit.encoder.layer.2.output.dense.bias": [16],
        "vit.layernorm.num_batches_tracked": [],
        "vit.embeddings.position_embeddings": [1, 18, 16],
        "vit.encoder.layer.0.intermediate.dense.weight": [16, 24],
        "encoder.layer.0.intermediate.dense.bias": [24],
        "vit.pooler.dense.bias": [99],
        "classifier.weight": [4, 16],
    }
    checkpoint, _ = write("vit_plain", tmp_path, shapes)
    with pytest.raises(UserError) as caught:
        load(checkpoint, 5)
    lines = str(caught.value).split("\n  ")
    assert str(tmp_path) in lines[0]
    assert lines[1:] == [
        "missing: vit/encoder/layer_1/attention/attention/key/kernel",
        "missing: vit/layernorm/bias",
        "there twice: encoder.layer.0.intermediate.dense.bias and "
        "vit.encoder.layer.0.intermediate.dense.bias",
        "unexpected: vit.encoder.layer.2.output.dense.bias [16]",
        "unexpected: vit.layernorm.num_batches_tracked []",
        "wrong shape: classifier.weight is [4, 16] in the file, [5, 16] by config.json",
        "wrong shape: vit.embeddings.position_embeddings is [1, 18, 16] in the file, "
        "[1, 17, 16] by config.json",
        "wrong shape: vit.encoder.layer.0.intermediate.dense.weight is [16, 24] in the file, "
        "[24, 16] by config.json",
    ]


def test_integer_weights_are_refused(tmp_path):
    checkpoint, _ = write("vit_plain", tmp_path, dtype="int8")
    with pytest.raises(UserError, match=r"wrong kind: classifier.bias is int8"):
        load(checkpoint, 5)


def test_unload_refuses_another_tree(tmp_path):
    checkpoint, _ = write("vit_plain", tmp_path)
    variables, conversion = load(checkpoint, 5)
    del variables["params"]["vit"]["layernorm"]
    with pytest.raises(ValueError, match=r"params/vit/layernorm/bias.*params/vit/layernorm/scale"):
        weight_conversion.unload(variables, conversion, checkpoint, VIT)


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDEN / "flax").iterdir()))
def test_flax_files_are_those_of_transformers(name):
    """Names in the fixture's own words → the very keys that PyTorch's file has."""
    checkpoint = open_checkpoint(str(GOLDEN / "flax" / name))
    assert checkpoint.layout == "flax"
    base = name.endswith("_base")
    variables, conversion = load(checkpoint, 3 if base else _classes(name), base)
    family = models.family_of(checkpoint.config, "")
    back = weight_conversion.unload(variables, conversion, checkpoint, family)
    expected = {
        classifier_key(key, "torch", family): tuple(shape)
        for key, shape in shapes_of(name).items()
        if not key.startswith("pooler")
    }
    if base:
        expected |= {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert {key: value.shape for key, value in back.items()} == expected
    leaf = (
        next(path for path in conversion.sources if path.endswith("convolution/kernel"))
        if family is RESNET
        else "params/vit/encoder/layer_1/output/dense/kernel"
    )
    source = checkpoint.tensors[conversion.sources[leaf]].read()
    np.testing.assert_array_equal(param_tree.flatten(variables)[leaf], source)
    assert isinstance(conversion, Conversion)
