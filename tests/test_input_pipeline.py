"""Order, sharding, padding and position of batches."""

import dataclasses
import itertools
import math
import os

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from image_fixtures import DIGITS_DIR, noise, write_folder

from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError
from tl_jax.input_pipeline import (
    ImageRows,
    Order,
    evaluation_batches,
    permutation,
    training_batches,
)
from tl_jax.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    channels=3, resize=(6, 5), crop=None, resample=2, rescale_factor=1 / 255, mean=None, std=None
)


@pytest.fixture(scope="module")
def digits():
    return open_dataset("tfds:digits", {"test": "test[:50]"}, DIGITS_DIR)["test"]


ORDER = {field.name for field in dataclasses.fields(Order)}


def train(examples, **options):
    order = {"batch_size": 8, "seed": 3}
    order |= {name: options.pop(name) for name in list(options) if name in ORDER}
    settings = {"num_epochs": 1} | options
    rows = ImageRows(examples, PREPROCESSING)
    return training_batches(rows, Order(len(rows), **order), **settings)


def evaluate(examples, **options):
    return evaluation_batches(ImageRows(examples, PREPROCESSING), **({"batch_size": 8} | options))


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


class TestTraining:
    def test_batches(self, digits):
        batches = list(train(digits))
        assert len(batches) == 6  # of 50 examples, 2 are left over
        for batch in batches:
            assert batch["image"].shape == (8, 8, 8, 1) and batch["image"].dtype == np.uint8
            assert batch["label"].dtype == batch["index"].dtype == np.int32
            for image, label, index in zip(
                batch["image"], batch["label"], batch["index"], strict=True
            ):
                assert np.array_equal(image, digits[index]["image"])
                assert label == digits[index]["label"]

    def test_every_example_at_most_once_an_epoch(self, digits):
        seen = indices(train(digits, num_epochs=4))
        epochs = [joined(seen[start : start + 6]) for start in range(0, 24, 6)]
        for epoch in epochs:
            assert len(set(epoch)) == 48
            assert epoch != sorted(epoch)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same left out

    def test_order_depends_on_seed_and_epoch_alone(self, digits):
        reference = indices(train(digits, num_epochs=2))
        assert indices(train(digits, num_epochs=3, threads=1, prefetch=1))[:12] == reference
        assert indices(train(digits, num_epochs=2, seed=4)) != reference
        smaller = joined(indices(train(digits, batch_size=4)))
        assert smaller[:48] == joined(reference[:6])  # nor on the batch size

    def test_the_order_of_an_epoch_is_drawn_at_once(self, digits):
        """As the batches are, of any process, with views as with none; and for all time."""
        for options in ({}, {"views": 3}, {"process_index": 1, "process_count": 2}):
            found = list(train(digits, num_epochs=3, **options))
            drawn = Order(50, 8, 3, **options).batches(4, 15)
            for name, columns in drawn.items():
                assert columns.dtype == np.int32
                expected = np.stack([batch[name] for batch in found[4:15]], axis=1)
                np.testing.assert_array_equal(columns, expected)
        assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]

    def test_orders_of_neighbouring_seeds_are_different(self):
        orders = {permutation(50, seed, epoch).tobytes() for seed in (0, 1) for epoch in (0, 1)}
        assert len(orders) == 4

    @pytest.mark.parametrize("count", [2, 4])
    def test_processes_share_every_batch(self, digits, count):
        reference = indices(train(digits, num_epochs=2))
        parts = [
            indices(train(digits, num_epochs=2, process_index=p, process_count=count))
            for p in range(count)
        ]
        assert [joined(rows) for rows in zip(*parts, strict=True)] == reference

    def test_without_end(self, digits):
        iterator = train(digits, num_epochs=None)
        for _ in range(20):
            assert len(next(iterator)["label"]) == 8

    @pytest.mark.parametrize("position", [0, 1, 6, 9])
    def test_position_is_restored(self, digits, position):
        iterator = train(digits, num_epochs=3)
        for _ in range(position):
            next(iterator)
        state = iterator.get_state()
        rest = indices(iterator)
        assert len(rest) == 18 - position
        other = train(digits, num_epochs=3)
        next(other)
        other.set_state(state)
        assert indices(other) == rest

    def test_position_through_orbax(self, digits, tmp_path):
        iterator = train(digits, num_epochs=2)
        for _ in range(7):
            next(iterator)
        with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
            save = ocp.args.Composite(
                weights=ocp.args.StandardSave({"w": np.ones(3)}),
                input=grain.checkpoint.CheckpointSave(iterator),
            )
            manager.save(7, args=save)
            manager.wait_until_finished()
            rest = indices(iterator)
            other = train(digits, num_epochs=2)
            manager.restore(
                7, args=ocp.args.Composite(input=grain.checkpoint.CheckpointRestore(other))
            )
        assert len(rest) == 5
        assert indices(other) == rest

    def test_batch_that_does_not_fit(self, digits):
        with pytest.raises(UserError, match=r"batch_size is 51.*only 50"):
            train(digits, batch_size=51)
        with pytest.raises(UserError, match="multiple of the 3"):
            train(digits, process_count=3)
        with pytest.raises(UserError, match="positive"):
            train(digits, batch_size=0)

    def test_images_of_many_sizes(self, tmp_path):
        write_folder(tmp_path, {"a": 8, "b": 8}, many_sizes=True)
        examples = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        for batch in train(examples):
            assert batch["image"].shape == (8, 6, 5, 3) and batch["image"].dtype == np.uint8
            first = PREPROCESSING.host(examples[batch["index"][0]]["image"])
            assert np.array_equal(batch["image"][0], first)

    @pytest.mark.parametrize("threads", [1, 4])
    def test_errors_come_out_of_the_threads(self, tmp_path, threads):
        write_folder(tmp_path, {"a": 16, "b": 16})
        examples = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        noise(0, width=9).save(tmp_path / "b" / "003.png")
        (tmp_path / "b" / "004.png").unlink()
        with pytest.raises(UserError, match=r"b/00[34]\.png"):
            list(train(examples, threads=threads))


