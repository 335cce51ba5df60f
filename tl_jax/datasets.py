"""A source string → random access to examples, by split, with class names.

| source | what it is |
|---|---|
| `tfds:NAME`, `tfds:NAME/CONFIG` | a TensorFlow Datasets folder in array_record format |
| `hf:owner/name`, `hf:owner/name/config` | a data set of the Hugging Face Hub |
| `folder:/path` | one sub-folder per class, or train/, validation/, test/ holding such folders |

Splits are written as in TensorFlow Datasets: `train`, `train[:90%]`, `train[1000:2000]`, `a+b`.
`hf:` and `folder:` data often lie class by class; they are put into one fixed, seeded order before
slicing, so that every slice is a sample of all classes.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from tl_jax import image_files
from tl_jax.errors import UserError
from tl_jax.records import Record, Records, Section, Source

KINDS = ("tfds", "hf", "folder")


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one split, decoded when they are asked for; safe to use from many threads.

    `examples[i]` is {"image", "label"}: uint8 [h, w, c] where `image_shape` is known, else an
    upright PIL image of any size and mode; the label is an int, 0 ≤ label < len(class_names).
    Both it and `get` raise UserError for an image that cannot be decoded, naming it.

    Attributes:
      name: of the data set.
      version: of the data set, "" where it has none.
      split: as it was asked for.
      class_names: by label.
      image_shape: (height, width, channels) of all images, None when they have many sizes.
      fingerprint: SHA-256 of what identifies these examples: names, labels and contents (of files
        beyond 64 MiB 16 pieces; of a data set of the Hub its commit).
      unreadable: images of the data set that were left out since they cannot be read.
      drawn_from: fingerprint of the split that these were drawn from, None where they are all.
    """

    name: str
    version: str
    split: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    fingerprint: str
    records: Records = dataclasses.field(repr=False)
    unreadable: int = 0
    drawn_from: str | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self.get([number % len(self)])[0]

    def get(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several examples at once, read together."""
        return [self._decoded(record) for record in self.records.read(indices)]

    def _decoded(self, record: Record) -> dict[str, Any]:
        if not 0 <= record.label < len(self.class_names):
            raise UserError(
                f"{record.where} has label {record.label}, outside 0..{len(self.class_names) - 1}. "
                "A split without labels (often the test split) cannot be used."
            )
        try:
            image = image_files.decode(record.image)
        except image_files.UnreadableImage as error:
            raise UserError(
                f"{record.where} cannot be decoded: {error}. Mend or remove it; for a folder, "
                "data.skip_unreadable=True leaves such files out."
            ) from error
        if self.image_shape is None:
            return {"image": image, "label": record.label}
        height, width, channels = self.image_shape
        if image.size != (width, height):
            raise UserError(
                f"{record.where} is {image.height}x{image.width} pixels, "
                f"but the data set says {height}x{width}."
            )
        mode = "L" if channels == 1 else "RGB"
        array = np.asarray(image if image.mode == mode else image.convert(mode))
        return {"image": array.reshape(self.image_shape), "label": record.label}


def open_dataset(
    source: str,
    splits: Mapping[str, str | None],
    data_dir: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_unreadable: bool = False,
) -> dict[str, Examples]:
    """Opens the splits of a data set; nothing is decoded yet.

    Args:
      source: `tfds:…`, `hf:…` or `folder:…`.
      splits: by role ("train", "validation", "test"), a split specification; None leaves it out.
      data_dir: TensorFlow Datasets' folder (anything epath knows), None for its default.
      image_column: name of the image feature, None to find it.
      label_column: name of the label feature, None to find it.
      skip_unreadable: for `folder:`, decode every file once and leave out those that fail.

    Returns:
      Examples by role.

    Raises:
      UserError: the data set cannot be found, read or prepared; it has no labels; a split does not
        exist, is empty, or shares examples with the training split; a folder's images cannot be
        read.
    """
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        raise UserError(
            f"data.source is {source!r}; it must be tfds:NAME, hf:owner/name or folder:/path."
        )
    wanted = {role: split for role, split in splits.items() if split is not None}
    if not wanted:
        raise UserError("data.splits names no split; at least `train` is needed.")
    opened: Source
    if kind == "tfds":
        from tl_jax.tfds_source import TfdsSource

        opened = TfdsSource(rest, data_dir, image_column, label_column)
    elif kind == "hf":
        from tl_jax.hub_source import hub_source

        opened = hub_source(rest, tuple(wanted.values()), image_column, label_column)
    else:
        from tl_jax.folder_source import folder_source

        opened = folder_source(rest, tuple(wanted.values()), skip_unreadable)
    _check_splits(source, opened, wanted)
    examples = {
        role: Examples(
            name=opened.name,
            version=opened.version,
            split=split,
            class_names=opened.class_names,
            image_shape=opened.image_shape,
            fingerprint=opened.fingerprint(split),
            records=opened.records(split),
            unreadable=opened.unreadable,
        )
        for role, split in wanted.items()
    }
    for some in examples.values():
        some[0]  # fails now rather than in the middle of the first epoch
    return examples


def _check_splits(source: str, opened: Source, wanted: Mapping[str, str]) -> None:
    """All problems with split specifications, in one error."""
    problems: list[str] = []
    sections: dict[str, list[Section]] = {}
    for role, split in wanted.items():
        try:
            sections[role] = opened.sections(split)
        except (ValueError, AssertionError) as error:
            problems.append(f"{role} = {split!r}: {str(error).rstrip('.')}")
            continue
        if not any(section.start < section.stop for section in sections[role]):
            problems.append(f"{role} = {split!r} selects no example")
    for role in sections.keys() - {"train"}:
        shared = sum(_shared(a, b) for a in sections.get("train", ()) for b in sections[role])
        if shared:
            problems.append(
                f"{role} = {wanted[role]!r} and train = {wanted['train']!r} share {shared} "
                f"example{'s' if shared > 1 else ''}"
            )
    if problems:
        sizes = ", ".join(f"{name} ({size})" for name, size in opened.split_sizes.items())
        raise UserError(
            f"data.splits of {source}: {'; '.join(problems)}. "
            f"Its splits (and their examples): {sizes}."
        )


def _shared(a: Section, b: Section) -> int:
    """Number of examples in both sections."""
    return max(0, min(a.stop, b.stop) - max(a.start, b.start)) if a.split == b.split else 0
