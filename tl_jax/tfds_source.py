"""A prepared TensorFlow Datasets folder (array_record) as a source of encoded images and labels.

Nothing here needs or imports TensorFlow: records are parsed as protocol buffers, and images decoded
by PIL.
"""

import os
from collections.abc import Sequence
from typing import Any

from tl_jax.errors import UserError
from tl_jax.records import Record, Section, content, fingerprint


class TfdsSource:
    """The splits of one TFDS data set.

    Attributes:
      name: data set, with its configuration where it has one.
      version: as in its metadata.
      split_sizes: number of examples by split.
      class_names: of the label feature.
      image_shape: (height, width, channels) where the image feature fixes them, else None.
    """

    unreadable = 0  # none is left out

    def __init__(
        self, name: str, data_dir: str | None, image_column: str | None, label_column: str | None
    ):
        builder = _prepared(name, data_dir)
        self._builder = builder
        info = builder.info
        self.name = f"{info.name}/{info.config_name}" if info.config_name else info.name
        self.version = str(info.version)
        self.split_sizes = {split: int(i.num_examples) for split, i in info.splits.items()}
        self._image, self._label = _columns(name, info, image_column, label_column)
        self.class_names = tuple(info.features[self._label].names)
        shape = tuple(info.features[self._image].shape)
        self.image_shape = None if None in shape else (*shape[:2], 1 if shape[2] == 1 else 3)

    def sections(self, split: str) -> list[Section]:
        """What a split specification such as "train[:90%]" selects, in order.

        Raises:
          ValueError: it cannot be parsed, or names a split that does not exist.
        """
        import tensorflow_datasets as tfds

        instruction = tfds.core.splits.AbstractSplit.from_spec(split)
        try:
            found = instruction.to_absolute(self._builder.info.splits)
        except KeyError as error:  # shard slicing looks splits up without checking
            raise ValueError(str(error)) from error
        whole = self.split_sizes
        return [
            Section(
                part.splitname,
                part.from_ or 0,
                whole[part.splitname] if part.to is None else part.to,
            )
            for part in found
        ]

    def records(self, split: str) -> "TfdsRecords":
        """Random access to the encoded examples that a split specification selects."""
        import tensorflow_datasets as tfds

        try:
            source = self._builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            raise UserError(
                f"The split {split!r} of tfds:{self.name} in {self._builder.data_dir} cannot be "
                f"read: {error}"
            ) from error
        return TfdsRecords(source, self._image, self._label, f"tfds:{self.name} {split}")

    def fingerprint(self, split: str) -> str:
        """SHA-256 over name, version, split, columns, class names, and contents of the shards."""
        shards = []
        for section in self.sections(split):
            for path in self._builder.info.splits[section.split].filepaths:
                shards.append((path.name, content(path) if path.exists() else None))
        return fingerprint(
            "tfds",
            self.name,
            self.version,
            self.sections(split),
            self._image,
            self._label,
            self.class_names,
            shards,
        )


class TfdsRecords:
    """Records of one split, read and parsed in batches."""

    def __init__(self, source: Any, image: str, label: str, where: str):
        self._source, self._image, self._label, self._where = source, image, label, where

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The examples at `indices`, in their order.

        Raises:
          UserError: a shard is missing, truncated or damaged.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        indices = [int(index) for index in indices]
        records = []
        try:
            for index, raw in zip(indices, self._source.__getitems__(indices), strict=True):
                feature = tf_example_pb2.Example.FromString(raw).features.feature
                encoded = feature[self._image].bytes_list.value[0]
                label = feature[self._label].int64_list.value[0]
                records.append(Record(encoded, label, f"{self._where} example {index}"))
        except Exception as error:  # absl status, protobuf and index errors share no base class
            raise UserError(
                f"{self._where}: its records cannot be read ({error}). The files are damaged or "
                "incomplete; delete them and prepare the data set again."
            ) from error
        return records


def _prepared(name: str, data_dir: str | None) -> Any:
    """The builder of a data set on disk; prepares it in a process of its own where it is missing.

    Raises:
      UserError: it is not there and could not be prepared, or is there in
        another file format.
    """
    builder = _find(name, data_dir)
    if builder is None:
        from tl_jax.prepare import prepare_in_subprocess

        missing = data_dir is not None and not os.path.isdir(os.path.expanduser(data_dir))
        try:
            prepare_in_subprocess(name, data_dir)
        except UserError as error:
            if not missing:
                raise
            raise UserError(f"config.data.dir: there is no folder {data_dir}. {error}") from error
        builder = _find(name, data_dir)
    if builder is None:
        raise UserError(f"tfds:{name} is not in {data_dir} although it was prepared there.")
    return builder


def _find(name: str, data_dir: str | None) -> Any | None:
    # Looking for files first and only: TFDS itself would try the network for minutes.
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # a bad name, damaged metadata, a file system that is not there
        raise UserError(
            f"tfds:{name} in {data_dir or 'the default folder'} cannot be opened: "
            f"{type(error).__name__}: {error}. If its files are damaged, delete them and prepare "
            "the data set again."
        ) from error
    found = builder.info.file_format
    if found is None or found.value != "array_record":
        try:
            return read_only_builder.builder_from_directory(
                builder.data_dir, file_format="array_record"
            )
        except ValueError as error:
            raise UserError(
                f"tfds:{name} is prepared in {builder.data_dir} as {found.value if found else '?'};"
                " reading it needs array_record. Name another folder as data.dir, and it is "
                "prepared there."
            ) from error
    return builder


def _columns(
    name: str, info: Any, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Names of the image and the label feature: as asked for, as supervised, or the only one."""
    import tensorflow_datasets as tfds

    supervised = info.supervised_keys if len(info.supervised_keys or ()) == 2 else (None, None)
    chosen: list[str] = []
    problems = []
    for kind, cls, asked, usual in (
        ("image", tfds.features.Image, image_column, supervised[0]),
        ("label", tfds.features.ClassLabel, label_column, supervised[1]),
    ):
        fitting = [key for key, feature in info.features.items() if type(feature) is cls]
        key = asked or next((k for k in (usual, kind) if k in fitting), None)
        if key is None and len(fitting) == 1:
            key = fitting[0]
        if key is not None and key in fitting:
            chosen.append(key)
        else:
            problems.append(
                f"no feature {asked!r} that is {cls.__name__}" if asked else f"no {kind} feature"
            )
    if not problems and info.features[chosen[0]].np_dtype != "uint8":
        problems.append(f"images of {info.features[chosen[0]].np_dtype}, not uint8,")
    if problems:
        listing = ", ".join(f"{key} ({type(f).__name__})" for key, f in info.features.items())
        raise UserError(f"tfds:{name} has {' and '.join(problems)}; its features are: {listing}.")
    return chosen[0], chosen[1]
