"""A raw data set → a folder that TensorFlow Datasets reads (array_record), without TensorFlow."""

import json
import os
import pathlib
import shutil
import uuid
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl_jax.errors import UserError
from tl_jax.raw_datasets import RawDataset, RawSplit

SHARD_BYTES = 1 << 29
SOURCE = "source.json"  # beside TFDS's own files: what the data set was made from
FEATURES = ({"image", "label"}, {"image", "image/filename", "label"})


def tfds_builder(name: str, root: pathlib.Path) -> Any | None:
    """TFDS's own builder of that name, with which `tfds.data_source` reads the files, or None.

    Raises:
      UserError: the name is TFDS's, but its builder cannot be made.
    """
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(name)
    except tfds.core.registered.DatasetNotFoundError:
        return None
    try:
        return tfds.builder(name, data_dir=str(root))
    except Exception as error:  # builders with configurations, or with imports that are not here
        raise UserError(f"{_taken(name)}, which cannot be made here ({error}).") from error


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether the folder holds a data set that TFDS can read without TensorFlow.

    Raises:
      UserError: it holds one in another file format.
    """
    if not (folder / "dataset_info.json").exists():
        return False
    if not any(folder.glob("*array_record*")):
        raise UserError(
            f"{folder} holds a data set in another file format than array_record. Remove it, or "
            "choose another --data-dir."
        )
    return True


def write_once(
    raw: RawDataset, name: str, builder: Any | None, final: pathlib.Path
) -> pathlib.Path:
    """Writes the data set beside `final` and renames it, unless an equal one is already there.

    Args:
      raw: what to write.
      name: of the data set.
      builder: TFDS's own of that name, which rules its features; None gives it `raw`'s.
      final: data directory / name / version.

    Raises:
      UserError: another data set is there, or TFDS has another one of that name.
    """
    features = _features(raw, name, builder)
    for note in raw.notes:
        print(note)
    if is_prepared(final):
        _check_equal(raw, final)
        print(f"The same data set is already prepared in {final}")
        return final
    if final.exists():
        raise UserError(f"{final} is in the way and is no TFDS data set; move it away.")
    side = final.with_name(f"incomplete.{uuid.uuid4().hex}_{final.name}")
    side.mkdir(parents=True)
    try:
        _write(raw, name, builder, features, side, final)
        try:
            side.rename(final)
        except OSError:
            if not is_prepared(final):  # else another process was faster
                raise
    finally:
        shutil.rmtree(side, ignore_errors=True)
    sizes = ", ".join(f"{split.size:,} {key}" for key, split in raw.splits.items())
    print(f"Prepared {name} ({sizes}; {len(raw.class_names)} classes) in {final}")
    return final


def _features(raw: RawDataset, name: str, builder: Any | None) -> Any:
    """The features to declare.

    Raises:
      UserError: TFDS has a data set of that name, and this is another one.
    """
    import tensorflow_datasets as tfds

    if builder is None:
        return {
            "image": tfds.features.Image(shape=raw.image_shape),
            "label": tfds.features.ClassLabel(names=raw.class_names),
        }
    features = builder.info.features
    if set(features) not in FEATURES:
        raise UserError(f"{_taken(name)} with the features {', '.join(features)}.")
    problems = []
    names = tuple(features["label"].names)
    numbered = tuple(map(str, range(len(raw.class_names)))) == raw.class_names
    if not (numbered and len(names) >= len(raw.class_names)) and names != raw.class_names:
        problems.append(f"classes {', '.join(names)}, not {', '.join(raw.class_names)}")
    shape = features["image"].shape
    if any(s is not None and s != r for s, r in zip(shape, raw.image_shape, strict=True)):
        problems.append(f"images of shape {shape}, not {raw.image_shape}")
    if problems:
        raise UserError(f"{_taken(name)} with {' and '.join(problems)}.")
    return features


def _taken(name: str) -> str:
    return f"{name} is the name of one of TFDS's own data sets; name yours otherwise. TFDS has one"


def _write(
    raw: RawDataset,
    name: str,
    builder: Any | None,
    features: Any,
    side: pathlib.Path,
    final: pathlib.Path,
) -> None:
    import tensorflow_datasets as tfds

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    infos = []
    with Progress(*columns) as progress:
        for split_name, split in raw.splits.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=side,
                dataset_name=name,
                split=split_name,
                filetype_suffix="array_record",
            )
            task = progress.add_task(f"{name} {split_name}", total=split.size)
            lengths, nbytes = _write_split(
                split, template, set(features), lambda task=task: progress.advance(task)
            )
            infos.append(
                tfds.core.SplitInfo(
                    name=split_name,
                    shard_lengths=lengths,
                    num_bytes=nbytes,
                    filename_template=template,
                )
            )
    described = builder.info if builder else None
    tfds.folder_dataset.write_metadata(
        data_dir=str(side),
        features=features,
        split_infos=infos,
        version=final.name,
        check_data=False,
        supervised_keys=("image", "label"),
        description=described.description if described else name,
        homepage=described.homepage if described else None,
        citation=described.citation if described else None,
    )
    source = {"sha256": raw.sha256, "by": "tl_jax.prepare"}
    (side / SOURCE).write_text(json.dumps(source), "utf-8")


def _write_split(
    split: RawSplit, template: Any, features: set[str], advance: Any
) -> tuple[list[int], int]:
    """Writes the shards of one split; returns their lengths and the bytes of all examples."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    shards = min(split.size, 1 + split.nbytes // SHARD_BYTES)
    lengths = [split.size * (i + 1) // shards - split.size * i // shards for i in range(shards)]
    examples = split.examples()
    nbytes = 0
    for shard, length in enumerate(lengths):
        path = template.sharded_filepath(shard_index=shard, num_shards=shards)
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        try:
            for _ in range(length):
                item = next(examples)
                example = tf_example_pb2.Example()
                feature = example.features.feature
                feature["image"].bytes_list.value.append(item.image)
                feature["label"].int64_list.value.append(item.label)
                if "image/filename" in features:
                    feature["image/filename"].bytes_list.value.append(item.filename.encode())
                record = example.SerializeToString()
                nbytes += len(record)
                writer.write(record)
                advance()
        finally:
            writer.close()
    return lengths, nbytes


def _check_equal(raw: RawDataset, folder: pathlib.Path) -> None:
    try:
        known = json.loads((folder / SOURCE).read_bytes())["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        known = None
    if known == raw.sha256:
        return
    found = "made from other files" if known else "not made by this command"
    raise UserError(
        f"{folder} already holds a data set of that name, {found}. Remove that folder to replace "
        "it, or choose another name or --data-dir."
    )
