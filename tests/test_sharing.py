"""Programs shared between runs: the same results, traced once; and never another's."""

import gc
import weakref

import jax
import pytest

from tl_jax import job, runner, sharing, trainer

SMALL = {
    "data.splits.train": "train[:96]",
    "data.splits.validation": "train[192:224]",
    "data.splits.test": "test[:32]",
    "data.batch_size": 16,
    "train.epochs": 2,
}
VIEWS = {"freeze.strategy": "top_k", "data.views": 2, "data.augmentation": "flip"}
RUNS = {  # one after the other; what they may share, and what they may not
    "resnet_basic": (
        {},
        {"optimizer.learning_rate": 0.3, "seed": 3},
        {"data.examples_per_class": 4, "seed": 1},
        {"optimizer.weight_decay": 0.1, "data.splits.test": None},
        {"freeze.strategy": "lp_ft", "freeze.batch_norm": "batch"},
        {"parallel": "shard_map"},
    ),
    "vit_smaller": (VIEWS, {**VIEWS, "seed": 5}),
}


@pytest.mark.bits
@pytest.mark.parametrize(
    "name", [pytest.param("resnet_basic", marks=pytest.mark.slow), "vit_smaller"]
)
def test_runs_that_share_programs_end_as_those_that_do_not(digits_config, tmp_path, name):
    shelf = sharing.Shelf(0, 1000)
    for number, fields in enumerate(RUNS[name]):
        config = digits_config(name, **{**SMALL, **fields})
        alone = trainer.train(config, tmp_path / f"{number}-alone")
        with sharing.through(shelf):
            together = trainer.train(config, tmp_path / f"{number}-together")
        assert together["metrics"] == alone["metrics"], fields
        flops = ("flops_per_step", "flops_minimum")
        assert [together["cost"][f] for f in flops] == [alone["cost"][f] for f in flops]
        one, other = (
            (tmp_path / f"{number}-{which}" / "export" / "model.safetensors").read_bytes()
            for which in ("alone", "together")
        )
        assert one == other, fields


def made(shelf, config):
    """The step of a run's first phase."""
    run = job.prepare(config)
    stage = run.stages[0]
    with sharing.through(shelf):
        return sharing.programs_of(
            run, stage, "step", lambda run: runner.train_step(run, stage, 0, None)
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer.learning_rate": 0.3},
        {"seed": 2},
        {"data.examples_per_class": 3},
        {"data.fraction": 0.5},
        {"data.splits.test": None},
        {"probe.baselines": ("nearest_neighbours",)},
        {"logging.every_steps": 7},
    ],
    ids=str,
)
def test_rates_seeds_and_rows_are_data(digits_config, fields):
    shelf = sharing.Shelf(0, 1000)
    step = made(shelf, digits_config("resnet_basic", **SMALL))
    assert made(shelf, digits_config("resnet_basic", **{**SMALL, **fields})) is step


@pytest.mark.parametrize(
    "fields",
    [
        {"freeze.strategy": "full"},
        {"freeze.strategy": "top_k", "freeze.k": 2},
        {"freeze.batch_norm": "batch"},
        {"optimizer.name": "adamw"},
        {"optimizer.momentum": 0.5},
        {"optimizer.weight_decay": 0.1},
        {"train.label_smoothing": 0.1},
        {"train.gradient_clip_norm": 2.0},
        {"train.gradient_accumulation": 2},
        {"train.rematerialise": True},
        {"data.augmentation": "flip"},
        {"data.views": 2, "data.augmentation": "flip"},
        {"head.dropout": 0.1},
        {"head.kind": "mlp", "head.hidden": 4},
        {"model.dtype": "bfloat16"},
        {"model.image_size": 48},
        {"parallel": "shard_map"},
    ],
    ids=str,
)
def test_what_a_program_is_made_of_is_no_data(digits_config, fields):
    fields = {"freeze.strategy": "top_k", **fields}
    shelf = sharing.Shelf(0, 1000)
    usual = digits_config("resnet_basic", **SMALL, **{"freeze.strategy": "top_k"})
    assert made(shelf, digits_config("resnet_basic", **{**SMALL, **fields})) is not made(
        shelf, usual
    )


def test_seeds_are_data_only_where_no_view_is_drawn_by_them(digits_config):
    views = {**SMALL, "data.views": 2, "data.augmentation": "flip"}
    shelf = sharing.Shelf(0, 1000)
    assert made(shelf, digits_config("resnet_basic", **views)) is not made(
        shelf, digits_config("resnet_basic", **views, seed=1)
    )


def test_networks_do_not_share(digits_config):
    shelf = sharing.Shelf(0, 1000)
    one, other = (made(shelf, digits_config(n, **SMALL)) for n in ("resnet_basic", "vit_smaller"))
    assert one is not other


def test_no_run_without_a_shelf_shares(digits_config):
    run = job.prepare(digits_config("resnet_basic", **SMALL))
    assert sharing.programs_of(run, None, "object", lambda _: object()) is not sharing.programs_of(
        run, None, "object", lambda _: object()
    )


def test_what_is_kept_is_given_up_when_it_is_too_much_and_holds_no_weights(digits_config):
    run = job.prepare(digits_config("resnet_basic", **SMALL))
    weights = weakref.ref(jax.tree.leaves(run.pretrained.variables)[0])
    shelf, given = sharing.Shelf(0, 1), []
    with sharing.through(shelf):
        sharing.programs_of(run, None, "one", lambda run: given.append(run) or run.preprocess)
    assert not jax.tree.leaves(given[0].pretrained.variables)
    del run
    gc.collect()
    assert weights() is None
    with sharing.through(shelf):
        sharing.programs("two", object)
    first = object()
    with sharing.through(shelf):
        assert sharing.programs("one", lambda: first) is first
