"""A grid of heads is what each of its heads would be alone; what validation chooses is the run."""

import dataclasses
import json

import numpy as np
import pytest

from tl_jax import (
    cache_choice,
    feature_cache,
    job,
    memory,
    parallel,
    planning,
    probe,
    probe_features,
    runner,
    stages,
    trainer,
)
from tl_jax import train_step as steps
from tl_jax.errors import UserError
from tl_jax.evaluator import Evaluator
from tl_jax.main import main
from tl_jax.metrics import Meter
from tl_jax.workdir import WorkDir

SMALL = {
    "data.splits.train": "train[:81]",
    "data.splits.validation": "train[192:243]",
    "data.batch_size": 16,
    "optimizer.momentum": 0.5,
    "train.epochs": 2,
    "optimizer.warmup": 3,
}


def alone(config):
    """Validation figures after each epoch of an ordinary run of these settings."""
    run = job.prepare(config)
    devices, stage = parallel.DataParallel(config.parallel), run.stages[0]
    state, frozen = stages.begin(run, run.pretrained.variables)
    state = devices.replicate(state)
    choice = cache_choice.choose(run, stage, needed=True)
    whole = steps.variables_of(state.trainable, state.statistics, frozen)
    inputs = feature_cache.fill(run, stage, choice, devices, whole, lambda pieces, _: pieces)
    meter = Meter(config.data.batch_size, run.learning_rate, 1000, 0.0, {})
    run_steps = runner.Runner(run, stage, devices, inputs, state, frozen, meter)
    evaluator = Evaluator(run, devices)
    found = []
    for epoch in range(config.train.epochs):
        done = epoch * run.steps_per_epoch
        state = run_steps.advance(state, done, done + run.steps_per_epoch)
        variables = steps.variables_of(state.trainable, state.statistics, frozen)
        rows = inputs.rows["validation"]
        found.append(evaluator.rows(variables, rows, choice.first).summary())
    return found


def searched(config):
    wide = job.prepare(probe.widened(config))
    probe.check(wide)
    devices, stage = parallel.DataParallel(config.parallel), wide.stages[0]
    choice = cache_choice.choose(wide, stage, needed=True)
    whole = devices.replicate(wide.pretrained.variables)
    inputs = feature_cache.fill(wide, stage, choice, devices, whole, lambda pieces, _: pieces)
    inputs = feature_cache.on_devices(inputs, devices)
    return probe.search(wide, inputs, devices), inputs, wide, devices


@pytest.mark.bits
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param(
            "resnet_bottleneck",
            {
                "head.init": "normal",
                "probe.grid.seed": (0, 3),
                "probe.grid.learning_rate": (0.05, 1.0),
                "probe.grid.weight_decay": (0.0, 0.3),
            },
            marks=pytest.mark.slow,
        ),
        (
            "vit_smaller",
            {
                "head.init": "normal",
                "optimizer.name": "adamw",
                "optimizer.learning_rate": 0.01,
                "parallel": "shard_map",
                "probe.grid.input": ("cls", "pooled", "cls+mean"),
                "probe.grid.weight_decay": (0.0, 0.5),
            },
        ),
        (
            "vit_smaller",
            {"head.dropout": 0.3, "head.kind": "mlp", "probe.grid.learning_rate": (0.1, 0.4)},
        ),
    ],
)
def test_every_head_of_a_grid_is_what_it_would_be_alone(digits_config, name, fields):
    """On 8 devices, after a warm-up, with momentum, decay, dropout, seeds and inputs."""
    config = digits_config(name, **{**SMALL, **fields})
    found, *_ = searched(config)
    assert len(found["settings"]) == len(probe.settings(config)) > 1
    losses = []
    for row in found["settings"]:
        figures = row.pop("validation")
        expected = alone(probe.with_setting(config, row))
        best = max(expected, key=lambda one: (one["accuracy"], -one["loss"]))
        assert figures["accuracy"] == pytest.approx(best["accuracy"])
        assert figures["loss"] == pytest.approx(best["loss"], rel=1e-5)
        losses.append(figures["loss"])
    assert len(set(losses)) == len(losses), "settings that make no difference"


