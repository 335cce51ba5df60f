"""TFDS data sets, splits and source strings: what they hold, and what they say of bad input."""

import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from image_fixtures import DIGITS_DIR, DIGITS_SPLITS, ROOT, fails

from tl_jax.datasets import open_dataset


def digits(splits=None):
    return open_dataset("tfds:digits", splits or DIGITS_SPLITS, DIGITS_DIR)


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
        for shard in (tmp_path / "copy").rglob("*digits-train*"):
            held = bytearray(shard.read_bytes())
            held[len(held) // 2] ^= 1
            shard.write_bytes(held)
        changed = open_dataset("tfds:digits", DIGITS_SPLITS, str(tmp_path / "copy"))
        assert one["train"].fingerprint != changed["train"].fingerprint

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

    def test_missing_data_set_is_prepared_once(self, tmp_path, monkeypatch):
        asked = []

        def prepare(name, data_dir):
            asked.append((name, data_dir))
            shutil.copytree(ROOT / "quickstart" / "data", data_dir, dirs_exist_ok=True)

        module = types.ModuleType("tl_jax.prepare")
        module.prepare_in_subprocess = prepare
        monkeypatch.setitem(sys.modules, "tl_jax.prepare", module)
        for _ in range(2):
            assert len(open_dataset("tfds:digits", {"train": "train"}, str(tmp_path))["train"])
        assert asked == [("digits", str(tmp_path))]

    def test_a_folder_that_is_not_there_is_said(self, tmp_path):
        missing = tmp_path / "none"
        words = [f"config.data.dir: there is no folder {missing}. TFDS knows no data set 'digits'"]
        fails("tfds:digits", {"train": "train"}, *words, data_dir=str(missing))

    def test_other_file_format(self, tmp_path):
        shutil.copytree(ROOT / "quickstart" / "data", tmp_path / "data")
        info = tmp_path / "data" / "digits" / "1.0.0" / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        fails("tfds:digits", {"train": "train"}, "tfrecord", data_dir=str(tmp_path / "data"))

    def test_file_system_that_does_not_exist(self):
        fails("tfds:digits", {"train": "train"}, "nowhere", data_dir="nowhere://data")

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
