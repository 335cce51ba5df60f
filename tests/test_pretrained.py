"""`load_pretrained` and `save_pretrained`: labels, heads, files, memory, real checkpoints."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from golden import networks
from safetensors.numpy import load_file

import tl_jax
from tl_jax import load_pretrained, save_pretrained
from tl_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden"
REAL = os.environ.get("TL_JAX_REAL_WEIGHTS")


def write(name: str, folder: pathlib.Path, dtype: str = "float32", **changes) -> pathlib.Path:
    with np.load(GOLDEN / f"{name}.npz") as file:
        shapes = json.loads(str(file["shapes"]))
    networks.write_folder(folder, networks.CONFIGS[name] | changes, shapes, name, dtype)
    return folder


def edit(folder: pathlib.Path, **changes) -> pathlib.Path:
    """config.json with other values; None takes a field out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_checkpoints_head_is_kept(tmp_path):
    net = load_pretrained(write("vit_plain", tmp_path))
    assert net.class_names == tuple(f"class {i}" for i in range(5))
    assert net.blocks == ("embeddings", "layer_0", "layer_1", "norm", "head")
    assert net.module.num_classes == 5 and net.family.model_type == "vit"
    uint8 = np.random.RandomState(0).randint(0, 256, (2, 20, 24, 3), np.uint8)
    images = net.preprocess(uint8)
    assert images.shape == (2, 32, 32, 3) and images.dtype == jnp.float32
    logits = net.apply(images)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    features = net.features(images)
    assert features.shape == (2, 16)
    head = net.variables["params"]["classifier"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_base", "vit_plain", "vit_base"])
def test_a_new_head_is_zeros_and_the_trunk_is_the_files(name, tmp_path):
    folder = write(name, tmp_path)
    net = load_pretrained(folder, 3, class_names=["cat", "dog", "owl"])
    assert net.config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    assert net.config["label2id"] == {"cat": 0, "dog": 1, "owl": 2}
    assert net.class_names == ("cat", "dog", "owl")
    head = net.variables["params"][net.family.head]
    assert {leaf.dtype for leaf in head.values()} == {jnp.dtype(jnp.float32)}
    assert not any(leaf.any() for leaf in head.values())
    images = networks.images(name)
    np.testing.assert_array_equal(net.apply(images), np.zeros((2, 3)))
    old = load_pretrained(folder)
    np.testing.assert_allclose(net.features(images), old.features(images), atol=1e-6)
    assert json.loads((folder / "config.json").read_text()) == net.checkpoint.config


def test_without_a_head_features_work_and_logits_say_so(tmp_path):
    for name in ("resnet_base", "vit_base"):
        net = load_pretrained(write(name, tmp_path / name))
        assert net.family.head not in net.variables["params"] and net.class_names == ()
        images = networks.images(name)
        assert net.features(images).shape == (2, 16)
        assert net.blocks[-1] == "head"
        with pytest.raises(UserError, match=r"no classification head.*num_classes=N.*\.features"):
            net.apply(images)
        with pytest.raises(UserError, match=r"no classification head to save.*num_classes=N"):
            save_pretrained(net, tmp_path / "export")
        assert not (tmp_path / "export").exists()


def test_labels_of_the_config_must_be_those_of_the_head(tmp_path):
    folder = write("vit_plain", tmp_path)
    labels = {str(i): "x" for i in range(4)}
    with pytest.raises(UserError, match=r"classifier.weight is \[5, 16\].*\[4, 16\] by config"):
        load_pretrained(edit(folder, id2label=labels))
    with pytest.raises(UserError, match=r"classifier.bias is \[5\].*\[2\] by config"):
        load_pretrained(edit(folder, id2label=None))
    net = load_pretrained(edit(folder, num_labels=5))
    assert net.class_names == tuple(f"LABEL_{i}" for i in range(5))
    assert load_pretrained(edit(folder, id2label=labels), 7).module.num_classes == 7
    for wrong in ({"0": "a", "2": "b"}, {}, ["a"], {"0": 1}):
        with pytest.raises(UserError, match=r"config.json.*\n  id2label: must name each class"):
            load_pretrained(edit(folder, id2label=wrong))
    with pytest.raises(UserError, match="num_labels: must be a whole number from 1, is -1"):
        load_pretrained(edit(folder, id2label=None, num_labels=-1))


def test_labels_are_written_in_the_order_of_their_numbers(tmp_path):
    names = [f"class {i}" for i in range(12)]
    net = load_pretrained(write("vit_plain", tmp_path / "source"), 12, class_names=names)
    save_pretrained(net, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert list(config["id2label"].items()) == [(str(i), f"class {i}") for i in range(12)]
    assert list(config["label2id"].items()) == [(f"class {i}", i) for i in range(12)]
    assert list(config) == sorted(config)


def test_more_blocks_than_tensors_are_refused_before_they_are_traced(tmp_path, monkeypatch):
    folder = write("resnet_basic", tmp_path)
    monkeypatch.setattr(tl_jax.models, "variable_shapes", None)
    edit(folder, hidden_sizes=[999999] * 500, depths=[1] * 500)
    with pytest.raises(UserError, match=r"describes 501 blocks, but .* holds only \d+ tensors"):
        load_pretrained(folder, 3)


def test_wrong_arguments_are_refused(tmp_path):
    folder = write("vit_plain", tmp_path)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(UserError, match="num_classes must be a whole number from 1"):
            load_pretrained(folder, wrong)
    with pytest.raises(UserError, match="2 class_names for num_classes=3"):
        load_pretrained(folder, 3, class_names=["a", "b"])
    with pytest.raises(UserError, match="class_names goes with a new head"):
        load_pretrained(folder, class_names=["a"])
    with pytest.raises(UserError, match=r"(?s)config.json.*hidden_size: .*num_channels: "):
        load_pretrained(edit(folder, hidden_size="16", num_channels=0))


def test_ranges_of_blocks_that_are_none(tmp_path):
    write("resnet_basic", tmp_path)
    loaded = load_pretrained(tmp_path)
    count, images = len(loaded.blocks), jnp.zeros((1, 32, 32, 3))
    for first, last in [(count + 1, None), (2, 1), (0, count + 1), (-1, None), (2, -count)]:
        with pytest.raises(UserError, match=rf"first={first}, last={last}: "):
            loaded.apply(images, first=first, last=last)
    whole = loaded.apply(images)
    assert (loaded.apply(loaded.apply(images, last=-1), first=count - 1) == whole).all()
    assert (loaded.apply(images, first=0, last=0) == images).all()


def test_another_image_size_interpolates_and_exports_what_was_there(tmp_path):
    folder = write("vit_plain", tmp_path / "source")
    net = load_pretrained(folder, image_size=44)
    images = net.preprocess(np.zeros((1, 30, 30, 3), np.uint8))
    assert images.shape == (1, 44, 44, 3)
    assert net.apply(images, last=1).shape == (1, 1 + 5 * 5, 16)
    save_pretrained(net, tmp_path / "export")
    sources = load_file(folder / "model.safetensors")
    export = load_file(tmp_path / "export" / "model.safetensors")
    assert {key: value.tobytes() for key, value in export.items()} == {
        key: value.tobytes() for key, value in sources.items()
    }
    assert json.loads((tmp_path / "export" / "config.json").read_text())["image_size"] == 32
    again = load_pretrained(tmp_path / "export")
    assert again.preprocessing == net.preprocessing


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet_base", "vit_base"])
def test_export_and_reload(name, dtype, tmp_path):
    folder = write(name, tmp_path / "source", dtype, torch_dtype=dtype, architectures=["Base"])
    net = load_pretrained(folder, 3)
    head = net.variables["params"][net.family.head]
    kernel = jnp.asarray(networks.random("head", head["kernel"].shape))
    trained = net.variables["params"] | {net.family.head: head | {"kernel": kernel}}
    net = dataclasses.replace(net, variables=net.variables | {"params": trained})
    save_pretrained(net, tmp_path / "export")

    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == [net.family.architecture]
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    assert config["num_labels"] == 3
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    source = load_file(folder / "model.safetensors")
    export = load_file(tmp_path / "export" / "model.safetensors")
    for key, value in source.items():
        if not key.startswith("pooler"):
            written = export.pop(f"{net.family.prefix}.{key}")
            assert written.dtype == value.dtype and written.tobytes() == value.tobytes()
    weight, bias = net.family.head_key + ".weight", net.family.head_key + ".bias"
    assert export.keys() == {weight, bias}
    np.testing.assert_array_equal(export[weight], kernel.T)
    assert export[weight].dtype == np.float32

    again, images = load_pretrained(tmp_path / "export"), networks.images(name)
    np.testing.assert_array_equal(again.apply(images), net.apply(images))
    assert again.conversion.ignored == ()
    # Written once more, over itself: the same file.
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    save_pretrained(again, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDEN / "flax").iterdir()))
def test_flax_files_give_what_transformers_gave(name, tmp_path):
    folder = GOLDEN / "flax" / name
    with np.load(folder / "outputs.npz") as file:
        expected = {key: file[key] for key in file.files if key != "keys"}
    size = (32, 32) if name.startswith("vit") else networks.SIZES[name]
    images = networks.random(f"flax/{name}", (2, *size, 3))
    net = load_pretrained(folder)
    logits, features = expected.get("logits"), expected.get("features")
    actual = net.features(images) if logits is None else net.apply(images)
    reference = features if logits is None else logits
    assert np.abs(actual - reference).max() < 1e-5 * np.abs(reference).max()
    # Exported in PyTorch's layout, read again.
    net = load_pretrained(folder, 4)
    save_pretrained(net, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.checkpoint.layout == "torch"
    jax.tree.map(np.testing.assert_array_equal, again.variables, net.variables)


def test_a_folder_that_cannot_be_written(tmp_path):
    net = load_pretrained(write("vit_plain", tmp_path / "source"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/export cannot be written"):
        save_pretrained(net, tmp_path / "file" / "export")


def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch):
    net = load_pretrained(write("vit_plain", tmp_path / "source"))
    save_pretrained(net, tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()

    def breaks(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", breaks)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save_pretrained(net, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    assert len(list((tmp_path / "export").iterdir())) == 3


MEMORY = """
import sys, threading, time, jax, jax.numpy as jnp
import tl_jax
from tl_jax import param_tree

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(3)))
tl_jax.load_pretrained(sys.argv[2], 3)  # what is imported and compiled once
before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
net = jax.block_until_ready(tl_jax.load_pretrained(sys.argv[1], 3).variables)
size = param_tree.nbytes(jax.tree.leaves(net))
print(size, (max(peak, anonymous()) - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_takes_little_more_than_the_parameters(dtype, tmp_path):
    small = write("vit_plain", tmp_path / "small", dtype)
    width, layers = 1024, 6
    config = networks.CONFIGS["vit_plain"] | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "id2label": None,
    }
    with np.load(GOLDEN / "vit_plain.npz") as file:
        shapes = json.loads(str(file["shapes"]))
    sizes = {16: width, 24: 4 * width}
    one = {key: [sizes.get(n, n) for n in shape] for key, shape in shapes.items()}
    one["vit.embeddings.position_embeddings"] = [1, 17, width]
    big = {key: shape for key, shape in one.items() if ".layer." not in key}
    for index in range(layers):
        part = ".layer.1."
        big |= {key.replace(part, f".layer.{index}."): s for key, s in one.items() if part in key}
    from safetensors.numpy import save_file

    folder = tmp_path / "big"
    folder.mkdir()
    tensors = {key: np.full(shape, 0.01, dtype) for key, shape in big.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    del tensors
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    root = pathlib.Path(tl_jax.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(small)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    size, growth = result.stdout.split()
    assert int(size) >= 300e6
    assert float(growth) <= 1.3


@pytest.mark.skipif(REAL is None, reason="TL_JAX_REAL_WEIGHTS is not set")
@pytest.mark.parametrize("name", ["resnet50-thin", "vit-small"])
def test_real_checkpoints(name, tmp_path):
    folder = pathlib.Path(REAL) / name
    with np.load(folder / "golden.npz") as file:
        golden = {key: file[key] for key in file.files}
    images = golden["pixel_values"].transpose(0, 2, 3, 1)
    net = load_pretrained(folder)
    expected = golden["pooled" if "pooled" in golden else "features"]
    assert np.abs(net.features(images) - expected).max() < 1e-4 * np.abs(expected).max()
    if "logits" in golden:
        expected = golden["logits"]
        assert np.abs(net.apply(images) - expected).max() < 1e-4 * np.abs(expected).max()
    net = load_pretrained(folder, 10)
    save_pretrained(net, tmp_path)
    source = load_file(folder / "model.safetensors")
    export = load_file(tmp_path / "model.safetensors")
    for key, value in source.items():
        name = key if key.startswith((net.family.prefix, "classifier")) else f"vit.{key}"
        if not name.startswith("classifier"):
            assert export.pop(name).tobytes() == value.tobytes(), key
    assert {value.shape[0] for value in export.values()} == {10}


def test_without_a_processor_the_network_works_and_its_preprocessing_says_so(tmp_path):
    source = write("vit_plain", tmp_path / "source")
    (tmp_path / "source" / "preprocessor_config.json").unlink()
    net = load_pretrained(source)
    assert net.apply(networks.images("vit_plain")).shape == (2, 5)
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        net.preprocess(np.zeros((1, 8, 8, 3), np.uint8))
    save_pretrained(net, tmp_path / "export")
    assert not (tmp_path / "export" / "preprocessor_config.json").exists()


def test_raw_bytes_are_not_taken_for_images(tmp_path):
    for name in ("vit_plain", "resnet_bottleneck"):
        net = load_pretrained(write(name, tmp_path / name))
        with pytest.raises(UserError, match="got uint8: preprocess first"):
            net.apply(np.zeros((1, 32, 32, 3), np.uint8))
