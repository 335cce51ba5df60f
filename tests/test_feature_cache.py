"""The frozen prefix computed once: the same training, wherever its rows lie; when, and why not."""

import dataclasses
import os
import shutil

import compiler_flags
import jax
import numpy as np
import pytest

from tl_jax import (
    cache_choice,
    feature_cache,
    feature_key,
    feature_store,
    job,
    memory,
    parallel,
    planning,
    prefix,
    sharing,
    stages,
    trainer,
)
from tl_jax import train_step as steps
from tl_jax.errors import UserError
from tl_jax.metrics import Meter
from tl_jax.runner import Runner, loops
from tl_jax.strategies import STRATEGIES

SMALL = {
    "data.splits.train": "train[:49]",
    "data.splits.validation": "train[192:200]",
    "data.batch_size": 16,
    "logging.every_steps": 1000,
}


def untracked(pieces, layout):
    return pieces


def trained(config, kinds=None, keep=None):
    """Variables after a whole training without its trainer, and the choices it made.

    Args:
      config: the run.
      kinds: filled with how each phase got its rows.
      keep: steps after which the runner is thrown away and another goes on from its position.
    """
    run = job.prepare(config)
    devices = parallel.DataParallel(config.parallel)
    start = run.pretrained.variables
    state, frozen = stages.begin(run, start)
    meter = Meter(config.data.batch_size, run.learning_rate, 1000, 0.0, {})
    step, losses = 0, []
    for number, stage in enumerate(run.stages):
        if number:
            state, frozen = stages.follow(run, number, state, frozen, start["params"])
        state = devices.replicate(state)
        choice = cache_choice.choose(run, stage)
        whole = steps.variables_of(state.trainable, state.statistics, frozen)
        choice = feature_cache.with_room(run, stage, choice, whole)
        inputs = feature_cache.fill(run, stage, choice, devices, whole, untracked)
        if kinds is not None:
            kinds.append((choice.kind, choice.first))
        runner = Runner(run, stage, devices, inputs, state, frozen, meter)
        while step < stage.last:
            stop = min(run.next_stop(step, runner.longest), stage.last)
            if keep and step < keep:
                stop = min(stop, keep)
            state = runner.advance(state, step, stop)
            step = stop
            losses += [m["loss"] for _, m in meter._pending]
            meter.read()
            if step == keep:
                runner = Runner(run, stage, devices, inputs, state, frozen, meter)
    return stages.host(steps.variables_of(state.trainable, state.statistics, frozen)), losses


def assert_same(one, other):
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
        found = dict(jax.tree_util.tree_leaves_with_path(other))[path]
        assert leaf.tobytes() == found.tobytes(), jax.tree_util.keystr(path)


CASES = {  # a network, a strategy's options on it, and which of its phases have a prefix
    "linear_probe": ("vit_smaller", {}, [True]),
    "top_k": ("vit_smaller", {"k": 1}, [True]),
    "surgical": ("resnet_bottleneck", {"first": 0.6, "last": 0.9}, [True]),
    "lp_ft": ("resnet_bottleneck", {}, [True, False]),
    "gradual_unfreezing": ("resnet_bottleneck", {"groups": 2}, [True, True, False]),
    "lora": ("resnet_bottleneck", {"targets": ("stages.2",), "dropout": 0.2}, [True]),
    "norm_only": ("vit_smaller", {}, [True]),
    "attention_only": ("vit_base", {}, [True]),
    "freeze_embed": ("vit_base", {}, [True]),
    "patterns": (
        "resnet_bottleneck",
        {"patterns": (("classifier|stages_2", "train"), ("", "frozen"))},
        [True],
    ),
    "wise_ft": ("resnet_bottleneck", {}, [True, False]),
    "random_trunk": ("resnet_bottleneck", {}, [True]),
}
# The first block trains in all phases.
WITHOUT = {"full", "from_scratch", "discriminative", "layer_decay", "bitfit", "l2_sp"}


def test_every_strategy_is_compared_or_has_no_prefix(small):
    assert CASES.keys() | WITHOUT == STRATEGIES.keys() and not CASES.keys() & WITHOUT
    for name in WITHOUT:
        for network in ("resnet_bottleneck", "vit_smaller"):
            run = job.prepare(small(network, **{"freeze.strategy": name}))
            assert [stage.plan.boundary for stage in run.stages] == [0], name


