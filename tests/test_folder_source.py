"""Folders of images: classes, splits, order, and what is refused."""

import os
import pathlib
import sys

import numpy as np
import pytest
from image_fixtures import fails, noise, write_folder
from PIL import Image

from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError


def test_classes(tmp_path):
    write_folder(tmp_path, {"dog": 6, "cat": 4})
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
    assert train.class_names == ("cat", "dog")
    assert train.image_shape == (8, 8, 3)
    assert sorted(example["label"] for example in train) == [0] * 4 + [1] * 6
    by_label = {}
    for example in train:
        by_label.setdefault(example["label"], set()).add(example["image"].tobytes())
    assert by_label[0] == {np.asarray(noise(seed)).tobytes() for seed in range(6, 10)}


def test_splits(tmp_path):
    for split, count in {"train": 3, "val": 2, "test": 1}.items():
        write_folder(tmp_path / split, {"a": count, "b": count})
    wanted = {"train": "train", "validation": "validation", "test": "test[:50%]"}
    found = open_dataset(f"folder:{tmp_path}", wanted)
    assert {role: len(some) for role, some in found.items()} == {
        "train": 6,
        "validation": 4,
        "test": 1,
    }


def test_a_class_may_be_called_test(tmp_path):
    write_folder(tmp_path, {"test": 2, "train": 2})
    train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
    assert train.class_names == ("test", "train")


def test_slices_cover_all_and_are_representative(tmp_path):
    write_folder(tmp_path, {"a": 100, "b": 100})
    splits = {"train": "train[:80%]", "test": "train[80%:]"}
    found = open_dataset(f"folder:{tmp_path}", splits)
    seen = [e["image"].tobytes() for some in found.values() for e in some]
    assert len(seen) == len(set(seen)) == 200
    assert 8 <= sum(example["label"] for example in found["test"]) <= 32


def test_order_is_fixed(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a": 5, "b": 5})

    def labels():
        train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        return train.fingerprint, [example["image"].tobytes() for example in train]

    expected = labels()
    order = np.random.RandomState(0).permutation(10)  # documented: by path, then this
    by_path = [np.asarray(noise(seed)).tobytes() for seed in range(10)]
    assert expected[1] == [by_path[row] for row in order]
    walk = os.walk

    def reversed_walk(*args, **options):
        for parent, folders, files in walk(*args, **options):
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert labels() == expected


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
@pytest.mark.parametrize("wrong", [b"a/\xff.png", b"\xff/a.png"])
def test_names_that_are_not_utf8(tmp_path, wrong):
    write_folder(tmp_path, {"a": 2, "b": 2})
    path = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + wrong))
    path.parent.mkdir(exist_ok=True)
    noise(0).save(path)
    culprit = path if wrong.endswith(b"\xff.png") else path.parent
    fails(f"folder:{tmp_path}", {"train": "train"}, "not UTF-8", repr(str(culprit)))
    fails(f"folder:{path.parent.parent}", {"train": "train"}, "not UTF-8")


def test_what_is_no_regular_file_is_no_image(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    words = ["1 of 5 images", "pipe.png (not a regular file)"]
    fails(f"folder:{tmp_path}", {"train": "train"}, *words)
    train = open_dataset(f"folder:{tmp_path}", {"train": "train"}, skip_unreadable=True)["train"]
    assert len(train) == 4


def test_fingerprint_sees_files(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3})

    def current():
        return open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"].fingerprint

    before = current()
    (tmp_path / "a" / "000.png").rename(tmp_path / "b" / "other.png")
    assert current() != before


def test_fingerprint_sees_bytes(tmp_path):
    """Other images of the same names and sizes are other data."""
    write_folder(tmp_path, {"a": 3, "b": 3}, ".bmp")

    def current():
        return open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"].fingerprint

    before, path = current(), tmp_path / "a" / "000.bmp"
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)
    assert current() != before


