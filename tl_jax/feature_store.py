"""Activations of a split on disk: memory-mapped safetensors shards.

A cache is one folder: `manifest.json` (what it holds, and bytes and CRC-32 of every file) and
shards `00000.safetensors` … with the leaves of equally many rows each. It is written under a side
name and then renamed, so that it is there whole or not at all; what a crash of the disk left of it
is found by size or checksum, and made again. A lock lets one process write it while others wait.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tl_jax import cache_folder, tensor_files
from tl_jax.errors import DAMAGE, UserError
from tl_jax.feature_rows import ActivationRows, Layout, Leaves, Produce

SHARD_BYTES = 64 * 2**20
_LABELS = "labels.safetensors"
_SHARD = r"[0-9]{5,}\.safetensors"  # of a shard's file
log = logging.getLogger(__name__)


def on_disk(
    folder: str | os.PathLike[str],
    key: Mapping[str, Any],
    layout: Layout,
    produce: Produce,
    limit_bytes: float,
    about: str,
) -> ActivationRows:
    """The rows in a cache on disk; made if it is not there or damaged.

    Args:
      folder: of all caches.
      key: everything that the rows depend on, as JSON.
      layout: what it will hold.
      produce: gives the rows.
      limit_bytes: what all caches in the folder may take together.
      about: what it holds, for people.

    Raises:
      NoRoom: it would not fit into the limit, or the folder cannot be used.
    """
    if (rows := find(folder, key, layout, quiet=True)) is not None:  # also where none may write
        return rows
    with cache_folder.usable(folder) as root:
        path = root / name_of(key)
        with cache_folder.lock(root, path.name, about):
            if (rows := find(root, key, layout)) is not None:
                return rows
            cache_folder.remove(path)
            side = cache_folder.reserve(path, layout.nbytes, limit_bytes, about)
            try:
                _write(side, path, key, layout, produce, about)
            except BaseException:
                with contextlib.suppress(OSError):
                    cache_folder.remove(side)
                raise
    rows = find(root, key, layout)
    if rows is None:
        raise cache_folder.NoRoom(
            f"config.cache_dir: what was just written to {path} cannot be read back"
        )
    return rows


def check_room(
    folder: str | os.PathLike[str],
    caches: Sequence[tuple[Mapping[str, Any], Layout]],
    limit_bytes: float,
    about: str,
) -> None:
    """Refuses caches for which there is no room, before the first of them is computed.

    Args:
      folder: of all caches.
      caches: key and layout of each; those that are there need no room.
      limit_bytes: what all caches in the folder may take together.
      about: what they hold, for people.

    Raises:
      NoRoom: they would not fit into the limit or on the disk, or the folder cannot be used.
    """
    root = cache_folder.root_of(folder)
    sizes = {name_of(key): layout.nbytes for key, layout in caches}
    missing = {n: size for n, size in sizes.items() if not cache_folder.is_there(root / n)}
    if missing:
        with cache_folder.usable(folder) as root:
            cache_folder.check_room(root, missing, limit_bytes, about)


def name_of(key: Mapping[str, Any]) -> str:
    """Name of the folder of the cache with this key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def find(
    folder: str | os.PathLike[str], key: Mapping[str, Any], layout: Layout, *, quiet: bool = False
) -> ActivationRows | None:
    """The rows of a cache that is there and whole, memory-mapped; else None (why is logged)."""
    path = cache_folder.root_of(folder) / name_of(key)
    if not cache_folder.is_there(path):
        return None
    try:
        manifest = json.loads(_regular(path / cache_folder.MANIFEST).read_bytes())
        if manifest["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is another cache's")
        for name, facts in manifest["files"].items():
            if name != _LABELS and not re.fullmatch(_SHARD, name):
                raise ValueError(f"{name!r} is no file of a cache")
            content = np.memmap(_regular(path / name), np.uint8, "r")
            if content.size != facts["bytes"] or zlib.crc32(content.data) != facts["crc32"]:
                raise ValueError(f"{name} is not as it was written")
        names = sorted(manifest["files"].keys() - {_LABELS})
        shards = []
        for name in names:
            tensors = tensor_files.read_safetensors(path / name)
            shards.append([tensors[str(i)].read() for i in range(len(tensors))])
        labels = tensor_files.read_safetensors(path / _LABELS)["labels"].read()
        _check_rows(layout, shards, labels)
        seconds = float(manifest["seconds"])
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"it took {seconds} s")
    except (*DAMAGE, UserError) as error:
        if not quiet:
            log.warning("the cache %s is damaged (%s): making it again", path, error)
        return None
    with contextlib.suppress(OSError):  # it is another user's
        os.utime(path)
    return ActivationRows(layout.name, shards, layout.structure, labels, seconds)


def _regular(path: Path) -> Path:
    """The path of a file in a cache, which is neither a link out of it nor a pipe."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is no file")
    return path


def _check_rows(layout: Layout, shards: Sequence[Leaves], labels: np.ndarray) -> None:
    """What a cache holds has the shapes and dtypes that were asked for.

    Raises:
      ValueError: it has not.
    """
    wanted = [(x.shape[1:], x.dtype) for x in jax.tree.leaves(layout.shapes)]
    held, full = 0, len(shards[0][0])
    for number, shard in enumerate(shards):
        rows, last = len(shard[0]), number == len(shards) - 1
        found = [(leaf.shape[1:], leaf.dtype) for leaf in shard]
        alike = all(len(leaf) == rows for leaf in shard) and (
            rows == full or (last and rows < full)
        )
        if found != wanted or not alike:
            raise ValueError("it holds activations of other shapes")
        held += rows
    labelled = labels.shape == (layout.examples,) and labels.dtype == np.int32
    if held != layout.rows or not labelled:
        raise ValueError("it holds other rows")


def _write(
    side: Path, path: Path, key: Mapping[str, Any], layout: Layout, produce: Produce, about: str
) -> None:
    """Writes the folder under its side name and renames it."""
    files: dict[str, dict[str, int]] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        content = safetensors.numpy.save(tensors)
        with (side / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}

    size = max(1, min(SHARD_BYTES // max(layout.row_bytes, 1), layout.rows))
    shard, filled, labels = layout.empty(size), 0, []

    def flush() -> None:
        nonlocal filled
        tensors = {str(i): np.ascontiguousarray(leaf[:filled]) for i, leaf in enumerate(shard)}
        save(f"{len(files):05d}.safetensors", tensors)
        filled = 0

    for parts, found in produce():
        labels.append(found)
        done = 0
        while done < len(found):
            count = min(size - filled, len(found) - done)
            for leaf, part in zip(shard, parts, strict=True):
                leaf[filled : filled + count] = part[done : done + count]
            filled, done = filled + count, done + count
            if filled == size:
                flush()
    if filled:
        flush()
    save(_LABELS, {"labels": np.concatenate(labels)[: layout.examples].astype(np.int32)})
    facts = {"about": about, "seconds": produce.seconds(), "key": dict(key)}
    manifest = {**facts, "files": files}
    (side / cache_folder.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    cache_folder.finish(side, path)