@pytest.fixture
def small(digits_config, tmp_path):
    def config(name, **fields):
        base = {**SMALL, "cache_dir": str(tmp_path / "cache"), "train.epochs": 4}
        return digits_config(name, **{**base, **fields})

    return config


@pytest.fixture(scope="module")
def users():
    with compiler_flags.as_users() as executor:
        yield executor


def choices_and_outcome(config):
    kinds = []
    variables, losses = trained(config, kinds)
    return kinds, variables, [float(loss) for loss in losses]


@pytest.mark.bits
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c == "norm_only" else c for c in CASES],
)
def test_cached_training_is_the_same_bit_for_bit(small, request, case):
    """With dropout above the boundary, momentum, clipping; on 8 devices; parameters and losses."""
    name, options, prefixes = CASES[case]
    # An epoch on the device is a loop of steps, whose bits are a step's as users compile them.
    loops = name == "vit_smaller"
    kind, run = ("device", request.getfixturevalue("users").map) if loops else ("host", map)
    fields = {"freeze.strategy": case, **{f"freeze.{key}": v for key, v in options.items()}}
    configs = (small(name, cache="off", **fields), small(name, cache=kind, **fields))
    (_, variables, losses), (kinds, cached, cached_losses) = run(choices_and_outcome, configs)
    assert [first > 0 for _, first in kinds] == prefixes
    assert {kind for kind, first in kinds if first} == {kind}
    assert_same(variables, cached)
    assert losses == cached_losses
    before = job.prepare(small(name, **fields)).pretrained.variables
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(variables), strict=True)
    assert any((a != b).any() for a, b in pairs)


@pytest.mark.bits
@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"cache": "disk"}, 1),
        ({"cache": "device", "parallel": "shard_map"}, 1),
        ({"cache": "host"}, 2),  # a prefix sees as many images at a time as a step does
        ({"cache": "host", "model.dtype": "bfloat16"}, 1),
    ],
)
def test_wherever_the_rows_lie(small, monkeypatch, fields, parts):
    apply, sizes = prefix.apply, set()

    def seen(module, plan, below, images):
        sizes.add(len(images))
        return apply(module, plan, below, images)

    monkeypatch.setattr(prefix, "apply", seen)
    top = {"freeze.strategy": "top_k", "optimizer.name": "adam", "optimizer.learning_rate": 1e-3}
    top |= {"train.gradient_accumulation": parts}
    top |= {name: value for name, value in fields.items() if name == "model.dtype"}
    assert_same(
        trained(small("resnet_bottleneck", cache="off", **top))[0],
        trained(small("resnet_bottleneck", **{**top, **fields}))[0],
    )
    assert sizes == {16 // 8 // parts}
    layout = choice(small("resnet_bottleneck", **{**top, **fields})).layouts["train"]
    [activations] = jax.tree.leaves(layout.shapes)
    assert str(activations.dtype) == fields.get("model.dtype", "float32")


@pytest.mark.bits
def test_whole_epochs_are_one_program_and_can_be_cut_anywhere(small):
    """A probe's program takes any number of steps: cut inside an epoch, it is compiled once."""
    config = small("resnet_bottleneck", cache="device")
    run = job.prepare(config)
    assert loops(run.stages[0].plan, run.stages[0].plan.boundary)
    whole, losses = trained(config)
    cut, cut_losses = trained(config, keep=5)
    assert_same(whole, cut)
    assert losses == cut_losses and len(losses) == 12


def test_a_loop_of_steps_is_compiled_once(small, caplog):
    config = small("resnet_bottleneck", cache="device", **{"train.checkpoint_every_steps": 2})
    with jax.log_compiles():
        trained(config)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert sum("float32[49,32]" in message for message in compiled) == 1, "features of the split"


VIEWS = {"data.augmentation": "random_resized_crop", "data.views": 2}


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["device", "disk"])
def test_a_fixed_number_of_views_is_cached_like_one(small, kind):
    fields = {**VIEWS, "freeze.strategy": "top_k"}
    variables, losses = trained(small("resnet_bottleneck", cache="off", **fields))
    cached, cached_losses = trained(small("resnet_bottleneck", cache=kind, **fields))
    assert_same(variables, cached)
    assert losses == cached_losses
    other, _ = trained(small("resnet_bottleneck", cache="off", **{**fields, "seed": 1}))
    with pytest.raises(AssertionError):
        assert_same(variables, other)


