"""A run's contract: what lies in the work directory, resuming, refusing."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from summary_contract import SUMMARY, wrong_fields

from tl_jax import (
    cache_folder,
    evaluation,
    input_pipeline,
    job,
    load_pretrained,
    losses,
    parallel,
    param_tree,
    planning,
    runner,
    stages,
    trainer,
)
from tl_jax import config as config_lib
from tl_jax.errors import RunFailed, UserError
from tl_jax.workdir import WorkDir


@pytest.fixture(scope="module")
def finished(digits_config, tmp_path_factory):
    """A work directory of a whole run, with what it returned."""
    path = tmp_path_factory.mktemp("runs") / "resnet"
    fields = {"train.checkpoint_every_steps": 2, "logging.every_steps": 4, "logging.figures": True}
    config = digits_config("resnet_bottleneck", **fields)
    return path, config, trainer.train(config, path)


def test_the_work_directory_is_whole(finished):
    path, config, summary = finished
    assert json.loads((path / "summary.json").read_text()) == summary
    assert wrong_fields(summary, SUMMARY) == []
    assert summary["freeze"]["certificate"]["ok"]
    assert summary["metrics"]["test"]["examples"] == 130
    assert summary["metrics"]["validation"]["examples"] == 108
    assert summary["model"]["parameters"]["trainable"] == 330
    assert json.loads((path / "config.json").read_text()) == config_lib.to_dict(config)
    leaves = json.loads((path / "plan.json").read_text())["leaves"]
    for leaf in leaves:
        names = {"path", "group", "learning_rate_multiplier", "weight_decay"}
        assert leaf.keys() >= names | {"optimizer_state_bytes"}
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "validation"] == [3, 6]
    assert [r["step"] for r in records if r["split"] == "epoch"] == [3, 6]
    assert [(r["step"], r["steps"]) for r in records if r["split"] == "train"] == [(4, 4)]
    for name in ("learning_curves", "confusion_matrix", "mistakes", "plan"):
        assert (path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (path / "export" / "README.md").read_text().startswith("---")


def test_the_export_is_the_trained_classifier_on_an_untouched_trunk(finished, network):
    path, _, _summary = finished
    exported = load_file(path / "export" / "model.safetensors")
    source = load_file(network("resnet_bottleneck") + "/model.safetensors")
    trunk = [key for key in source if not key.startswith("classifier")]
    assert exported.keys() == source.keys()
    for key in trunk:
        assert exported[key].tobytes() == source[key].tobytes(), key
    assert exported["classifier.1.weight"].shape == (10, 32)
    assert np.abs(exported["classifier.1.weight"]).max() > 0
    assert load_pretrained(str(path / "export")).class_names == tuple("0123456789")


def test_the_figures_are_those_of_the_export_run_plainly(finished):
    path, config, summary = finished
    classifier, test = load_pretrained(path / "export"), job.prepare(config).examples["test"]
    images = np.stack([example["image"] for example in test])
    labels = np.array([example["label"] for example in test])
    logits = classifier.apply(classifier.preprocess(images))
    loss, figures = losses.cross_entropy(logits, labels).mean(), summary["metrics"]["test"]
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).mean()))


def test_a_finished_run_says_so(finished, capsys):
    path, config, summary = finished
    assert trainer.train(config, path) == summary
    assert "finished" in capsys.readouterr().out


def test_what_changes_nothing_may_change(finished):
    path, config, summary = finished
    other = dataclasses.replace(config, parallel="shard_map")
    assert trainer.train(other, path) == summary


def test_another_configuration_is_refused_and_shown(finished):
    path, config, _ = finished
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match=r"config\.seed: 0 there, 1 here"):
        trainer.train(other, path)


def trained_leaves(path):
    return load_file(path / "export" / "model.safetensors")


class Stop(Exception):
    """In the place of a kill."""


# No checkpoint, an epoch's end, mid-epoch; a resident epoch is one call but for its checkpoints.
@pytest.mark.bits
@pytest.mark.parametrize(
    ("cache", "stop_after"), [("off", 1), ("off", 3), ("off", 5), ("device", 2), ("device", 3)]
)
def test_a_resumed_run_ends_bit_for_bit_alike(finished, tmp_path, monkeypatch, cache, stop_after):
    """Whatever the rows come from before the cut, and after it."""
    path, config, summary = finished
    config = dataclasses.replace(config, cache=cache, cache_dir=str(tmp_path / "cache"))
    real, calls = trainer.Meter.run, []

    def run(self, *args):
        if len(calls) == stop_after:
            raise Stop
        calls.append(1)
        return real(self, *args)

    monkeypatch.setattr(trainer.Meter, "run", run)
    with pytest.raises(Stop):
        trainer.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    config = dataclasses.replace(config, cache="off" if cache == "device" else "disk")
    resumed = trainer.train(config, tmp_path)
    whole, again = trained_leaves(path), trained_leaves(tmp_path)
    assert all(whole[key].tobytes() == again[key].tobytes() for key in whole)
    assert resumed["metrics"] == summary["metrics"]

    def deterministic(folder):
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records]

    assert deterministic(tmp_path) == deterministic(path)


@pytest.mark.bits
@pytest.mark.parametrize("cache", ["device", "host"])
def test_an_epoch_may_be_one_step(digits_config, tmp_path, cache):
    fields = {"data.splits.train": "train[:48]", "data.batch_size": 32, "train.epochs": 3}
    config = digits_config("vit_smaller", **{**fields, "cache": cache})
    assert trainer.train(config, tmp_path)["freeze"]["certificate"]["ok"]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [r["step"] for r in records if r["split"] == "epoch"] == [1, 2, 3]


def test_auto_goes_without_where_the_disk_turns_out_full(digits_config, tmp_path, monkeypatch):
    """Less room than there was when it was asked for."""
    fill, chosen = trainer.feature_cache.fill, []

    def no_room(job, stage, choice, *args):
        chosen.append(choice.kind)
        if choice.kind != "off":
            raise cache_folder.NoRoom("config.cache_dir: No space left on device")
        return fill(job, stage, choice, *args)

    monkeypatch.setattr(trainer.feature_cache, "fill", no_room)
    fields = {"data.splits.train": "train[:48]", "data.batch_size": 16, "train.epochs": 3}
    trainer.train(digits_config("vit_smaller", **fields), tmp_path / "auto")
    assert chosen[-1] == "off" and len(chosen) == 2
    with pytest.raises(UserError, match="No space left"):
        trainer.train(digits_config("vit_smaller", **fields, cache="device"), tmp_path / "asked")


def test_a_changed_trunk_is_refused(finished, network, tmp_path, monkeypatch):
    _path, config, _ = finished
    folder = tmp_path / "weights"
    shutil.copytree(network("resnet_bottleneck"), folder)
    model = dataclasses.replace(config.model, pretrained=str(folder))
    config = dataclasses.replace(config, model=model)
    work = tmp_path / "work"
    trainer.train(config, work)
    (work / "summary.json").unlink()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"not as this run was started with.*: the weights of"):
        trainer.train(config, work)


def halfway(digits_config, tmp_path, monkeypatch, **fields):
    """A run that was stopped after its first epoch."""
    config = digits_config("resnet_bottleneck", cache="off", **fields)
    real, calls = trainer.Meter.run, []

    def run(self, *args):
        calls.append(1)
        if len(calls) > 4:
            raise Stop
        return real(self, *args)

    monkeypatch.setattr(trainer.Meter, "run", run)
    with pytest.raises(Stop):
        trainer.train(config, tmp_path)
    monkeypatch.undo()
    return config


def test_other_data_or_configuration_are_refused_without_config_json(
    digits_config, tmp_path, monkeypatch
):
    config = halfway(digits_config, tmp_path, monkeypatch)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints: the configuration\."):
        trainer.train(dataclasses.replace(config, seed=7), tmp_path)
    real = trainer.results.identity
    monkeypatch.setattr(trainer.results, "identity", lambda job: real(job) | {"data": "other"})
    with pytest.raises(UserError, match=r"checkpoints: the data\."):
        trainer.train(config, tmp_path)
    monkeypatch.setattr(trainer.results, "identity", real)
    monkeypatch.setattr(input_pipeline, "ORDER", "another")
    with pytest.raises(UserError, match="how the order of the examples is drawn"):
        trainer.train(config, tmp_path)


def test_the_mean_of_an_epoch_does_not_depend_on_what_is_read_when(
    finished, digits_config, tmp_path
):
    path, _, _ = finished
    trainer.train(digits_config("resnet_bottleneck"), tmp_path)

    def epochs(folder):
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(r["loss"], r["accuracy"], r["steps"]) for r in records if r["split"] == "epoch"]

    assert epochs(tmp_path) == epochs(path)
    assert [steps for *_, steps in epochs(path)] == [3, 3]


def test_one_process_at_a_time(finished, digits_config, tmp_path):
    config = digits_config("resnet_bottleneck")
    workdir = WorkDir(tmp_path)
    with workdir.lock(), pytest.raises(UserError, match="another process is training"):
        trainer.train(config, tmp_path)


def test_a_lost_export_is_made_again(finished, tmp_path):
    path, config, summary = finished
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "export")
    again = trainer.train(config, copy)
    assert again["metrics"] == summary["metrics"]
    whole, made = trained_leaves(path), trained_leaves(copy)
    assert all(whole[key].tobytes() == made[key].tobytes() for key in whole)


def test_the_best_checkpoint_by_validation_is_evaluated(digits_config, tmp_path, monkeypatch):
    config = digits_config("resnet_bottleneck", **{"train.epochs": 3})
    real, accuracies = trainer.Evaluation.summary, iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(
        trainer.Evaluation,
        "summary",
        lambda self: {**real(self), "accuracy": next(accuracies, real(self)["accuracy"])},
    )
    summary = trainer.train(config, tmp_path)
    assert summary["steps"] == {"trained": 9, "best": 6, "best_phase": "linear_probe"}
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [6, 9]


def test_a_loss_that_is_not_finite_stops_the_run(digits_config, tmp_path):
    config = digits_config(
        "resnet_bottleneck",
        **{"optimizer.learning_rate": 1e30, "freeze.strategy": "full", "optimizer.momentum": 0.0},
    )
    with pytest.raises(RunFailed, match=r"is (nan|inf) at step \d; there is no checkpoint"):
        trainer.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_a_broken_certificate_fails_the_run(digits_config, tmp_path, monkeypatch):
    config = digits_config("resnet_bottleneck", **{"train.epochs": 1})
    real = trainer.steps.variables_of

    def moved(trainable, statistics, frozen):
        variables = real(trainable, statistics, frozen)
        flat = param_tree.flatten(variables)
        path = "params/resnet/embedder/embedder/convolution/kernel"
        moved = {path: flat[path] * 1.0000001} if path in flat else {}
        return param_tree.unflatten({**flat, **moved})

    monkeypatch.setattr(trainer.steps, "variables_of", moved)
    with pytest.raises(RunFailed, match="certificate"):
        trainer.train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["freeze"]["certificate"]["ok"] is False


def test_the_devices_hold_the_prefix_once_in_its_own_dtype(digits_config, tmp_path, monkeypatch):
    """The float32 weights that it was made of are not there while steps and validation run."""
    before, checked = jax.live_arrays(), []
    advance, evaluate, prefix_of = runner.Runner.advance, evaluation.evaluate, stages.prefix_of
    running, made = [None], []

    def check(name):
        gc.collect()
        others = {id(x) for x in before}
        live = [x for x in jax.live_arrays() if id(x) not in others]
        assert not [x for x in live if x.ndim == 4 and x.dtype == jnp.float32]
        checked.append((name, len(made)))

    def advanced(self, state, step, stop):
        running[0] = self
        if self.below is not None:
            held = [x.dtype for x in jax.tree.leaves(self.below) if x.ndim == 4]
            assert held and all(dtype == jnp.bfloat16 for dtype in held)
            check("steps")
        return advance(self, state, step, stop)

    def evaluated(*args, **options):
        if running[0].below is not None:
            check("validation")
        return evaluate(*args, **options)

    monkeypatch.setattr(runner.Runner, "advance", advanced)
    monkeypatch.setattr(evaluation, "evaluate", evaluated)
    monkeypatch.setattr(stages, "prefix_of", lambda *args: made.append(args) or prefix_of(*args))
    # As from another device: on a CPU NumPy would share the memory of JAX's arrays.
    monkeypatch.setattr(stages, "host", lambda tree: jax.tree.map(np.array, tree))
    fields = {"model.dtype": "bfloat16", "cache": "off", "freeze.strategy": "lp_ft"}
    summary = trainer.train(digits_config("resnet_basic", **fields), tmp_path / "run")
    names, times_made = zip(*checked, strict=True)
    assert names.count("steps") == summary["freeze"]["phases"][0]["last_step"]
    assert "validation" in names and len(set(times_made)) == 1


def test_validation_computes_with_what_the_steps_hold(digits_config, tmp_path, monkeypatch):
    """Kernels that are frozen above the boundary are put on the devices once, too."""
    replicate, there = parallel.DataParallel.replicate, []

    def watched(self, tree):
        if isinstance(tree, dict) and "batch_stats" in tree:  # what is evaluated
            kernels = [x for x in jax.tree.leaves(tree) if x.ndim == 4]
            there.append({isinstance(x, jax.Array) and len(x.devices()) == 8 for x in kernels})
        return replicate(self, tree)

    monkeypatch.setattr(parallel.DataParallel, "replicate", watched)
    fields = {"freeze.strategy": "bitfit", "freeze.batch_norm": "frozen", "train.epochs": 1}
    trainer.train(digits_config("resnet_basic", cache="off", **fields), tmp_path / "run")
    assert there == [{True}, {False}, {False}]  # at the end of the epoch; of what is exported


@pytest.mark.parametrize("part", ["below", "_held"])
def test_what_moves_on_the_devices_fails_the_run(digits_config, tmp_path, monkeypatch, part):
    """The certificate is of what the steps ran on: the prefix ready to run, the rest above it."""
    fields = {"freeze.strategy": "bitfit", "freeze.batch_norm": "frozen"}
    fields = {} if part == "below" else fields
    config = digits_config("resnet_bottleneck", cache="off", **{"train.epochs": 1, **fields})
    real = runner.Runner.advance

    def advance(self, *args):
        held = getattr(self, part)
        moved = jax.tree.map(lambda x: x * np.float32(1.000001) if x.ndim == 4 else x, held)
        setattr(self, part, moved)
        return real(self, *args)

    monkeypatch.setattr(runner.Runner, "advance", advance)
    with pytest.raises(RunFailed, match="certificate"):
        trainer.train(config, tmp_path)


@pytest.mark.parametrize("strategy", ["random_trunk", "from_scratch"])
def test_controls_start_from_a_random_trunk(digits_config, tmp_path, strategy, network):
    config = digits_config("resnet_bottleneck", **{"freeze.strategy": strategy, "train.epochs": 1})
    summary = trainer.train(config, tmp_path)
    assert summary["freeze"]["certificate"]["ok"] and summary["freeze"]["trunk"] == "random"
    exported = trained_leaves(tmp_path)
    source = load_file(network("resnet_bottleneck") + "/model.safetensors")
    key = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    assert not np.allclose(exported[key], source[key], atol=1e-2)


def test_the_plan_leaves_a_directory_free(digits_config, tmp_path):
    planning.plan(digits_config("resnet_bottleneck", **{"freeze.strategy": "full"}), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["strategy"] == "full"
    config = digits_config("resnet_bottleneck", **{"train.epochs": 1})
    assert trainer.train(config, tmp_path)["freeze"]["strategy"] == "linear_probe"


def test_a_profile_is_written(digits_config, tmp_path):
    config = digits_config("resnet_bottleneck", **{"logging.profile_steps": 2})
    trainer.train(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_batch_that_does_not_divide_is_refused(digits_config, tmp_path):
    config = digits_config("resnet_bottleneck", **{"data.batch_size": 60})
    with pytest.raises(UserError, match="60 does not divide by 8 devices; 56 or 64 would"):
        trainer.train(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert jax.device_count() == 8
