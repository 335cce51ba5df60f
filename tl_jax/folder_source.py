"""A folder of image files, one sub-folder per class, as tables of images and labels.

Files are sorted by path before they are put in order, so that the file system has no say. Nothing
outside the folder is read.
"""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from tl_jax import image_files
from tl_jax.errors import NOT_UTF8, UserError, is_text, printable
from tl_jax.records import content, fingerprint
from tl_jax.table_source import Table, TableSource, listed, named_splits

log = logging.getLogger(__name__)

ADVICE = "Mend or remove them, or set data.skip_unreadable=True."
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


def folder_source(
    path: str, wanted: Sequence[str], skip_unreadable: bool, advice: str = ADVICE
) -> TableSource:
    """A folder with one sub-folder per class, or with train/, validation/ (val/), test/ of those.

    Args:
      path: the folder.
      wanted: split specifications; only the splits that they name are looked at.
      skip_unreadable: decode every file and leave out those that fail.
      advice: what to do about unreadable images.

    Raises:
      UserError: no such folder, no class folders, classes without images or unknown to the training
        split, symbolic links that leave the folder, names that are not UTF-8, unreadable images
        (all named).
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder:{path}: there is no such folder.")
    try:
        return _open(path, root.resolve(), wanted, skip_unreadable, advice)
    except OSError as error:
        raise UserError(f"folder:{path} cannot be read: {error}") from error


def _open(
    path: str, root: pathlib.Path, wanted: Sequence[str], skip_unreadable: bool, advice: str
) -> TableSource:
    _check_names([root])
    splits = _split_folders(root)
    named = named_splits(f"folder:{path}", wanted, splits)
    # Labels come from the training split, so that they do not depend on which splits are opened.
    class_names = _class_folders(splits.get("train", splits[named[0]]))
    files: dict[str, list[tuple[str, int]]] = {}
    problems: list[str] = []
    for split in named:
        files[split], found = _labelled_files(splits[split], root, class_names)
        problems += found
    if problems:
        raise UserError(f"folder:{path}: {listed(problems)}.")
    sizes, unreadable = _checked(root, files, skip_unreadable, advice)
    if emptied := [split for split, rows in files.items() if not rows]:
        raise UserError(f"folder:{path}: no image of {', '.join(emptied)} can be read.")
    tables = {split: _folder_table(root, rows) for split, rows in files.items()}
    return TableSource(
        name=root.name,
        version="",
        class_names=class_names,
        image_shape=image_files.common_shape(sizes),
        tables=tables,
        unreadable=unreadable,
    )


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split; one split "train" where the folder holds the classes itself."""
    folders = _subfolders(root)
    if links := [str(folder) for folder in folders if folder.is_symlink()]:
        raise UserError(f"Symbolic links to folders are refused: {listed(links)}.")
    if not any(folder.name in SPLIT_FOLDERS and _subfolders(folder) for folder in folders):
        return {"train": root}
    found: dict[str, pathlib.Path] = {}
    for folder in folders:
        split = SPLIT_FOLDERS.get(folder.name, folder.name)
        if split in found:
            raise UserError(f"{found[split]} and {folder} are the same split; keep one of them.")
        found[split] = folder
    return found


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    found = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return sorted(found, key=lambda path: path.name)


def _class_folders(folder: pathlib.Path) -> tuple[str, ...]:
    found = _subfolders(folder)
    _check_names(found)
    names = tuple(path.name for path in found)
    if not names:
        raise UserError(
            f"folder:{folder} holds no sub-folders, so its images have no labels; it must hold one "
            "sub-folder per class, or train/, validation/, test/ that do."
        )
    return names


def _check_names(folders: Sequence[pathlib.Path]) -> None:
    if wrong := [repr(str(folder)) for folder in folders if not is_text(str(folder))]:
        raise UserError(f"These folders have names that are {NOT_UTF8}: {listed(wrong)}.")


def _labelled_files(
    folder: pathlib.Path, root: pathlib.Path, class_names: tuple[str, ...]
) -> tuple[list[tuple[str, int]], list[str]]:
    """Image files (relative to `root`) with labels, sorted by path, and what is wrong with them."""
    rows: list[tuple[str, int]] = []
    problems: list[str] = []
    present = _subfolders(folder)
    if not present:
        problems.append(f"{folder} holds no class folders, so it has no labels")
    for path in present:
        if path.is_symlink():
            problems.append(f"{path} is a symbolic link to a folder")
            continue
        files, wrong = image_files.image_files(path, root)
        problems += wrong
        if path.name not in class_names:
            problems.append(f"{path} is a class that train does not have")
        elif not files:
            problems.append(f"{path} holds no image ({', '.join(image_files.SUFFIXES)})")
        else:
            label = class_names.index(path.name)
            rows += [(file, label) for file in files]
    return sorted(rows), problems


def _checked(
    root: pathlib.Path,
    files: dict[str, list[tuple[str, int]]],
    skip_unreadable: bool,
    advice: str,
) -> tuple[list[image_files.Header], int]:
    """Headers of all files, and how many are unreadable and were taken out of `files` in place.

    Raises:
      UserError: some are unreadable, and none is to be left out.
    """
    sizes: list[image_files.Header] = []
    unreadable: list[str] = []
    for rows in files.values():
        found = image_files.headers([root / file for file, _ in rows], whole=skip_unreadable)
        unreadable += [
            f"{root / file} ({error})"
            for (file, _), error in zip(rows, found, strict=True)
            if isinstance(error, image_files.UnreadableImage)
        ]
        good = [isinstance(item, image_files.Header) for item in found]
        rows[:] = [row for row, readable in zip(rows, good, strict=True) if readable]
        sizes += [item for item in found if isinstance(item, image_files.Header)]
    if unreadable and not skip_unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(unreadable) + len(sizes)} images in {root} cannot be read: "
            f"{listed(unreadable)}. {advice}"
        )
    if unreadable:
        names = printable(listed(unreadable))
        log.warning("%d unreadable images left out: %s", len(unreadable), names)
    return sizes, len(unreadable)


def _folder_table(root: pathlib.Path, rows: list[tuple[str, int]]) -> Table:
    import datasets

    paths = [str(root / path) for path, _ in rows]
    labels = np.array([label for _, label in rows], np.int64)
    identity = fingerprint([(path, label, content(root / path)) for path, label in rows])
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Table(datasets.Dataset.from_dict({"image": paths}, features), "image", labels, identity)
