"""Subsets of the training split: nested, stratified, the same ones again, and told apart."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from image_fixtures import DIGITS_DIR, DIGITS_SPLITS, noise

from tl_jax import config as config_lib
from tl_jax import config_files, feature_key, job, results, subsets
from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError
from tl_jax.workdir import WorkDir


@pytest.fixture(scope="module")
def digits():
    return open_dataset("tfds:digits", DIGITS_SPLITS, DIGITS_DIR)


def rows(examples):
    """Which examples of the split a subset holds; the records say so themselves."""
    return [int(r.where.rpartition(" ")[2]) for r in examples.records.read(range(len(examples)))]


def test_so_many_of_each_class_and_each_larger_subset_holds_the_smaller(digits):
    sizes = (1, 2, 7, 30)
    found = [subsets.of_each_class(digits["train"], 3, examples_per_class=n) for n in sizes]
    for n, examples in zip(sizes, found, strict=True):
        assert np.bincount(subsets.labels(examples), minlength=10).tolist() == [n] * 10
        assert rows(examples) == sorted(set(rows(examples)))  # the order of the split
    for small, large in itertools.pairwise(found):
        assert set(rows(small)) < set(rows(large))


def test_a_share_of_each_class(digits):
    whole = np.bincount(subsets.labels(digits["train"]), minlength=10)
    found = {
        share: subsets.of_each_class(digits["train"], 3, fraction=share)
        for share in (0.001, 0.1, 0.5, 1.0)
    }
    for share, examples in found.items():
        wanted = [max(1, round(share * n)) for n in whole.tolist()]
        assert np.bincount(subsets.labels(examples), minlength=10).tolist() == wanted
    assert rows(found[1.0]) == list(range(len(digits["train"])))
    assert set(rows(found[0.001])) < set(rows(found[0.1])) < set(rows(found[0.5]))
    one = subsets.of_each_class(digits["train"], 3, examples_per_class=1)
    assert rows(one) == rows(found[0.001])


def test_the_seed_draws_the_subset_and_nothing_else_does(digits):
    again = open_dataset("tfds:digits", DIGITS_SPLITS, DIGITS_DIR)["train"]
    first = subsets.of_each_class(digits["train"], 0, examples_per_class=5)
    assert rows(first) == rows(subsets.of_each_class(again, 0, examples_per_class=5))
    other = subsets.of_each_class(again, 1, examples_per_class=5)
    assert rows(first) != rows(other)
    assert first[3]["label"] == subsets.labels(first)[3]
    assert (first[3]["image"] == digits["train"][rows(first)[3]]["image"]).all()


def test_no_two_subsets_share_a_fingerprint(digits):
    train = digits["train"]
    found = [train, subsets.first(train, 50)]
    for seed in (0, 1):
        found.append(subsets.of_each_class(train, seed, examples_per_class=5))
        found.append(subsets.of_each_class(train, seed, fraction=0.5))
    assert len({examples.fingerprint for examples in found}) == len(found)
    assert len({examples.split for examples in found}) == len(found)
    assert "5 of each class by seed 0" in found[2].split


def test_without_a_request_the_split_is_itself(digits):
    assert subsets.of_each_class(digits["train"], 0) is digits["train"]
    assert subsets.first(digits["test"], 500) is digits["test"]
    assert rows(subsets.first(digits["test"], 3)) == [0, 1, 2]


def test_a_class_that_is_too_small_is_named(digits):
    with pytest.raises(UserError, match=r"examples_per_class: 130 of each.*'8' has \d+"):
        subsets.of_each_class(digits["train"], 0, examples_per_class=130)


def test_labels_are_read_once_and_without_decoding(tmp_path):
    for number in range(6):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        noise(number).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    examples = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
    asked = []

    class Counting:
        def __len__(self):
            return len(examples)

        def read(self, indices):
            asked.extend(indices)
            found = examples.records.read(indices)
            return [record._replace(image=b"no image") for record in found]

    counted = dataclasses.replace(examples, records=Counting())
    assert sorted(subsets.labels(counted).tolist()) == [0, 0, 0, 1, 1, 1]
    subsets.of_each_class(counted, 0, examples_per_class=2)
    assert asked == list(range(6))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"examples_per_class": 0}, "examples_per_class: 0 is less than 1"),
        ({"fraction": 0.0}, "fraction: 0.0 is not more than 0"),
        ({"fraction": 1.5}, "fraction: 1.5 of a class is more than all"),
        ({"fraction": 0.5, "examples_per_class": 3}, "goes without data.examples_per_class"),
    ],
)
def test_impossible_requests(fields, words):
    with pytest.raises(UserError, match=words):
        config_files.resolve(
            {"model": {"pretrained": "a/b"}, "data": {"source": "tfds:digits", **fields}}
        )


def test_a_run_trains_on_the_subset_alone(digits_config):
    fields = {"data.examples_per_class": 3, "data.batch_size": 24}
    run = job.prepare(digits_config("resnet_basic", **fields))
    assert [len(run.examples[role]) for role in ("train", "validation", "test")] == [30, 108, 130]
    assert run.steps_per_epoch == 1
    split = run.describe_plan()["data"]["splits"]["train"]
    assert split == {"split": "train[:192], 3 of each class by seed 0", "examples": 30}


def test_caches_of_subsets_are_told_apart(digits_config):
    keys = []
    for fields in ({}, {"seed": 1}, {"data.examples_per_class": 4}):
        fields = {"data.examples_per_class": 3, "data.batch_size": 24, **fields}
        run = job.prepare(digits_config("resnet_basic", **fields))
        plan = run.stages[0].plan
        keys.append(feature_key.of(run, plan, run.pretrained.variables, "train")["data"])
    assert len({tuple(key) for key in keys}) == 3


def test_a_subset_smaller_than_a_batch(digits_config):
    with pytest.raises(UserError, match=r"64 is more than the 30 examples .*3 of each class"):
        job.prepare(digits_config("resnet_basic", **{"data.examples_per_class": 3}))


def test_overlap_with_validation_is_still_seen(digits_config):
    fields = {"data.splits.validation": "train[190:300]", "data.fraction": 0.5}
    with pytest.raises(UserError, match="share 2 examples"):
        job.prepare(digits_config("resnet_basic", **fields))


def test_another_seed_is_another_run(digits_config, tmp_path):
    ours, other = (
        digits_config("resnet_basic", **{"data.fraction": 0.5, "seed": seed}) for seed in (0, 1)
    )
    workdir = WorkDir(tmp_path)
    workdir.write_json("config.json", config_lib.to_dict(ours))
    workdir.claim(ours)
    with pytest.raises(UserError, match=r"config\.seed"):
        workdir.claim(other)


@pytest.mark.parametrize("field", [{"data.examples_per_class": 9}, {"data.fraction": 0.5}])
def test_a_grid_of_seeds_is_refused(digits_config, field):
    with pytest.raises(UserError, match="seed: the subset of data"):
        digits_config("resnet_basic", **field, **{"probe.grid.seed": (0, 1)})


def test_what_runs_share_is_neither_of_their_seeds_nor_of_their_rates(
    digits_config, network, tmp_path
):
    def made_of(**fields):
        few = {"data.fraction": 0.5, "data.batch_size": 32, "freeze.strategy": "top_k"}
        return results.made_of(job.prepare(digits_config("resnet_basic", **few | fields)))

    one, other = made_of(), tmp_path / "other"
    shutil.copytree(network("resnet_basic"), other)
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "hidden_act": "gelu"}))
    for fields in (
        {"seed": 1},
        {"optimizer.learning_rate": 0.7},
        {"optimizer.weight_decay": 0.1},
    ):
        assert made_of(**fields) == one, fields
    for what, fields in {
        "images of train": {"data.splits.train": "train[:150]"},
        "images of validation": {"data.splits.validation": "train[192:301]"},
        "parameters trained by the strategy": {"freeze.k": 2},
        "network": {"model.pretrained": str(other)},
    }.items():
        assert {name for name, value in made_of(**fields).items() if value != one[name]} == {what}