def test_each_view_is_shown_once_in_as_many_epochs(small):
    run = job.prepare(small("resnet_bottleneck", **{**VIEWS, "data.views": 3}))
    from tl_jax.runner import training_batches

    shown = {}
    for batch in training_batches(run, run.rows("train")):
        for index, view in zip(batch["index"], batch["view"], strict=True):
            shown.setdefault(int(index), []).append(int(view))
    full = [views for views in shown.values() if len(views) == 4]  # in every epoch, none dropped
    assert full
    for views in full:
        assert sorted(views[:3]) == [0, 1, 2] and views[3] == views[0]
    pixels = [
        np.asarray(run.preprocess({**run.rows("train").load([5, 6], np.array([v, v], np.int32))}))
        for v in (0, 1, 1)
    ]
    assert pixels[1].tobytes() == pixels[2].tobytes() != pixels[0].tobytes()


def choice(config, stage=0):
    run = job.prepare(config)
    return cache_choice.choose(run, run.stages[stage])


def test_auto_takes_the_nearest_memory_that_it_fits_into(small, monkeypatch):
    def free(device, host):
        monkeypatch.setattr(memory, "device_available", lambda: device)
        monkeypatch.setattr(memory, "host_available", lambda: host)

    config = small("resnet_bottleneck", cache="auto")
    nbytes = (49 + 8) * 32 * 4  # features, float32
    free(4 * nbytes, 2 * nbytes)
    found = choice(config)
    assert (found.kind, found.first, found.nbytes) == ("device", 6, nbytes)
    assert "49 + 8 activations at head" in found.reason
    assert "saves" in found.reason
    free(4 * nbytes - 1, 2 * nbytes)
    assert choice(config).kind == "host"
    free(0, 2 * nbytes - 1)
    assert choice(config).kind == "disk"
    tiny = dataclasses.replace(config, cache_limit_gb=(nbytes - 1) / 1e9)
    assert choice(tiny).kind == "off" and "fit into no memory" in choice(tiny).reason


@pytest.mark.parametrize("kind", ["device", "host"])
def test_what_fits_into_no_memory_is_refused(small, monkeypatch, kind):
    nbytes = (49 + 8) * 32 * 4
    monkeypatch.setattr(memory, f"{kind}_available", lambda: nbytes)
    config = small("resnet_bottleneck", cache=kind)
    assert choice(config).kind == kind
    monkeypatch.setattr(memory, f"{kind}_available", lambda: nbytes - 1)
    with pytest.raises(UserError, match=f"'{kind}' cannot be: 49 .* KB are free"):
        choice(config)


def test_images_that_do_not_fit_are_refused(small, monkeypatch):
    config = small("resnet_bottleneck", cache="device", **{"freeze.strategy": "full"})
    nbytes = job.prepare(config).examples["train"].image_shape
    nbytes = 49 * int(np.prod(nbytes))
    monkeypatch.setattr(memory, "device_available", lambda: nbytes)
    assert choice(config).kind == "device"
    monkeypatch.setattr(memory, "device_available", lambda: nbytes - 1)
    with pytest.raises(UserError, match="'device' cannot be: the images take"):
        choice(config)


def test_auto_goes_without_where_the_disk_is_full(small, monkeypatch):
    """Refused where a disk is asked for, before anything is computed."""
    monkeypatch.setattr(memory, "device_available", lambda: 0)
    monkeypatch.setattr(memory, "host_available", lambda: 0)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=49 * 32 * 4))
    kinds = []
    without, losses = trained(small("resnet_bottleneck", cache="off"))
    config = small("resnet_bottleneck", cache="auto")
    assert choice(config).kind == "disk"
    found, others = trained(config, kinds)
    assert kinds == [("off", 0)] and losses == others
    assert_same(found, without)
    monkeypatch.setattr(feature_cache, "_run", None)
    with pytest.raises(UserError, match=r"train \+ validation up to head .* needs"):
        trained(small("resnet_bottleneck", cache="disk"))