def test_many_sizes_are_pil_images(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3}, ".jpg", many_sizes=True)
    train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
    assert train.image_shape is None
    assert {example["image"].width for example in train} == {8, 9, 10, 11, 12}
    assert all(isinstance(example["image"], Image.Image) for example in train)


def test_gray_among_colour(tmp_path):
    write_folder(tmp_path, {"a": 1, "b": 1})
    noise(9, mode="L").save(tmp_path / "a" / "gray.png")
    train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
    assert train.image_shape == (8, 8, 3)
    gray = np.asarray(noise(9, mode="L"))
    assert any((e["image"] == gray[..., None]).all() for e in train)


def test_unreadable_files(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 4}, ".jpg")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "b" / "text.jpg").write_text("no image")
    whole = (tmp_path / "b" / "000.jpg").read_bytes()
    (tmp_path / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    fails(
        f"folder:{tmp_path}",
        {"train": "train"},
        "3 of 11 images",
        "empty.png",
        "text.jpg",
        "cut.jpg",
        "data.skip_unreadable",
    )
    found = open_dataset(f"folder:{tmp_path}", {"train": "train"}, skip_unreadable=True)
    assert len(found["train"]) == 8
    assert len(list(found["train"])) == 8


def test_damage_inside_a_file(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 4})
    path = tmp_path / "a" / "001.png"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 4
    content[at : at + 20] = bytes(20)  # the header and the end are whole
    path.write_bytes(content)
    train = None
    with pytest.raises(UserError, match=r"001\.png.*skip_unreadable"):
        train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        list(train)
    some = open_dataset(f"folder:{tmp_path}", {"train": "train"}, skip_unreadable=True)
    assert len(list(some["train"])) == 7


def test_missing(tmp_path):
    fails(f"folder:{tmp_path}/nothing", {"train": "train"}, "no such folder")
    fails(f"folder:{tmp_path}", {"train": "train"}, "no sub-folders", "labels")


def test_split_that_does_not_exist(tmp_path):
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "b": 1})
    fails(
        f"folder:{tmp_path}",
        {"train": "train", "test": "test[:5]"},
        "'test'",
        "train, validation",
    )


def test_classes_that_are_wrong_are_all_named(tmp_path):
    write_folder(tmp_path / "train", {"a": 1, "b": 0, "c": 0})
    write_folder(tmp_path / "test", {"a": 1, "zebra": 1})
    fails(f"folder:{tmp_path}", {"train": "train", "test": "test"}, "/b", "/c", "zebra")


def test_only_a_test_split(tmp_path):
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    assert open_dataset(f"folder:{tmp_path}", {"test": "test"})["test"].class_names == (
        "a",
        "b",
    )


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "b" / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    fails(f"folder:{tmp_path}", {"train": "train"}, "b/closed", "Permission denied")


def test_unlabelled_split(tmp_path):
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    (tmp_path / "test").mkdir()
    noise(0).save(tmp_path / "test" / "1.png")
    fails(f"folder:{tmp_path}", {"train": "train", "test": "test"}, "no class folders")
    assert open_dataset(f"folder:{tmp_path}", {"train": "train", "test": None})


def test_links_out_of_the_folder(tmp_path):
    inside = write_folder(tmp_path / "in", {"a": 2, "b": 2})
    outside = write_folder(tmp_path / "out", {"c": 1})
    (inside / "a" / "link.png").symlink_to(outside / "c" / "000.png")
    (inside / "b" / "more").symlink_to(outside / "c")
    fails(f"folder:{inside}", {"train": "train"}, "link.png", "b/more", "symbolic link")


def test_links_in_the_folder(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "000.png")
    assert len(open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]) == 5


def test_class_folder_that_is_a_link(tmp_path):
    inside = write_folder(tmp_path / "in", {"a": 2})
    (inside / "b").symlink_to(write_folder(tmp_path / "out", {"c": 1}) / "c")
    fails(f"folder:{inside}", {"train": "train"}, "in/b", "refused")
