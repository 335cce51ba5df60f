"""Whole runs of strategies: cut off and resumed, interpolated, started from another run."""

import contextlib
import json

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tl_jax import job, load_pretrained, param_tree, sharing, trainer
from tl_jax.checkpointing import Checkpoints
from tl_jax.errors import UserError

ADAM = {"optimizer.name": "adam", "optimizer.learning_rate": 0.005, "data.augmentation": "flip"}
# Nine steps: with three phases 3 and 6 are between them, with two 4 is; the rest lie inside.
RUNS = {
    "gradual_unfreezing": ({"freeze.groups": 2, "freeze.batch_norm": "batch"}, (3, 8)),
    "wise_ft": ({"freeze.coefficients": [0.0, 0.25, 1.0]}, (4,)),
    "lora": ({"freeze.rank": 2, "freeze.dropout": 0.2}, (4,)),
    "linear_probe": ({"freeze.batch_norm": "reestimate"}, (4,)),
}


class Cut(BaseException):
    """What a kill is to the process."""


def cut_after(monkeypatch, step):
    """The run ends right after the checkpoint of this step is whole."""
    save = Checkpoints.save

    def save_and_end(self, now, *args, **kwargs):
        save(self, now, *args, **kwargs)
        if now == step:
            self.wait()
            raise Cut

    monkeypatch.setattr(Checkpoints, "save", save_and_end)


@pytest.fixture
def shared_programs():
    """What a start compiled the next need not."""
    with sharing.through(sharing.Shelf(0, 100)):
        yield


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize(
    "strategy",
    [
        "gradual_unfreezing",
        "linear_probe",
        pytest.param("wise_ft", marks=pytest.mark.slow),
        pytest.param("lora", marks=pytest.mark.slow),
    ],
)
def test_resumed_in_any_phase_and_between_them(digits_config, strategy, tmp_path, monkeypatch):
    options, cuts = RUNS[strategy]
    fields = {"freeze.strategy": strategy, **options, **ADAM, "train.epochs": 3}
    config = digits_config("resnet_basic", **fields, **{"train.checkpoint_every_steps": 2})
    whole = trainer.train(config, tmp_path / "whole")
    assert whole["freeze"]["certificate"]["ok"]
    card = (tmp_path / "whole" / "export" / "README.md").read_text()
    chosen = f"after step {whole['steps']['best']} of {whole['steps']['trained']}, in the phase"
    assert (chosen in card) == (strategy == "gradual_unfreezing")
    for step in cuts:
        with monkeypatch.context() as patch:
            cut_after(patch, step)
            with contextlib.suppress(Cut):
                trainer.train(config, tmp_path / "cut")
    trainer.train(config, tmp_path / "cut")
    ours, theirs = (command_line.results(tmp_path / name) for name in ("cut", "whole"))
    assert ours == theirs
    interpolated = json.loads((tmp_path / "cut" / "summary.json").read_text()).get("interpolation")
    assert interpolated == whole.get("interpolation")


def test_wise_ft_is_the_probe_at_0_and_the_end_at_1(digits_config, tmp_path):
    fields = {"freeze.strategy": "wise_ft", "freeze.coefficients": [0.0, 0.5, 1.0], **ADAM}
    config = digits_config("resnet_basic", **fields, **{"train.epochs": 4})
    summary = trainer.train(config, tmp_path / "run")
    grid = summary["interpolation"]["grid"]
    assert [row["coefficient"] for row in grid] == [0.0, 0.5, 1.0]
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r for r in records if r["split"] == "validation"}
    for row, step in ((grid[0], 6), (grid[2], 12)):
        assert row["validation"]["accuracy"] == by_step[step]["accuracy"]
        assert row["validation"]["loss"] == pytest.approx(by_step[step]["loss"], rel=1e-6)
    best = max(grid, key=lambda row: row["validation"]["accuracy"])
    assert summary["interpolation"]["coefficient"] == best["coefficient"]
    assert summary["metrics"]["validation"]["accuracy"] == best["validation"]["accuracy"]
    assert [proof["phase"] for proof in summary["freeze"]["certificate"]["phases"]] == [
        "linear_probe",
        "full",
    ]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "after step" not in card, "they are between two"


def test_interpolation_is_linear_and_leaves_what_did_not_move():
    first = {"a": np.float32([1, 2]), "b": np.float32([3])}
    last = {"a": np.float32([3, 6]), "b": np.float32([3])}
    between = param_tree.interpolate(first, last, 0.25)
    np.testing.assert_allclose(between["a"], [1.5, 3.0])
    assert between["b"] is first["b"]