def test_the_chosen_head_is_the_run(digits_config, tmp_path):
    fields = {"probe.grid.learning_rate": (1e-6, 0.5), "probe.grid.seed": (0, 1)}
    fields["probe.baselines"] = ("logistic_regression", "nearest_neighbours")
    config = digits_config("resnet_bottleneck", **{**SMALL, **fields})
    summary = trainer.train(config, tmp_path)
    assert summary["probe"] == json.loads((tmp_path / "probe.json").read_text())
    chosen = summary["probe"]["chosen"]
    assert chosen["learning_rate"] == 0.5
    best = next(
        row["validation"]
        for row in summary["probe"]["settings"]
        if {k: row[k] for k in chosen} == chosen
    )
    assert summary["metrics"]["validation"]["accuracy"] == pytest.approx(best["accuracy"])
    assert json.loads((tmp_path / "plan.json").read_text())["learning_rate"] == 0.5
    assert summary["freeze"]["certificate"]["ok"]
    baselines = summary["probe"]["baselines"]
    assert baselines.keys() == set(config.probe.baselines)
    for row in baselines.values():
        low, high = row["test_accuracy_ci95"]
        assert 0 < low < row["test_accuracy"] < high < 1
    # Killed after the search, it is not made again; the same run is finished, another refused.
    (tmp_path / "summary.json").unlink()
    before = (tmp_path / "probe.json").read_bytes()
    again = trainer.train(config, tmp_path)
    assert again["metrics"] == summary["metrics"]
    assert (tmp_path / "probe.json").read_bytes() == before
    assert trainer.train(config, tmp_path) == again


def test_features_of_a_narrower_head_are_its_own(digits_config):
    """Columns of what the widest head sees are what a head with that input sees."""
    config = digits_config(
        "vit_smaller", **{**SMALL, "probe.grid.input": ("cls", "pooled", "cls+mean")}
    )
    _, inputs, wide, devices = searched(config)
    for name in config.probe.grid.input:
        narrow = job.prepare(digits_config("vit_smaller", **{**SMALL, "head.input": name}))
        rows = narrow.rows("validation").load(range(51))
        own = narrow.pretrained.features(narrow.device_preprocessing.device(rows["image"]))
        cut = probe.narrowed(inputs, wide.pretrained, name, devices)
        found, labels = probe.features(cut.rows["validation"])
        np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels, rows["label"])
        assert cut.resident["activations"].shape == (81, own.shape[1])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze.batch_norm": "reestimate"}, "reestimate changes the features"),
        ({"freeze.strategy": "full"}, "full trains more than the head"),
        ({"data.splits.validation": None}, "validation chooses"),
        ({"freeze.strategy": "random_trunk", "probe.grid.seed": (0, 1)}, "the random trunk"),
        ({"data.augmentation": "flip"}, "flip draws anew"),
        ({"cache": "off"}, "config.cache is off"),
        ({"probe.grid.input": ("cls", "pooled")}, "the head of a resnet can see pooled"),
        ({"freeze.phases": ({"learning_rate": 0.5},)}, "freeze.phases sets learning_rate"),
        (
            {
                "freeze.strategy": "patterns",
                "freeze.patterns": (("classifier.*bias", "train"), ("", "frozen")),
            },
            "kernel does not train",
        ),
    ],
)
def test_grids_that_cannot_be(digits_config, tmp_path, fields, words):
    grid = {"probe.grid.learning_rate": (0.1, 0.2)}
    with pytest.raises(UserError, match=words):
        trainer.train(digits_config("resnet_bottleneck", **{**SMALL, **grid, **fields}), tmp_path)


def test_a_grid_begins_with_fresh_heads(digits_config, tmp_path):
    trainer.train(digits_config("resnet_bottleneck", **SMALL), tmp_path / "first")
    grid = {"probe.grid.learning_rate": (0.1, 0.2), "init_from": str(tmp_path / "first")}
    with pytest.raises(UserError, match=r"config\.init_from begins with a trained one"):
        trainer.train(digits_config("resnet_bottleneck", **{**SMALL, **grid}), tmp_path / "grid")


def test_a_phase_s_factor_is_the_grid_s_too(digits_config):
    """A strategy may train its head at a multiple of the learning rate."""
    config = digits_config("resnet_bottleneck", **SMALL)
    run = job.prepare(config)
    [stage] = run.stages
    slow = dataclasses.replace(stage, plan=dataclasses.replace(stage.plan, rate=0.5))
    slow = dataclasses.replace(run, stages=(slow,))
    [setting] = probe.settings(config)
    np.testing.assert_allclose(probe._rates(slow, setting), 0.5 * probe._rates(run, setting))