def test_a_disk_has_room_for_the_caches_of_all_phases_or_none_is_computed(
    small, tmp_path, monkeypatch
):
    fields = {"freeze.strategy": "gradual_unfreezing", "freeze.groups": 2, "cache": "disk"}
    run = job.prepare(small("resnet_bottleneck", **fields))
    sizes = [cache_choice.choose(run, stage).nbytes for stage in run.stages]
    assert sorted(sizes)[-2] > 0, "two phases have a cache"
    limit = (sum(sizes) - 1) / 1e9
    config = small("resnet_bottleneck", **fields, cache_limit_gb=limit)
    monkeypatch.setattr(feature_cache, "_run", None)
    for start in (planning.plan, trainer.train):
        with pytest.raises(UserError, match=r"head .*; train \+ validation up to stages.* needs"):
            start(config, tmp_path / "run")


def test_a_run_that_goes_on_finds_the_cache_of_its_reestimated_statistics(small, tmp_path):
    """Its room is not asked for again."""
    fields = {"freeze.batch_norm": "reestimate", "cache": "disk", "train.epochs": 2}
    config = small("resnet_bottleneck", **fields)
    before = trainer.train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    held = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*"))
    limit = (held + choice(config).nbytes / 2) / 1e9
    config = small("resnet_bottleneck", **fields, cache_limit_gb=limit)
    assert trainer.train(config, tmp_path / "run")["metrics"] == before["metrics"]


def test_what_a_cache_took_is_known_to_those_who_find_it(small, tmp_path):
    """A second run, or a resumed one, counts what the first spent."""
    config = small("resnet_bottleneck", cache="disk", **{"train.epochs": 2})
    took = [trainer.train(config, tmp_path / str(n))["cost"] for n in range(2)]
    for name in ("cache_seconds", "cache_validation_seconds"):
        assert took[0][name] > 0
    assert took[1]["cache_validation_seconds"] == took[0]["cache_validation_seconds"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"data.augmentation": "flip"}, "flip draws anew at each step"),
        ({"freeze.batch_norm": "stats_only"}, "stats_only"),
        ({"freeze.strategy": "full"}, "stem trains"),
        ({"train.epochs": 1}, "1 of 1 epochs"),
        ({"freeze.strategy": "freeze_embed"}, "of a step's computation lies below layer_0"),
    ],
)
def test_auto_says_why_there_is_no_prefix(small, monkeypatch, fields, reason):
    # The stem of networks as small as these is more of them than of any real one.
    monkeypatch.setattr(cache_choice, "LEAST_SAVED", 0.2)
    name = "vit_base" if fields.get("freeze.strategy") == "freeze_embed" else "resnet_bottleneck"
    found = choice(small(name, cache="auto", **fields))
    assert found.first == 0
    assert reason in found.reason
    again = choice(small(name, cache="off", **fields))
    assert (again.kind, again.first) == ("off", 0)


@pytest.mark.parametrize("kind", ["device", "host", "disk"])
@pytest.mark.parametrize(
    "fields", [{"data.augmentation": "flip"}, {"freeze.batch_norm": "stats_only"}]
)
def test_what_cannot_be_is_refused(small, kind, fields):
    with pytest.raises(UserError, match=rf"config\.cache: '{kind}' cannot be: .*(flip|stats_only)"):
        choice(small("resnet_bottleneck", cache=kind, **fields))


@pytest.mark.bits
def test_images_that_fit_stay_on_the_device(small):
    """Augmentation draws anew from them; the same training as from the host."""
    fields = {"freeze.strategy": "full", "data.augmentation": "flip", "train.epochs": 2}
    kinds = []
    resident, losses = trained(small("resnet_bottleneck", cache="auto", **fields), kinds)
    assert kinds == [("device", 0)]
    streamed, others = trained(small("resnet_bottleneck", cache="off", **fields))
    assert_same(resident, streamed)
    assert losses == others


def keys(config):
    run = job.prepare(config)
    stage = run.stages[0]
    variables = run.pretrained.variables
    return {
        role: feature_store.name_of(feature_key.of(run, stage.plan, variables, role))
        for role in ("train", "validation")
    }