def test_reestimated_statistics_are_those_of_the_training_data(digits_config, tmp_path):
    fields = {"freeze.batch_norm": "reestimate", "train.epochs": 1, **ADAM}
    config = digits_config("resnet_basic", **{**fields, "data.augmentation": "none"})
    summary = trainer.train(config, tmp_path / "before")
    certificate = summary["freeze"]["certificate"]
    assert certificate["ok"]
    found = load_pretrained(tmp_path / "before/export").variables
    source = load_pretrained(config.model.pretrained, 10)
    examples = job.prepare(config).examples["train"]
    images = [examples[index]["image"] for index in range(len(examples))]
    pixels = source.preprocess(np.stack(images))
    # The stem's BatchNorm sees one convolution of the image: its mean over the data is exact.
    kernel = source.variables["params"]["resnet"]["embedder"]["embedder"]["convolution"]["kernel"]
    seen = jax.lax.conv_general_dilated(
        pixels, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stem = found["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]
    np.testing.assert_allclose(stem["mean"], seen.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    batches = seen.reshape(3, 64, *seen.shape[1:])  # 3 batches of 64; the variance is within them
    np.testing.assert_allclose(stem["var"], batches.var((1, 2, 3)).mean(0), rtol=0.02)
    for path, leaf in param_tree.flatten(found["params"]["resnet"]).items():
        np.testing.assert_array_equal(
            leaf, param_tree.flatten(source.variables["params"]["resnet"])[path]
        )
    after = digits_config(
        "resnet_basic",
        **{**fields, "freeze.reestimate": "after", "data.augmentation": "none"},
    )
    trainer.train(after, tmp_path / "after")
    again = load_pretrained(tmp_path / "after/export").variables["batch_stats"]
    assert not jnp.allclose(
        again["resnet"]["embedder"]["embedder"]["normalization"]["mean"],
        source.variables["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]["mean"],
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found["batch_stats"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-3)  # other orders, the same data


def test_a_run_starts_from_what_another_trained(digits_config, tmp_path):
    probe = digits_config("resnet_basic", **ADAM)
    first = trainer.train(probe, tmp_path / "probe")
    fields = {**ADAM, "init_from": str(tmp_path / "probe"), "freeze.strategy": "top_k"}
    more = digits_config("resnet_basic", **{**fields, "optimizer.learning_rate": 1e-9})
    second = trainer.train(more, tmp_path / "more")
    assert second["metrics"]["test"]["accuracy"] == first["metrics"]["test"]["accuracy"]
    assert second["model"]["source"].endswith("probe/export")
    ours = load_file(tmp_path / "more/export/model.safetensors")
    theirs = load_file(tmp_path / "probe/export/model.safetensors")
    same = {key for key in ours if ours[key].tobytes() == theirs[key].tobytes()}
    moved = {key for key in ours if key not in same}
    assert all("stages.1" in key or key.startswith("classifier") for key in moved)
    with pytest.raises(UserError, match="is no work directory"):
        trainer.train(digits_config("resnet_basic", init_from=str(tmp_path)), tmp_path / "x")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        half = digits_config("resnet_basic", init_from=str(tmp_path / "half"))
        trainer.train(half, tmp_path / "x")
    with pytest.raises(UserError, match=r"config\.head"):
        mlp = digits_config("resnet_basic", **{**fields, "head.kind": "mlp"})
        trainer.train(mlp, tmp_path / "x")


def test_a_lora_export_is_the_merged_network(digits_config, tmp_path):
    config = digits_config("vit_plain", **ADAM, **{"freeze.strategy": "lora", "freeze.rank": 2})
    summary = trainer.train(config, tmp_path / "run")
    ours = load_file(tmp_path / "run/export/model.safetensors")
    source = load_file(config.model.pretrained + "/model.safetensors")
    changed = {key for key in ours if ours[key].tobytes() != source.get(key, ours[key]).tobytes()}
    attention = ("query.weight", "key.weight", "value.weight", "attention.output.dense.weight")
    assert changed - {"classifier.weight", "classifier.bias"} == {
        key for key in source if key.endswith(attention)
    }
    (newest,) = (tmp_path / "run" / "checkpoints").glob("6/state/_METADATA")
    leaves = json.loads(newest.read_text())["tree_metadata"]
    kept = [name for name in leaves if "'trainable'" in name]
    assert kept and all("'lora'" in name or "'classifier'" in name for name in kept)
    assert not any("'embeddings'" in name for name in leaves)
    assert summary["model"]["parameters"]["total"] > sum(v.size for v in source.values()) - 300
