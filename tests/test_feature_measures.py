"""What became of the features: figures against their formulas, and runs of known outcome."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_fixtures import DIGITS_DIR, write_folder

from tl_jax import (
    drift,
    gradient_flow,
    inference,
    job,
    losses,
    param_tree,
    retention,
    runner,
    subsets,
    trainer,
)
from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError
from tl_jax.feature_measures import Measure, _not_finite, made_of, measure
from tl_jax.models import Head, heads
from tl_jax.pretrained import load_pretrained, save_pretrained

SMALL = {"data.splits.train": "train[:64]", "data.batch_size": 32, "train.epochs": 1}
QUICK = Measure(
    probe_images=40,
    shifts=("contrast",),
    severities=(1, 5),
    shift_images=50,
    gradient_steps=3,
)


@pytest.fixture(scope="module")
def finished(digits_config, tmp_path_factory):
    """`finished(name, **fields)`: configuration and work directory of a short run."""

    def run(name, **fields):
        config = digits_config(name, **{**SMALL, **fields})
        path = tmp_path_factory.mktemp("run")
        trainer.train(config, path)
        return config, path

    return run


@pytest.fixture(scope="module")
def source(network, tmp_path_factory):
    """A small network whose own head tells digits apart, as a folder."""
    folder = tmp_path_factory.mktemp("source") / "network"
    names = [str(number) for number in range(10)]
    found = load_pretrained(network("resnet_basic"), 10, class_names=names)
    kernel = np.random.RandomState(0).normal(size=(12, 10)).astype(np.float32)
    path = f"params/{found.family.head}/kernel"
    variables = param_tree.overlay(found.variables, param_tree.unflatten({path: kernel}))
    save_pretrained(dataclasses.replace(found, variables=variables), folder)
    return str(folder)


class TestFormulas:
    @pytest.fixture
    def activations(self):
        random = np.random.RandomState(0)
        x = random.normal(size=(30, 17)).astype(np.float32)
        return x, (x[:, :9] ** 2 + random.normal(size=(30, 9))).astype(np.float32)

    def test_cka_is_the_textbooks(self, activations):
        x, y = (a.astype(np.float64) - a.mean(0) for a in activations)
        norm = np.linalg.norm
        wanted = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
        assert drift.linear_cka(*activations) == pytest.approx(wanted, rel=1e-6)
        assert 0.05 < wanted < 0.95

    def test_cka_does_not_see_turns_scales_and_shifts(self, activations):
        x, y = activations
        turn = np.linalg.qr(np.random.RandomState(1).normal(size=(17, 17)))[0]
        assert drift.linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-6)
        assert drift.linear_cka(x @ turn, y) == pytest.approx(drift.linear_cka(x, y), abs=1e-6)

    def test_columns_in_parts(self, activations, monkeypatch):
        x, y = activations
        whole = drift.linear_cka(x, y), drift.cosine(x, 2 * x[:, ::-1])
        monkeypatch.setattr(drift, "_COLUMNS", 5)
        parts = drift.linear_cka(x, y), drift.cosine(x, 2 * x[:, ::-1])
        assert parts == pytest.approx(whole, rel=1e-9)

    def test_where_there_is_nothing_to_compare(self, activations):
        x, _ = activations
        assert drift.linear_cka(x, np.ones_like(x)) is None
        assert drift.cosine(x, np.zeros_like(x)) is None

    def test_cosine(self):
        x = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
        y = np.array([[0, 2], [3, 3], [1, 1]], np.float32)
        assert drift.cosine(x, y) == pytest.approx(0.5)  # of 0 and 1; the third has no direction

    def test_wide_activations_are_means_over_neighbours(self, monkeypatch):
        x = jnp.arange(2 * 5 * 6 * 3, dtype=jnp.float32).reshape(2, 5, 6, 3)
        monkeypatch.setattr(drift, "MOST_VALUES", 27)
        found = drift._averaged.__wrapped__(x)
        assert found.shape == (2, 3, 3, 3)
        assert np.allclose(found[:, 0, 0], x[:, :2, :2].mean((1, 2)))
        assert np.allclose(found[:, 2, 1], x[:, 4, 2:4].mean(1))  # the border's are fewer

    def test_gradient_norms_by_block(self, digits_config):
        run = job.prepare(digits_config("resnet_basic", **SMALL))
        grads = jax.tree.map(np.ones_like, run.pretrained.variables["params"])
        found = gradient_flow.norms_by_block(run.plan, grads)
        sizes = [0] * len(run.plan.blocks)
        for p in run.plan.parameters:
            sizes[p.block] += math.prod(p.shape)
        assert np.allclose(found, np.sqrt(sizes))


@pytest.fixture(scope="module")
def probed(finished, source):
    """A linear probe on the source with all its measures."""
    config, path = finished("resnet_basic", **{"model.pretrained": source})
    options = dataclasses.replace(
        QUICK, source="tfds:digits", source_dir=DIGITS_DIR, source_images=90
    )
    return config, path, measure(config, path, options)


def test_a_frozen_trunk_did_not_move_and_forgot_nothing(probed):
    config, _, found = probed
    json.dumps(found, allow_nan=False)
    blocks = job.prepare(config).pretrained.blocks
    assert [row["block"] for row in found["drift"]] == list(blocks[:-1])
    assert [row["index"] for row in found["drift"]] == list(range(len(blocks) - 1))
    for row in found["drift"]:
        assert row["weights"] == (None if row["block"] == "pool" else 0.0)
        assert (row["cka"], row["cosine"]) == pytest.approx((1.0, 1.0), abs=1e-6)
        assert row["depth"] == row["index"] / (len(blocks) - 1)
    forgotten = found["forgetting"]
    assert forgotten["source"] == "tfds:digits"
    assert forgotten["before"] == forgotten["after"] and forgotten["after"]["examples"] == 90


def test_measures_say_what_images_they_are_of(probed):
    config, _, found = probed
    examples = open_dataset("tfds:digits", {"test": Measure().source_split}, DIGITS_DIR)["test"]
    assert found["made_of"] == {"images of ablate.measure.source": examples.fingerprint}
    run = job.prepare(config)
    options = dataclasses.replace(QUICK, source="tfds:digits", source_dir=DIGITS_DIR)
    assert made_of(run, options) == found["made_of"]
    assert made_of(run, QUICK) == {}


def test_accuracy_on_corrupted_images(probed):
    config, path, found = probed
    assert [(row["kind"], row["severity"]) for row in found["shifts"]] == [
        ("contrast", 1),
        ("contrast", 5),
    ]
    for row in (*found["shifts"], found["clean"]):
        assert row["examples"] == 50 and row["accuracy_ci95"][0] <= row["accuracy"]
    network = inference.load_trained(path)
    examples = job.prepare(config).examples["test"].get(range(50))
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples])
    logits = network.apply(network.preprocess(images))
    assert found["clean"]["accuracy"] == (np.asarray(logits.argmax(-1)) == labels).mean()
    nats = float(losses.cross_entropy(logits, jnp.asarray(labels)).mean())
    assert found["clean"]["loss"] == pytest.approx(nats, rel=1e-4)
    assert found["shifts"][1]["loss"] != found["shifts"][0]["loss"]


def test_gradients_of_the_first_step_by_hand(probed):
    config, path, found = probed
    run = job.prepare(config)
    network, head = run.pretrained, run.pretrained.family.head
    batch = next(iter(runner.training_batches(run, run.rows("train"))))
    images, labels = network.preprocess(batch["image"]), jnp.asarray(batch["label"])

    def loss(params):
        variables = {**network.variables, "params": params}
        return losses.cross_entropy(network.module.apply(variables, images), labels).mean()

    trained = inference.load_trained(path).variables["params"][head]
    normal = dataclasses.replace(network.module.head, init="normal")
    drawn = heads.initial(normal, trained, config.seed)
    kernel = max(param_tree.flatten(drawn).values(), key=lambda leaf: leaf.ndim)
    assert kernel.std() * kernel.shape[0] ** 0.5 == pytest.approx(1.0, rel=0.2)
    blocks = {p.path: p.block for p in run.plan.parameters}
    for kind, own in (("trained_head", trained), ("random_head", drawn)):
        grads = jax.grad(loss)({**network.variables["params"], head: own})
        wanted = np.zeros(len(network.blocks))
        for name, leaf in param_tree.flatten(grads).items():
            wanted[blocks[name]] += np.square(leaf).sum()
        rows = found["gradients"][kind]
        assert [row["norms"][0] for row in rows] == pytest.approx(
            [wanted[row["index"]] ** 0.5 for row in rows], rel=1e-3
        )
    assert rows[-1]["block"] == "head" and "pool" not in [row["block"] for row in rows]
    assert found["gradients"]["steps"] == 3  # of which an epoch has two
    for kind in ("random_head", "trained_head"):
        norms = np.array([row["norms"] for row in found["gradients"][kind]])
        assert norms.shape == (len(rows), 3) and (norms > 0).all()
    assert found["gradients"]["random_head"] != found["gradients"]["trained_head"]


def test_adapters_are_drift_and_nothing_below_them_moved(finished):
    fields = {"freeze.strategy": "lora", "freeze.targets": (r"layer\.1\.attention",)}
    config, path = finished("vit_plain", **fields)
    options = dataclasses.replace(QUICK, shifts=(), gradient_steps=2)
    found = measure(config, path, options)
    assert found["gradients"] is found["forgetting"] is found["clean"] is None
    boundary = job.prepare(config).plan.boundary
    for row in found["drift"]:
        if row["index"] < boundary:
            assert row["weights"] == 0.0 and row["cka"] == pytest.approx(1.0, abs=1e-6)
    moved = [row for row in found["drift"] if row["weights"]]
    assert moved and moved[0]["index"] == boundary
    assert 0 < moved[0]["weights"] < 1 and 0 < moved[0]["cosine"] < 1
    trained = inference.load_trained(path).variables["params"]
    start = job.prepare(config).pretrained.variables["params"]
    chain, index = inference.load_trained(path).chain, moved[0]["index"]
    far = size = 0.0
    for leaf_path, leaf in param_tree.flatten(trained).items():
        if chain[index].owns(leaf_path):
            old = np.asarray(param_tree.flatten(start)[leaf_path], np.float64)
            far, size = far + np.square(leaf - old).sum(), size + np.square(old).sum()
    assert moved[0]["weights"] == pytest.approx(math.sqrt(far / size), rel=1e-6)


def test_a_trunk_that_moved_forgets(digits_config, source):
    config = digits_config("resnet_basic", **{**SMALL, "model.pretrained": source})
    run = job.prepare(config)
    moved = jax.tree.map(lambda leaf: leaf * 1.1, run.pretrained.variables)
    trained = dataclasses.replace(run.pretrained, variables=moved)
    examples = subsets.first(run.examples["test"], 40)
    before, after = retention.forgetting(run, trained, retention.source_network(run), examples)
    assert before["loss"] != after["loss"]
    assert before["examples"] == after["examples"] == 40


def test_who_has_nothing_to_forget(digits_config):
    run = job.prepare(digits_config("resnet_basic", **SMALL))
    assert retention.source_network(run).class_names
    plan = dataclasses.replace(run.plan, trunk="random")
    assert retention.source_network(dataclasses.replace(run, plan=plan)) is None
    headless = job.prepare(digits_config("resnet_base", **SMALL))
    assert retention.source_network(headless) is None


@pytest.mark.parametrize("last_blocks", [1, 2])
def test_a_block_that_moved_in_a_vit(network, last_blocks):
    head = Head(input="cls", last_blocks=last_blocks)
    vit = load_pretrained(network("vit_plain"), 3, head=head)
    index = 2

    def move(path, leaf):
        return leaf * 1.5 if vit.chain[index].owns(path) else leaf

    params = param_tree.flatten(vit.variables["params"])
    moved = param_tree.unflatten({path: move(path, leaf) for path, leaf in params.items()})
    images = [np.random.RandomState(n).normal(size=(5, 32, 32, 3)) for n in range(2)]
    images = [jnp.asarray(x, jnp.float32) for x in images]
    rows = drift.measure(vit, vit.variables, {"params": moved}, images)
    assert [row["weights"] for row in rows[:index]] == [0.0] * index
    assert rows[index]["weights"] == pytest.approx(0.5, rel=1e-6)
    for row in rows[:index]:
        assert (row["cka"], row["cosine"]) == pytest.approx((1.0, 1.0), abs=1e-6)
    for row in rows[index:]:
        assert row["cka"] < 1 - 1e-5 and row["cosine"] < 1 - 1e-5
    outputs = [
        vit.module.apply({"params": p}, jnp.concatenate(images), last=index + 1)
        for p in (vit.variables["params"], moved)
    ]
    own = [np.asarray(x[-1] if last_blocks == 2 else x).reshape(10, -1) for x in outputs]
    assert rows[index]["cka"] == pytest.approx(drift.linear_cka(*own), abs=1e-5)


def test_without_a_validation_and_a_test_split_weights_remain(finished):
    splits = {"data.splits.validation": None, "data.splits.test": None}
    config, path = finished("resnet_basic", **splits)
    found = measure(config, path, dataclasses.replace(QUICK, gradient_steps=0))
    assert found["shifts"] == [] and found["gradients"] is None
    assert {(row["cka"], row["cosine"]) for row in found["drift"]} == {(None, None)}


def test_images_of_many_sizes_are_corrupted_after_the_host(digits_config, tmp_path):
    write_folder(tmp_path / "data", {"a": 40, "b": 40}, many_sizes=True)
    fields = {
        "data.source": f"folder:{tmp_path / 'data'}",
        "data.dir": None,
        "data.splits.train": "train[:40]",
        "data.splits.validation": None,
        "data.splits.test": "train[40:60]",
        "model.image_size": 24,
    }
    run = job.prepare(digits_config("resnet_basic", **{**SMALL, **fields}))
    examples = run.examples["test"]
    classifier = retention.Classifier(run, run.pretrained, examples)
    assert classifier.batches[0]["image"].shape == (24, 24, 24, 3)  # 20 and padding for 8 devices
    clean, rows = retention.shifts(run, run.pretrained, examples, ("rotate",), (5,))
    assert clean["examples"] == rows[0]["examples"] == 20


class TestWhatIsRefused:
    def test_options(self, probed):
        config, path, _ = probed
        options = Measure(shifts=("fog",), severities=(0,), probe_images=-1)
        with pytest.raises(UserError, match=r"'fog' is no.*severity 0.*probe_images = -1"):
            measure(config, path, options)

    def test_other_classes_than_the_sources(self, probed, tmp_path):
        config, path, _ = probed
        options = dataclasses.replace(QUICK, source="tfds:fashion_sample", source_dir=DIGITS_DIR)
        with pytest.raises(UserError, match=r"has the classes T-shirt/top.*tells 0, 1, 2"):
            measure(config, path, options)

    def test_another_configuration_and_an_unfinished_run(self, probed, tmp_path):
        config, path, _ = probed
        with pytest.raises(UserError, match=r"config\.seed"):
            measure(dataclasses.replace(config, seed=5), path, QUICK)
        with pytest.raises(UserError, match="no work directory"):
            measure(config, tmp_path, QUICK)

    def test_figures_that_are_not_finite(self, probed, monkeypatch):
        config, path, _ = probed
        monkeypatch.setattr(gradient_flow, "measure", lambda *_: {"norms": [1.0, math.nan]})
        found = measure(config, path, dataclasses.replace(QUICK, shifts=(), probe_images=0))
        assert found["not_finite"] == ["gradients.norms"]
        assert found["gradients"] == {"norms": [1.0, None]}
        assert list(_not_finite({"a": [{"b": math.inf}], "c": 1.0})) == ["a.b"]


def test_the_fashion_sample_is_what_the_quickstarts_trunk_tells_apart():
    examples = open_dataset("tfds:fashion_sample", {"test": "test"}, DIGITS_DIR)["test"]
    trunk = load_pretrained(f"{DIGITS_DIR}/../trunk")
    assert len(examples) == 500 and examples.class_names == trunk.class_names
    found = examples.get(range(100))
    images = np.stack([example["image"] for example in found])
    guesses = trunk.apply(trunk.preprocess(images)).argmax(-1)
    assert np.mean(guesses == np.array([example["label"] for example in found])) > 0.85