def test_a_head_that_diverges_is_none_whatever_it_was_before(digits_config):
    """Alone its run would end with an error."""
    fields = {"head.kind": "mlp", "head.hidden": 8, "optimizer.schedule": "constant"}
    fields |= {"optimizer.warmup": 0, "data.splits.train": "train[:16]"}  # a step an epoch
    grid = {"probe.grid.learning_rate": (0.1, 1e20)}
    for epochs in (1, 4):
        config = digits_config(
            "resnet_bottleneck", **{**SMALL, **grid, **fields, "train.epochs": epochs}
        )
        found, *_ = searched(config)
        figures = [row["validation"] for row in found["settings"]]
        assert figures[0] is not None
        assert (figures[1] is not None) == (epochs == 1)
    assert found["chosen"]["learning_rate"] == 0.1


def test_a_search_on_other_images_is_refused(digits_config, tmp_path):
    """The configuration is the same, the images are not."""
    grid = {"probe.grid.learning_rate": (0.1, 0.2)}
    config = digits_config("resnet_bottleneck", **{**SMALL, **grid})
    devices, workdir = parallel.DataParallel(config.parallel), WorkDir(tmp_path)
    found, inputs = probe_features.look(config, workdir, devices)
    assert inputs is not None
    assert probe_features.look(config, workdir, devices) == (found, None)
    (tmp_path / "probe.json").write_text(json.dumps({**found, "made_of": "other images"}))
    with pytest.raises(UserError, match="other weights, images or another version"):
        probe_features.look(config, workdir, devices)


@pytest.mark.bits
def test_a_grid_of_inputs_goes_on_with_the_features_that_it_began_with(digits_config, tmp_path):
    """Those of a narrower network differ in their last bits."""
    grid = {"probe.grid.input": ("cls", "cls+mean"), "head.input": "cls"}
    config = digits_config("vit_smaller", **{**SMALL, **grid})
    devices, workdir = parallel.DataParallel(config.parallel), WorkDir(tmp_path)
    found, before = probe_features.look(config, workdir, devices)
    again, after = probe_features.look(config, workdir, devices)
    assert again == found
    for role, rows in before.rows.items():
        for one, other in zip(probe.features(rows), probe.features(after.rows[role]), strict=True):
            assert one.tobytes() == other.tobytes()


def test_features_that_are_there_need_no_second_room(digits_config, tmp_path, monkeypatch):
    free = memory.device_available()
    asked = []
    monkeypatch.setattr(
        memory, "device_available", lambda: asked.append(1) or (free if len(asked) < 2 else 0)
    )
    fields = {**SMALL, "probe.baselines": ("nearest_neighbours",), "cache": "device"}
    trainer.train(digits_config("resnet_gray", **fields), tmp_path)
    assert len(asked) == 1


def test_passes_over_other_splits_are_none_of_training(digits_config, tmp_path):
    fields = {**SMALL, "probe.baselines": ("nearest_neighbours",)}
    config = digits_config("resnet_gray", **fields)
    devices = parallel.DataParallel(config.parallel)
    _, inputs = probe_features.look(config, WorkDir(tmp_path), devices)
    took = {role: rows.seconds for role, rows in inputs.rows.items()}
    assert took.keys() == {"train", "validation", "test"}
    assert inputs.unseen_seconds == pytest.approx(took["validation"] + took["test"])


def test_values_that_are_none(digits_config):
    wrong = {
        "probe.grid.learning_rate": (0.1, 0.1),
        "probe.grid.weight_decay": (0.0, 1e300),
        "probe.grid.seed": (),
        "probe.grid.input": ("cls", "head"),
        "probe.baselines": ("svm",),
    }
    no_words = {"probe.grid.input": ({}, "default"), "probe.baselines": ({}, [1])}
    for fields in (wrong, no_words):
        with pytest.raises(UserError) as caught:
            digits_config("resnet_bottleneck", **fields)
        for name in fields:
            assert f"config.{name}: " in str(caught.value)


def test_the_plan_says_what_the_grid_needs(digits_config, tmp_path, capsys):
    fields = {**SMALL, "probe.grid.learning_rate": (0.1, 0.2), "train.epochs": 1}
    fields["probe.baselines"] = ("nearest_neighbours",)
    planning.plan(digits_config("resnet_gray", **fields), tmp_path)
    said = capsys.readouterr().out
    assert "81 + 51 + 130 activations at head" in said and "config.probe needs them" in said
    assert "grid of 2 heads" in said and "control" not in said


def test_a_grid_on_the_command_line(digits_config, network, tmp_path, capsys):
    from command_line import write_config

    config = write_config(tmp_path / "grid.py", network("resnet_gray"), control="random_trunk")
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--config.probe.grid.learning_rate=(0.01,0.1)"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 heads; by validation the best:") == 2, "the control has its own"
