"""The steps of a run as compiled programs: what a sweep varies is no part of them."""

import itertools

import jax
import numpy as np
import pytest

from tl_jax import job, parallel, param_tree, runner, trainer
from tl_jax import train_step as steps

SMALL = {
    "data.splits.train": "train[:48]",
    "data.splits.validation": None,
    "data.splits.test": "test[:8]",
    "data.batch_size": 16,
    "head.dropout": 0.5,
    "freeze.strategy": "top_k",
    "freeze.k": 1,
}
OTHER = {
    "seed": 7,
    "optimizer.learning_rate": 0.003,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 2,
    "train.epochs": 3,
}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("pmap", {"cache": "device"}),  # an epoch as one program
        pytest.param(
            "shard_map",
            {"cache": "off", "data.augmentation": "flip"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_seed_rate_and_length_share_every_program(
    digits_config, monkeypatch, tmp_path, kind, fields
):
    """The whole run's, the steps' and the prefix's; what comes out is another classifier."""
    compile_plainly, lowered = parallel.DataParallel.compile, []

    def compile_and_keep(self, function, *args, **options):
        compiled = compile_plainly(self, function, *args, **options)

        def call(*inputs):
            lowered.append(compiled.lower(*inputs).as_text())
            return compiled(*inputs)

        return call

    monkeypatch.setattr(parallel.DataParallel, "compile", compile_and_keep)
    programs, hashes = [], set()
    for number, sweep in enumerate(({}, OTHER)):
        lowered.clear()
        config = digits_config("vit_plain", **{**SMALL, **fields, "parallel": kind, **sweep})
        summary = trainer.train(config, tmp_path / str(number))
        programs.append(set(lowered))
        hashes.add(summary["freeze"]["certificate"]["sha256_after"])
        assert summary["freeze"]["certificate"]["ok"]
    assert programs[0] == programs[1]
    assert len(programs[0]) >= 3
    weights = [(tmp_path / n / "export" / "model.safetensors").read_bytes() for n in "01"]
    assert weights[0] != weights[1] and len(hashes) == 1


@pytest.mark.bits
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("resnet_bottleneck", "lora"), ("resnet_basic", "lora"), ("resnet_bottleneck", "full")],
)
def test_the_form_that_a_processor_takes_changes_no_step(digits_config, name, strategy):
    """Three steps as they run here beside three of the network as it is written."""
    fields = {k: v for k, v in SMALL.items() if not k.startswith(("freeze.", "head."))}
    fields |= {"freeze.strategy": strategy, "head.init": "normal"}
    found = job.prepare(digits_config(name, **fields))
    stage, network = found.stages[0], found.pretrained
    plain = steps.make_train_step(
        steps.make_loss(network.module, stage.plan), stage.optimizer, found.preprocess
    )
    ours = runner.train_step(found, stage, 0, None)
    batches = list(itertools.islice(runner.training_batches(found, found.rows("train")), 3))
    hyper = steps.Hyper(np.uint32(0), np.float32(0.05))

    def trained(step):
        state, frozen = steps.divide(stage.plan, network.variables, stage.optimizer)
        for batch in batches:
            state, _ = jax.jit(step)(state, frozen, hyper, batch)
        return param_tree.flatten(state.trainable)

    start = param_tree.flatten(network.variables["params"])
    expected, got = trained(plain), trained(ours)
    assert expected.keys() == got.keys()
    for path, leaf in expected.items():
        moved = np.abs(leaf - start[path]).max()
        assert moved > 0, f"{path} does not train"
        np.testing.assert_allclose(got[path], leaf, atol=1e-3 * moved + 1e-6, err_msg=path)
