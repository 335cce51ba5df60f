"""Sources of data: what they hold, in which order, and what they say of bad input."""

import io
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from image_fixtures import DIGITS_DIR, DIGITS_SPLITS, ROOT, noise, write_folder
from PIL import Image, PngImagePlugin

from tl_jax import image_files
from tl_jax.datasets import open_dataset
from tl_jax.errors import UserError


def digits(splits=None):
    return open_dataset("tfds:digits", splits or DIGITS_SPLITS, DIGITS_DIR)


def fails(source, splits, *words, data_dir=None, **options):
    """The message with which opening fails; it holds all the words."""
    with pytest.raises(UserError) as caught:
        open_dataset(source, splits, data_dir, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


class TestTfds:
    def test_digits(self):
        examples = digits()
        assert {role: len(some) for role, some in examples.items()} == {
            "train": 1167,
            "validation": 130,
            "test": 500,
        }
        train = examples["train"]
        assert (train.name, train.version) == ("digits", "1.0.0")
        assert train.class_names == tuple("0123456789")
        assert train.image_shape == (8, 8, 1)
        first = train[0]
        assert first["image"].shape == (8, 8, 1) and first["image"].dtype == np.uint8
        assert np.array_equal(train[-1]["image"], train[len(train) - 1]["image"])
        with pytest.raises(IndexError):
            train[len(train)]

    def test_digits_are_the_uci_digits(self):
        load_digits = pytest.importorskip("sklearn.datasets").load_digits
        data = load_digits()
        scaled = np.round(data.images * 255 / 16).astype(np.uint8)
        expected = sorted(
            (label, i.tobytes()) for label, i in zip(data.target, scaled, strict=True)
        )
        splits = digits({"train": "train", "test": "test"}).values()
        found = sorted((e["label"], e["image"].tobytes()) for some in splits for e in some)
        assert found == expected

    def test_digits_are_stratified(self):
        labels = [example["label"] for example in digits({"test": "test"})["test"]]
        assert np.ptp(np.bincount(labels)) <= 3

    def test_slices_are_those_of_tfds(self):
        whole = digits({"train": "train"})["train"]
        part = digits({"train": "train[10:13]+test[:1]"})["train"]
        assert len(part) == 4
        for k in range(3):
            assert np.array_equal(part[k]["image"], whole[10 + k]["image"])

    def test_batched_reading_keeps_the_order(self):
        train = digits()["train"]
        indices = [5, 3, 5, 1166, 0]
        for index, example in zip(indices, train.get(indices), strict=True):
            assert np.array_equal(example["image"], train[index]["image"])

    def test_name_with_version(self):
        splits = {"train": "train"}
        assert len(open_dataset("tfds:digits:1.0.0", splits, DIGITS_DIR)["train"]) == 1297

    def test_fingerprint(self, tmp_path):
        one = digits()
        shutil.copytree(ROOT / "quickstart" / "data", tmp_path / "copy")
        other = open_dataset("tfds:digits", DIGITS_SPLITS, str(tmp_path / "copy"))
        assert one["train"].fingerprint == other["train"].fingerprint
        assert len({some.fingerprint for some in one.values()}) == 3

    def test_splits_that_are_wrong_are_all_named(self):
        message = fails(
            "tfds:digits",
            {"train": "trian", "validation": "test[:0]", "test": "test[:1x]"},
            "trian",
            "validation = 'test[:0]' selects no example",
            "test = 'test[:1x]'",
            "train (1297)",
            "test (500)",
            data_dir=DIGITS_DIR,
        )
        assert "\n\n" not in message

    def test_overlap_with_the_training_split(self):
        fails(
            "tfds:digits",
            {"train": "train", "validation": "train[90%:]", "test": "test"},
            "share 130 examples",
            data_dir=DIGITS_DIR,
        )
        fails(
            "tfds:digits",
            {"train": "train[:100]+test[10:12]", "test": "test[11:]"},
            "share 1 example.",
            data_dir=DIGITS_DIR,
        )

    def test_columns(self):
        fails(
            "tfds:digits",
            {"train": "train"},
            "'digit'",
            "image (Image)",
            "label (ClassLabel)",
            data_dir=DIGITS_DIR,
            label_column="digit",
        )

    def test_damaged_shard(self, tmp_path):
        shutil.copytree(ROOT / "quickstart" / "data", tmp_path / "data")
        (shard,) = tmp_path.glob("data/digits/1.0.0/*train*")
        shard.write_bytes(shard.read_bytes()[:1000])
        fails("tfds:digits", {"train": "train"}, "train", data_dir=str(tmp_path / "data"))
        shard.unlink()
        fails("tfds:digits", {"train": "train"}, "train", data_dir=str(tmp_path / "data"))

    def test_no_tensorflow(self):
        code = (
            "import sys; from tl_jax.datasets import open_dataset;"
            f"d = open_dataset('tfds:digits', {DIGITS_SPLITS!r}, {DIGITS_DIR!r});"
            "d['train'].get(range(64));"
            "print([m for m in ('tensorflow', 'torch', 'datasets') if m in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert result.stdout.strip() == "[]"


class TestSourceString:
    @pytest.mark.parametrize("source", ["digits", "tfds:", "s3:digits", ""])
    def test_refused(self, source):
        fails(source, {"train": "train"}, "data.source", "tfds:NAME")

    def test_no_split(self):
        fails("tfds:digits", {"train": None}, "data.splits", data_dir=DIGITS_DIR)


class TestFolder:
    def test_classes(self, tmp_path):
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

    def test_splits(self, tmp_path):
        for split, count in {"train": 3, "val": 2, "test": 1}.items():
            write_folder(tmp_path / split, {"a": count, "b": count})
        wanted = {"train": "train", "validation": "validation", "test": "test[:50%]"}
        found = open_dataset(f"folder:{tmp_path}", wanted)
        assert {role: len(some) for role, some in found.items()} == {
            "train": 6,
            "validation": 4,
            "test": 1,
        }

    def test_a_class_may_be_called_test(self, tmp_path):
        write_folder(tmp_path, {"test": 2, "train": 2})
        train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        assert train.class_names == ("test", "train")

    def test_slices_cover_all_and_are_representative(self, tmp_path):
        write_folder(tmp_path, {"a": 100, "b": 100})
        splits = {"train": "train[:80%]", "test": "train[80%:]"}
        found = open_dataset(f"folder:{tmp_path}", splits)
        seen = [e["image"].tobytes() for some in found.values() for e in some]
        assert len(seen) == len(set(seen)) == 200
        assert 8 <= sum(example["label"] for example in found["test"]) <= 32

    def test_order_is_fixed(self, tmp_path, monkeypatch):
        write_folder(tmp_path, {"a": 5, "b": 5})

        def labels():
            train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
            return train.fingerprint, [example["image"].tobytes() for example in train]

        expected = labels()
        order = np.random.RandomState(0).permutation(10)  # documented: by path, then this
        by_path = [np.asarray(noise(seed)).tobytes() for seed in range(10)]
        assert expected[1] == [by_path[row] for row in order]
        walk = os.walk

        def reversed_walk(*args):
            for parent, folders, files in walk(*args):
                yield parent, folders, sorted(files, reverse=True)

        monkeypatch.setattr(os, "walk", reversed_walk)
        assert labels() == expected

    def test_fingerprint_sees_files(self, tmp_path):
        write_folder(tmp_path, {"a": 3, "b": 3})

        def current():
            return open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"].fingerprint

        before = current()
        (tmp_path / "a" / "000.png").rename(tmp_path / "b" / "other.png")
        assert current() != before

    def test_many_sizes_are_pil_images(self, tmp_path):
        write_folder(tmp_path, {"a": 3, "b": 3}, ".jpg", many_sizes=True)
        train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        assert train.image_shape is None
        assert {example["image"].width for example in train} == {8, 9, 10, 11, 12}
        assert all(isinstance(example["image"], Image.Image) for example in train)

    def test_gray_among_colour(self, tmp_path):
        write_folder(tmp_path, {"a": 1, "b": 1})
        noise(9, mode="L").save(tmp_path / "a" / "gray.png")
        train = open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]
        assert train.image_shape == (8, 8, 3)
        gray = np.asarray(noise(9, mode="L"))
        assert any((e["image"] == gray[..., None]).all() for e in train)

    def test_unreadable_files(self, tmp_path):
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

    def test_damage_inside_a_file(self, tmp_path):
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

    def test_missing(self, tmp_path):
        fails(f"folder:{tmp_path}/nothing", {"train": "train"}, "no such folder")
        fails(f"folder:{tmp_path}", {"train": "train"}, "no sub-folders", "labels")

    def test_split_that_does_not_exist(self, tmp_path):
        write_folder(tmp_path / "train", {"a": 1, "b": 1})
        write_folder(tmp_path / "val", {"a": 1, "b": 1})
        fails(
            f"folder:{tmp_path}",
            {"train": "train", "test": "test[:5]"},
            "'test'",
            "train, validation",
        )

    def test_classes_that_are_wrong_are_all_named(self, tmp_path):
        write_folder(tmp_path / "train", {"a": 1, "b": 0, "c": 0})
        write_folder(tmp_path / "test", {"a": 1, "zebra": 1})
        fails(f"folder:{tmp_path}", {"train": "train", "test": "test"}, "/b", "/c", "zebra")

    def test_unlabelled_split(self, tmp_path):
        write_folder(tmp_path / "train", {"a": 1, "b": 1})
        (tmp_path / "test").mkdir()
        noise(0).save(tmp_path / "test" / "1.png")
        fails(f"folder:{tmp_path}", {"train": "train", "test": "test"}, "no class folders")
        assert open_dataset(f"folder:{tmp_path}", {"train": "train", "test": None})

    def test_links_out_of_the_folder(self, tmp_path):
        inside = write_folder(tmp_path / "in", {"a": 2, "b": 2})
        outside = write_folder(tmp_path / "out", {"c": 1})
        (inside / "a" / "link.png").symlink_to(outside / "c" / "000.png")
        (inside / "b" / "more").symlink_to(outside / "c")
        fails(f"folder:{inside}", {"train": "train"}, "link.png", "b/more", "symbolic link")

    def test_links_in_the_folder(self, tmp_path):
        write_folder(tmp_path, {"a": 2, "b": 2})
        (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "000.png")
        assert len(open_dataset(f"folder:{tmp_path}", {"train": "train"})["train"]) == 5

    def test_class_folder_that_is_a_link(self, tmp_path):
        inside = write_folder(tmp_path / "in", {"a": 2})
        (inside / "b").symlink_to(write_folder(tmp_path / "out", {"c": 1}) / "c")
        fails(f"folder:{inside}", {"train": "train"}, "in/b", "refused")


class TestImages:
    def test_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 6  # turn by 90 degrees
        image = noise(0, height=4, width=16)
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        assert image_files.header(tmp_path / "turned.jpg") == (16, 4, 3)
        assert image_files.decode(tmp_path / "turned.jpg").size == (4, 16)

    def test_transparency_is_white(self):
        file = io.BytesIO()
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(file, "PNG")
        assert np.asarray(image_files.decode(file.getvalue())).tolist() == [[[255] * 3] * 2] * 2

    def test_bomb(self, monkeypatch):
        monkeypatch.setattr(image_files, "MAX_PIXELS", 10)
        file = io.BytesIO()
        noise(0).save(file, "PNG")
        for look in (image_files.decode, image_files.header):
            with pytest.raises(image_files.UnreadableImage, match="too large"):
                look(file.getvalue())

    def test_bomb_in_a_chunk(self):
        file, info = io.BytesIO(), PngImagePlugin.PngInfo()
        info.add_text("note", "0" * (1 << 27), zip=True)
        noise(0).save(file, "PNG", pnginfo=info)
        with pytest.raises(image_files.UnreadableImage):
            image_files.decode(file.getvalue())

    def test_sixteen_bits(self):
        file = io.BytesIO()
        Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(file, "PNG")
        with pytest.raises(image_files.UnreadableImage, match="8 bits"):
            image_files.decode(file.getvalue())

    def test_formats_that_run_programs_are_not_opened(self):
        file = io.BytesIO()
        noise(0).save(file, "EPS")
        with pytest.raises(image_files.UnreadableImage, match="format"):
            image_files.decode(file.getvalue())


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A Hub cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def write_parquet(folder: pathlib.Path, rows: dict, features=None, split: str = "train"):
    import datasets

    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000.parquet")


def image_rows(count: int, many_sizes: bool = False) -> list[Image.Image]:
    return [noise(seed, width=8 + many_sizes * (seed % 3)) for seed in range(count)]


class TestHub:
    @pytest.fixture(autouse=True)
    def _cache(self, hub_cache):
        pass

    def features(self, label):
        import datasets

        return datasets.Features({"image": datasets.Image(), "label": label})

    def test_class_labels(self, tmp_path):
        import datasets

        features = self.features(datasets.ClassLabel(names=["ant", "bee"]))
        labels = [0] * 10 + [1] * 10
        write_parquet(tmp_path / "d", {"image": image_rows(20), "label": labels}, features)
        splits = {"train": "train[:75%]", "test": "train[75%:]"}
        found = open_dataset(f"hf:{tmp_path}/d", splits)
        assert [len(some) for some in found.values()] == [15, 5]
        train = found["train"]
        assert (train.name, train.class_names, train.image_shape) == (
            "d",
            ("ant", "bee"),
            (8, 8, 3),
        )
        order = np.random.RandomState(0).permutation(20)
        seen = [example for some in found.values() for example in some]
        for row, example in zip(order, seen, strict=True):
            assert np.array_equal(example["image"], np.asarray(noise(row)))
            assert example["label"] == labels[row]

    def test_integer_and_string_labels(self, tmp_path):
        for name, labels, names in (
            ("ints", [0, 2, 1, 2], ("0", "1", "2")),
            ("strings", ["b", "a", "c", "c"], ("a", "b", "c")),
        ):
            rows = {"image": image_rows(4, many_sizes=True), "label": labels}
            import datasets

            write_parquet(
                tmp_path / name,
                rows,
                self.features(datasets.Value("int64" if name == "ints" else "string")),
            )
            train = open_dataset(f"hf:{tmp_path}/{name}", {"train": "train"})["train"]
            assert train.class_names == names
            assert train.image_shape is None
            assert sorted(names[e["label"]] for e in train) == sorted(map(str, labels))

    def test_no_labels_names_the_columns(self, tmp_path):
        import datasets

        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        write_parquet(tmp_path / "d", {"image": image_rows(2), "text": ["a", "b"]}, features)
        fails(f"hf:{tmp_path}/d", {"train": "train"}, "no label column", "text (string)")
        found = open_dataset(f"hf:{tmp_path}/d", {"train": "train"}, label_column="text")
        assert found["train"].class_names == ("a", "b")

    def test_labels_outside_the_range(self, tmp_path):
        import datasets

        features = self.features(datasets.ClassLabel(names=["ant", "bee"]))
        for split, labels in {"train": [0, 1, 0], "test": [-1, 1, -1]}.items():
            rows = {"image": image_rows(3), "label": labels}
            write_parquet(tmp_path / "d", rows, features, split)
        splits = {"train": "train", "test": "test"}
        fails(f"hf:{tmp_path}/d", splits, "2 of 3 labels", "-1", "'test'")
        assert len(open_dataset(f"hf:{tmp_path}/d", {"train": "train"})["train"]) == 3

    def test_split_that_does_not_exist(self, tmp_path):
        import datasets

        features = self.features(datasets.ClassLabel(names=["ant"]))
        write_parquet(tmp_path / "d", {"image": image_rows(2), "label": [0, 0]}, features)
        fails(f"hf:{tmp_path}/d", {"train": "train", "test": "test"}, "'test'", "are: train.")

    def test_path_out_of_the_data_set(self, tmp_path):
        import datasets
        import pyarrow
        import pyarrow.parquet

        noise(0).save(tmp_path / "private.png")
        features = self.features(datasets.ClassLabel(names=["ant"]))
        image = [{"bytes": None, "path": str(tmp_path / "private.png")}]
        table = pyarrow.table({"image": image, "label": [0]}, schema=features.arrow_schema)
        (tmp_path / "d").mkdir()
        pyarrow.parquet.write_table(table, tmp_path / "d" / "train.parquet")
        fails(f"hf:{tmp_path}/d", {"train": "train"}, "Refused")

    def test_cached_data_set_is_found_offline(self, tmp_path, hub_cache):
        import datasets

        features = self.features(datasets.ClassLabel(names=["ant", "bee"]))
        write_parquet(tmp_path / "d", {"image": image_rows(2), "label": [0, 1]}, features)
        open_dataset(f"hf:{tmp_path}/d", {"train": "train"})
        (info,) = hub_cache.glob("d/*/*/*/dataset_info.json")
        # as the Hub's own data sets are cached: owner___name/config/version/commit
        target = hub_cache / "owner___name" / "default" / "0.0.0" / ("0" * 40)
        shutil.copytree(info.parent, target)
        (target / "d-train.arrow").rename(target / "name-train.arrow")
        found = open_dataset("hf:owner/name", {"train": "train"})["train"]
        assert found.class_names == ("ant", "bee")
        assert found.version == "0" * 40

    def test_not_cached_fails_at_once(self):
        start = time.monotonic()
        fails("hf:owner/nothing", {"train": "train"}, "hf:owner/nothing", "cannot be reached")
        assert time.monotonic() - start < 5

    def test_unreachable_hub_is_not_tried_again(self, monkeypatch):
        import datasets
        import huggingface_hub

        def refuse(*args, **kwargs):
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        start = time.monotonic()
        fails("hf:owner/nothing", {"train": "train"}, "cannot be reached")
        assert time.monotonic() - start < 5
        assert datasets.config.HF_HUB_OFFLINE is False
