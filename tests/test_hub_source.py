"""Data sets of the Hub: columns, labels, cache, offline, and what is refused."""

import pathlib
import shutil
import time

import numpy as np
import pytest
from image_fixtures import fails, noise
from PIL import Image

from tl_jax.datasets import open_dataset


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


@pytest.fixture(autouse=True)
def _cache(hub_cache):
    pass


def image_features(label):
    import datasets

    return datasets.Features({"image": datasets.Image(), "label": label})


def test_class_labels(tmp_path):
    import datasets

    features = image_features(datasets.ClassLabel(names=["ant", "bee"]))
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


def test_fingerprint_sees_bytes(tmp_path):
    """Other images in a folder of the same name, labels and sizes are other data."""

    def written(folder, last):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[-1, -1] = last
        pathlib.Path(folder).mkdir()
        rows = {"image": [Image.fromarray(pixels)] * 4, "label": [0, 1] * 2}
        write_parquet(folder / "d", rows)
        return open_dataset(f"hf:{folder}/d", {"train": "train"})["train"].fingerprint

    first = written(tmp_path / "one", 1)
    assert first == written(tmp_path / "same", 1)
    assert first != written(tmp_path / "other", 2)


def test_integer_and_string_labels(tmp_path):
    for name, labels, names in (
        ("ints", [0, 2, 1, 2], ("0", "1", "2")),
        ("strings", ["b", "a", "c", "c"], ("a", "b", "c")),
    ):
        rows = {"image": image_rows(4, many_sizes=True), "label": labels}
        import datasets

        write_parquet(
            tmp_path / name,
            rows,
            image_features(datasets.Value("int64" if name == "ints" else "string")),
        )
        train = open_dataset(f"hf:{tmp_path}/{name}", {"train": "train"})["train"]
        assert train.class_names == names
        assert train.image_shape is None
        assert sorted(names[e["label"]] for e in train) == sorted(map(str, labels))


def test_no_labels_names_the_columns(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    write_parquet(tmp_path / "d", {"image": image_rows(2), "text": ["a", "b"]}, features)
    fails(f"hf:{tmp_path}/d", {"train": "train"}, "no label column", "text (string)")
    found = open_dataset(f"hf:{tmp_path}/d", {"train": "train"}, label_column="text")
    assert found["train"].class_names == ("a", "b")


def test_labels_outside_the_range(tmp_path):
    import datasets

    features = image_features(datasets.ClassLabel(names=["ant", "bee"]))
    for split, labels in {"train": [0, 1, 0], "test": [-1, 1, -1]}.items():
        rows = {"image": image_rows(3), "label": labels}
        write_parquet(tmp_path / "d", rows, features, split)
    splits = {"train": "train", "test": "test"}
    fails(f"hf:{tmp_path}/d", splits, "2 of 3 labels", "-1", "'test'")
    assert len(open_dataset(f"hf:{tmp_path}/d", {"train": "train"})["train"]) == 3


def test_split_that_does_not_exist(tmp_path):
    import datasets

    features = image_features(datasets.ClassLabel(names=["ant"]))
    write_parquet(tmp_path / "d", {"image": image_rows(2), "label": [0, 0]}, features)
    fails(f"hf:{tmp_path}/d", {"train": "train", "test": "test"}, "'test'", "are: train.")


def test_path_out_of_the_data_set(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    noise(0).save(tmp_path / "private.png")
    features = image_features(datasets.ClassLabel(names=["ant"]))
    image = [{"bytes": None, "path": str(tmp_path / "private.png")}]
    table = pyarrow.table({"image": image, "label": [0]}, schema=features.arrow_schema)
    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "d" / "train.parquet")
    fails(f"hf:{tmp_path}/d", {"train": "train"}, "Refused")


def test_cached_data_set_is_found_offline(tmp_path, hub_cache):
    import datasets

    features = image_features(datasets.ClassLabel(names=["ant", "bee"]))
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


def test_not_cached_fails_at_once():
    start = time.monotonic()
    fails("hf:owner/nothing", {"train": "train"}, "hf:owner/nothing", "cannot be reached")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["json", "a/", "a/b/c/d", "/nothing/here"])
def test_names_that_are_refused(name):
    fails(f"hf:{name}", {"train": "train"}, f"hf:{name}")


def test_damaged_parquet(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1")
    fails(f"hf:{tmp_path}/d", {"train": "train"}, "cannot be opened")


def test_unreachable_hub_is_not_tried_again(monkeypatch):
    import datasets
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    start = time.monotonic()
    fails("hf:owner/nothing", {"train": "train"}, "cannot be reached (no route)")
    assert time.monotonic() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is False
