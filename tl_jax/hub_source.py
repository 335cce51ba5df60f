"""Data sets of the Hugging Face Hub (or a folder of such files) as tables of images and labels.

Everything goes through `datasets`: its cache, its progress bars, its offline mode. Code that comes
with a data set is never run.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_jax import image_files
from tl_jax.errors import UserError
from tl_jax.records import content, fingerprint
from tl_jax.table_source import Table, TableSource, named_splits

TIMEOUT = 5.0  # seconds for the Hub to answer
CHUNK = 256  # images looked at together


def hub_source(
    name: str, wanted: Sequence[str], image_column: str | None, label_column: str | None
) -> TableSource:
    """A data set by its Hub id, or a folder with parquet files or a data set's repository in it.

    Args:
      name: "owner/name", "owner/name/config", or a folder beginning with "/", "." or "~".
      wanted: split specifications; only the splits that they name are opened.
      image_column: name of the image column, None to find it.
      label_column: name of the label column, None to find it. Its values may be class labels,
        integers from 0, or strings.

    Raises:
      UserError: not found, not reachable and not cached, no such configuration or split, no image
        or label column (the columns are named).
    """
    repo, version, splits, roots = _load(name)
    named = named_splits(f"hf:{name}", wanted, splits)
    features = splits[named[0]].features
    image, label = _columns(name, features, image_column, label_column)
    values = {
        split: splits[split].select_columns([label])[:][label]
        for split in dict.fromkeys((*named, *(s for s in splits if s == "train")))
    }
    class_names = _class_names(name, label, features[label], values)
    tables = {}
    for split in named:
        data = splits[split].select_columns([image])
        labels = _labels(values[split], features[label], class_names)
        rows = _undecoded(data, image)
        images = None if version else _contents(rows, image, roots)  # a commit says what they are
        identity = fingerprint(split, image, label, labels.tolist(), data.info.dataset_size, images)
        tables[split] = Table(rows, image, labels, identity, roots)
    return TableSource(repo, version, class_names, _shape(tables), tables)


def _contents(rows: Any, image: str, roots: Sequence[pathlib.Path]) -> list[str | None]:
    """Of the images of a local folder: SHA-256 of each."""
    found: list[str | None] = []
    for row in rows:
        cell = row[image]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            found.append(None)
        elif cell["bytes"] is None:
            path = pathlib.Path(cell["path"])
            inside = any(path.resolve().is_relative_to(root.resolve()) for root in roots)
            found.append(content(path) if inside and path.is_file() else None)
        else:
            found.append(hashlib.sha256(cell["bytes"]).hexdigest())
    return found


def _load(name: str) -> tuple[str, str, Any, tuple[pathlib.Path, ...]]:
    """Name, commit, splits, and the folders of a data set, downloaded if need be."""
    import datasets
    from huggingface_hub import constants, errors

    if name.startswith(("/", ".", "~")):
        folder = pathlib.Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"hf:{name}: there is no such folder.")
        repo, config, label = str(folder), None, folder.resolve().name
    else:
        match name.split("/"):
            case [owner, short, *rest] if owner and short and len(rest) < 2:
                repo, config, label = f"{owner}/{short}", rest[0] if rest else None, name
            case _:
                raise UserError(f"hf:{name}: write hf:owner/name, or hf:owner/name/config.")
    unreachable = _unreachable(repo)
    before = datasets.config.HF_HUB_OFFLINE
    try:
        # `datasets` alone would try for half a minute before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = unreachable is not None
        builder = datasets.load_dataset_builder(repo, config)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except (ConnectionError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"hf:{name} is not in the cache {datasets.config.HF_DATASETS_CACHE} and the Hub cannot "
            f"be reached ({unreachable or error}). Connect, or copy the cache from a machine that "
            f"has it, or download it elsewhere (`hf download {repo} --repo-type dataset "
            "--local-dir FOLDER`) and use hf:/path/to/FOLDER."
        ) from error
    except Exception as error:  # what a builder raises depends on the files it meets
        reason = error.__cause__ or error
        raise UserError(f"hf:{name} cannot be opened: {str(reason) or repr(reason)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    if config is None and pathlib.Path(repo).is_dir():
        return label, "", splits, (pathlib.Path(repo).resolve(),)
    caches = (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return label, str(builder.hash or ""), splits, tuple(pathlib.Path(c).resolve() for c in caches)


def _unreachable(repo: str) -> str | None:
    """Why the Hub does not answer, None when it does or is not needed."""
    import datasets
    import huggingface_hub
    from huggingface_hub import errors

    if pathlib.Path(repo).is_dir():
        return None
    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode is set"
    try:
        huggingface_hub.HfApi().dataset_info(repo, timeout=TIMEOUT)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return None  # it answered, and `datasets` says better what is wrong
    except Exception as error:  # the HTTP library, and so its errors, differs between versions
        return str(error) or repr(error)
    return None


def _columns(
    name: str, features: Any, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Names of the image and the label column: as asked for, as usual, or the only one."""
    import datasets

    def holds_labels(feature: Any) -> bool:
        dtype = getattr(feature, "dtype", "")
        return isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value) and ("int" in dtype or "string" in dtype)
        )

    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in features.items() if holds_labels(feature)]
    classes = [key for key in labels if isinstance(features[key], datasets.ClassLabel)]
    image = _choose(image_column, images, ("image", "img"), images)
    label = _choose(label_column, labels, ("label", "labels"), classes)
    problems = [
        f"no {kind} column" + (f" {asked!r}" if asked else "")
        for kind, asked, found in (("image", image_column, image), ("label", label_column, label))
        if found is None
    ]
    if image is None or label is None:
        kinds = {
            key: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
            for key, feature in features.items()
        }
        listing = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
        raise UserError(f"hf:{name} has {' and '.join(problems)}; its columns are: {listing}.")
    return image, label