class TestEvaluation:
    @pytest.mark.parametrize("count", [1, 2, 4, 8])
    @pytest.mark.parametrize("batch_size", [8, 16, 56])
    def test_processes_cover_all_once(self, digits, count, batch_size):
        parts = [
            list(evaluate(digits, batch_size=batch_size, process_index=p, process_count=count))
            for p in range(count)
        ]
        assert {len(part) for part in parts} == {math.ceil(50 / batch_size)}
        order = []
        for batches in zip(*parts, strict=True):
            for batch in batches:
                real = batch["mask"] == 1
                assert batch["image"].shape == (batch_size // count, 8, 8, 1)
                assert batch["mask"].dtype == np.float32
                assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
                assert not batch["image"][~real].any() and not batch["mask"][~real].any()
                assert (batch["index"][~real] == -1).all()
                order += batch["index"][real].tolist()
        assert order == list(range(50))

    def test_content(self, digits):
        for batch in evaluate(digits):
            for row in np.flatnonzero(batch["mask"]):
                example = digits[batch["index"][row]]
                assert np.array_equal(batch["image"][row], example["image"])
                assert batch["label"][row] == example["label"]

    def test_images_of_many_sizes(self, tmp_path):
        write_folder(tmp_path, {"a": 3, "b": 2}, many_sizes=True)
        examples = open_dataset(f"folder:{tmp_path}", {"test": "train"})["test"]
        parts = [list(evaluate(examples, process_index=p, process_count=2)) for p in range(2)]
        assert [part[0]["image"].shape for part in parts] == [(4, 6, 5, 3)] * 2
        assert [part[0]["mask"].sum() for part in parts] == [4, 1]
        last = next(evaluate(examples, process_index=3, process_count=4))
        assert last["image"].shape == (2, 6, 5, 3) and not last["mask"].any()

    def test_more_than_one_epoch_is_a_new_iterator(self, digits):
        assert indices(evaluate(digits)) == indices(evaluate(digits))

    def test_examples_are_not_changed_by_a_batch(self, digits):
        same = dataclasses.replace(digits)
        next(evaluate(digits))["image"][:] = 0
        assert np.array_equal(same[0]["image"], digits[0]["image"])
        assert digits[0]["image"].any()


@pytest.mark.parametrize("start", [1, 6, 7, 11])
def test_after_the_first_batches_come_the_others(digits, start):
    """From any batch on, inside an epoch or between two, with views as with none."""
    for views in (None, 3):
        whole = list(train(digits, num_epochs=2, views=views))
        rest = list(train(digits, num_epochs=2, views=views, start=start))
        assert len(whole) == 12 and len(rest) == 12 - start
        for ours, theirs in zip(rest, whole[start:], strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


class Watched:
    """Records that leave behind which process read them."""

    def __init__(self, records, folder):
        self._records, self._folder = records, folder

    def __len__(self):
        return len(self._records)

    def read(self, indices):
        (self._folder / str(os.getpid())).touch()
        return self._records.read(indices)


def test_worker_processes_give_the_same_batches(tmp_path):
    """Images of many sizes, decoded and resized elsewhere; what is wrong with one is said here."""
    folder = write_folder(tmp_path / "images", {"a": 9, "b": 9}, ".jpg", many_sizes=True)
    examples = open_dataset(f"folder:{folder}", {"train": "train"})["train"]
    assert not ImageRows(examples, PREPROCESSING).cheap
    seen = tmp_path / "processes"
    seen.mkdir()
    watched = dataclasses.replace(examples, records=Watched(examples.records, seen))
    list(train(watched, batch_size=4, seed=0, num_epochs=1, threads=1, workers=2))
    assert len(list(seen.iterdir())) == 2 and not (seen / str(os.getpid())).exists()
    settings = {"batch_size": 4, "seed": 0, "num_epochs": 2, "threads": 1}
    here = list(train(examples, **settings, start=1))
    there = list(train(examples, **settings, start=1, workers=2))
    assert len(here) == len(there) == 7
    for ours, theirs in zip(there, here, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])
    broken = sorted(folder.glob("a/*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(Exception, match=broken.name) as caught:
        list(train(examples, **settings, workers=2))
    assert "cannot be decoded" in str(caught.value)