def test_a_cache_is_shared_by_all_that_see_the_same_rows(small):
    probe = keys(small("resnet_bottleneck"))
    assert probe["train"] != probe["validation"]
    same = {
        "optimizer.learning_rate": 0.7,
        "train.epochs": 9,
        "seed": 5,
        "head.kind": "mlp",
        "freeze.strategy": "lp_ft",
    }
    for name, value in same.items():
        assert keys(small("resnet_bottleneck", **{name: value})) == probe, name
    other = {
        "freeze.strategy": "top_k",
        "model.dtype": "bfloat16",
        "model.image_size": 40,
        "head.last_blocks": 2,
        "data.splits.train": "train[1:50]",
        "data.batch_size": 24,
    }
    for name, value in other.items():
        assert keys(small("resnet_bottleneck", **{name: value}))["train"] != probe["train"], name
    assert keys(small("resnet_base"))["train"] != probe["train"]
    views = keys(small("resnet_bottleneck", **VIEWS))
    assert views["train"] != probe["train"] and views["validation"] == probe["validation"]


def test_images_that_the_host_resizes_are_another_cache(small):
    """With views they are cropped after that, and not before."""
    run = job.prepare(small("resnet_bottleneck"))
    other = dataclasses.replace(run.examples["train"], image_shape=None)
    resized = dataclasses.replace(run, examples={**run.examples, "train": other})
    variables, plan = run.pretrained.variables, run.stages[0].plan
    one, two = (feature_key.of(each, plan, variables, "train") for each in (run, resized))
    assert {name for name in one if one[name] != two[name]} == {"image_shape"}


def test_another_processor_is_another_cache(small, monkeypatch):
    """Its instructions, of which AVX alone is an example, may round otherwise."""
    here = keys(small("resnet_bottleneck"))
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_max_isa=AVX")
    assert not set(keys(small("resnet_bottleneck")).values()) & set(here.values())


def test_other_weights_below_the_boundary_are_another_cache(small):
    run = job.prepare(small("resnet_bottleneck"))
    plan = run.stages[0].plan
    key = feature_key.of(run, plan, run.pretrained.variables, "train")
    moved = jax.tree.map(np.array, run.pretrained.variables)
    leaf = moved["batch_stats"]["resnet"]["embedder"]["embedder"]["normalization"]["mean"]
    leaf[0] = np.nextafter(leaf[0], np.inf)
    assert feature_key.of(run, plan, moved, "train") != key


@pytest.mark.bits
def test_several_blocks_outputs_pass_the_boundary(small):
    """A head on the last two blocks: activations are a tuple where the boundary lies between."""
    fields = {"head.last_blocks": 2, "freeze.strategy": "top_k"}
    off, _ = trained(small("vit_smaller", cache="off", **fields))
    on, _ = trained(small("vit_smaller", cache="disk", **fields))
    assert_same(off, on)


def test_a_shelf_keeps_what_was_wanted_last():
    made = []

    def make(name):
        return lambda: made.append(name) or name

    shelf = sharing.Shelf(10, 0)
    assert [shelf.rows(name, 5, make(name)) for name in "abab"] == list("abab")
    assert made == ["a", "b"]
    shelf.rows("c", 5, make("c"))  # in the place of a, the one that was wanted longest ago
    shelf.rows("b", 5, make("b"))
    shelf.rows("a", 5, make("a"))
    assert made == ["a", "b", "c", "a"]
    assert shelf.rows("large", 50, make("large")) == "large"  # alone it may be larger


@pytest.mark.bits
def test_runs_that_share_a_shelf_compute_the_prefix_once_and_give_the_same(
    digits_config, tmp_path, monkeypatch
):
    fields = {"cache": "host", "freeze.strategy": "top_k"}
    filled, run = [], feature_cache._run

    def counted(*args):
        filled.append(args)
        return run(*args)

    monkeypatch.setattr(feature_cache, "_run", counted)
    with sharing.through(sharing.Shelf(1e9, 1000)):
        trainer.train(digits_config("resnet_basic", **fields, seed=3), tmp_path / "first")
        assert len(filled) == 2  # train and validation
        trainer.train(digits_config("resnet_basic", **fields), tmp_path / "shared")
        assert len(filled) == 2
    trainer.train(digits_config("resnet_basic", **fields), tmp_path / "alone")
    assert len(filled) == 4
    shared, alone = (
        (tmp_path / name / "export" / "model.safetensors").read_bytes()
        for name in ("shared", "alone")
    )
    assert shared == alone