def _choose(
    asked: str | None, fitting: list[str], usual: tuple[str, ...], sole: list[str]
) -> str | None:
    if asked is not None:
        return asked if asked in fitting else None
    for key in usual:
        if key in fitting:
            return key
    return sole[0] if len(sole) == 1 else None


def _class_names(
    name: str, column: str, feature: Any, values: dict[str, list[Any]]
) -> tuple[str, ...]:
    """The names of a ClassLabel, else the sorted strings or 0..maximum, of the training split."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    found = values.get("train") or [value for some in values.values() for value in some]
    distinct = set(found) - {None}
    if not distinct:
        raise UserError(f"hf:{name}: the label column {column!r} is empty.")
    if "string" in feature.dtype:
        return tuple(sorted(distinct))
    return tuple(str(label) for label in range(max(distinct) + 1))


def _labels(values: list[Any], feature: Any, class_names: tuple[str, ...]) -> np.ndarray:
    """Labels int64; what is missing or unknown becomes -1, which no split may use."""
    import datasets

    if not isinstance(feature, datasets.ClassLabel) and "string" in feature.dtype:
        number = {name: label for label, name in enumerate(class_names)}
        return np.array([number.get(value, -1) for value in values], np.int64)
    return np.array([-1 if value is None else value for value in values], np.int64)


def _undecoded(data: Any, column: str) -> Any:
    import datasets

    return data.cast_column(column, datasets.Image(decode=False))


def _shape(tables: dict[str, Table]) -> tuple[int, int, int] | None:
    """The one shape of all images; looking stops where a second size is met."""
    seen: set[image_files.Header] = set()
    for table in tables.values():
        for start in range(0, len(table), CHUNK):
            found = image_files.headers(table.encoded(slice(start, start + CHUNK)))
            seen.update(item for item in found if isinstance(item, image_files.Header))
            if image_files.common_shape(seen) is None:
                return None
    return image_files.common_shape(seen)
