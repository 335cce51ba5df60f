"""Activations of a split by row: in memory, or in memory-mapped safetensors shards on disk.

A cache on disk is one folder: `manifest.json` (what it holds, and bytes and CRC-32 of every file)
and shards `00000.safetensors` … with the leaves of equally many rows each. It is written under a
side name and then renamed, so that it is there whole or not at all; what a crash of the disk left
of it is found by size or checksum, and made again. A lock lets one process write it while others
wait.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tl_jax import tensor_files
from tl_jax.errors import UserError
from tl_jax.input_pipeline import Indices

SHARD_BYTES = 64 * 2**20
_NAME = "[0-9a-f]{32}"  # of a cache's folder
_MANIFEST, _LABELS = "manifest.json", "labels.safetensors"
_SHARD = r"[0-9]{5,}\.safetensors"  # of a shard's file
_NEEDS = "needs"  # bytes that a cache in the making will hold
_ROOM = ".tl_jax_room"  # the lock under which room is counted and reserved
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
log = logging.getLogger(__name__)

Leaves = Sequence[np.ndarray]


class NoRoom(UserError):
    """A cache on disk cannot be kept where it was to be."""


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationRows:
    """Rows {"activations": what a block takes, "label": int32 [b], "index": int32 [b]}.

    View v of example i is row v · len(labels) + i.

    Attributes:
      name: split and data set, for messages.
      shards: the leaves of each shard, [rows of a shard, …].
      structure: of the tree that the leaves make up.
      labels: int32 [N], by example.
    """

    name: str
    shards: Sequence[Leaves]
    structure: Any
    labels: np.ndarray

    cheap = True  # see `input_pipeline.Rows`

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Indices, views: np.ndarray | None = None) -> dict[str, Any]:
        """See `input_pipeline.Rows`."""
        index = np.asarray(indices, np.int32)
        rows = index.astype(np.int64)
        if views is not None:
            rows = rows + views.astype(np.int64) * len(self.labels)
        leaves = [self._take(number, rows) for number in range(len(self.shards[0]))]
        return {
            "activations": jax.tree.unflatten(self.structure, leaves),
            "label": self.labels[index],
            "index": index,
        }

    def _take(self, leaf: int, rows: np.ndarray) -> np.ndarray:
        first = self.shards[0][leaf]
        if len(self.shards) == 1:
            return first[rows]
        taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for place, (shard, row) in enumerate(zip(*divmod(rows, len(first)), strict=True)):
            taken[place] = self.shards[shard][leaf][row]
        return taken

    def tree(self) -> Any:
        """All rows: leaves [views · N, …]."""
        leaves = [
            parts[0] if len(parts) == 1 else np.concatenate(parts)
            for parts in zip(*self.shards, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a cache will hold.

    Attributes:
      name: split and data set, for messages.
      rows: examples × views.
      examples: rows of one view.
      shapes: tree of the activations of a batch: shapes [b, …] with dtype.
    """

    name: str
    rows: int
    examples: int
    shapes: Any

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        leaves = jax.tree.leaves(self.shapes)
        return sum(int(np.prod(x.shape[1:], dtype=np.int64)) * x.dtype.itemsize for x in leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def structure(self) -> Any:
        """Of the tree of activations."""
        return jax.tree.structure(self.shapes)

    def empty(self, rows: int) -> list[np.ndarray]:
        """Leaves for so many rows, to be filled."""
        return [np.empty((rows, *x.shape[1:]), x.dtype) for x in jax.tree.leaves(self.shapes)]


Pieces = Iterable[tuple[Leaves, np.ndarray]]  # leaves and labels of consecutive rows


def in_memory(layout: Layout, pieces: Pieces) -> ActivationRows:
    """The rows in the host's memory."""
    leaves, labels, done = layout.empty(layout.rows), np.empty(layout.rows, np.int32), 0
    for parts, found in pieces:
        for leaf, part in zip(leaves, parts, strict=True):
            leaf[done : done + len(found)] = part
        labels[done : done + len(found)] = found
        done += len(found)
    assert done == layout.rows
    return ActivationRows(layout.name, [leaves], layout.structure, labels[: layout.examples])


def on_disk(
    folder: str | os.PathLike[str],
    key: Mapping[str, Any],
    layout: Layout,
    produce: Callable[[], Pieces],
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
    with _usable(folder) as root:
        path = root / name_of(key)
        with _lock(root, path.name, about):
            if (rows := find(root, key, layout)) is not None:
                return rows
            _remove(path)
            with _lock(root, _ROOM, "what room there is"):
                _check_room(root, layout.nbytes, limit_bytes, about)
                side = _reserve(path, layout.nbytes)
            try:
                _write(side, path, key, layout, produce(), about)
            except BaseException:
                _remove(side)
                raise
    rows = find(root, key, layout)
    if rows is None:
        raise NoRoom(f"config.cache_dir: what was just written to {path} cannot be read back")
    return rows


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses what can be no folder of caches.

    Raises:
      NoRoom: it is not there and cannot be made.
    """
    with _usable(folder):
        pass


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
    root = _root(folder)
    missing = [layout.nbytes for key, layout in caches if not _is_there(root / name_of(key))]
    if missing:
        with _usable(folder) as root, _lock(root, _ROOM, "what room there is"):
            _check_room(root, sum(missing), limit_bytes, about)


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False


@contextlib.contextmanager
def _usable(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder of all caches, there; what the disk refuses in it is the user's error."""
    root = _root(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield root
    except OSError as error:
        which = f" ({error.filename})" if error.filename and error.filename != str(root) else ""
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = "a file or a broken link is in the way"
        raise NoRoom(
            f"config.cache_dir: the cache in {root} cannot be written: {reason}{which}. "
            "Name another folder, or set config.cache=off."
        ) from error


def _root(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise NoRoom(f"config.cache_dir: {folder}: there is no such user") from error


def name_of(key: Mapping[str, Any]) -> str:
    """Name of the folder of the cache with this key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def find(
    folder: str | os.PathLike[str], key: Mapping[str, Any], layout: Layout, *, quiet: bool = False
) -> ActivationRows | None:
    """The rows of a cache that is there and whole, memory-mapped; else None (why is logged)."""
    path = _root(folder) / name_of(key)
    if not _is_there(path):
        return None
    try:
        manifest = json.loads(_regular(path / _MANIFEST).read_bytes())
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
    except (*_DAMAGE, UserError) as error:
        if not quiet:
            log.warning("the cache %s is damaged (%s): making it again", path, error)
        return None
    with contextlib.suppress(OSError):  # it is another user's
        os.utime(path)
    return ActivationRows(layout.name, shards, layout.structure, labels)


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


def _remove(path: Path) -> None:
    """Removes what has a cache's name, whatever it is; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _reserve(path: Path, nbytes: int) -> Path:
    """The side folder of a cache, which says to others how much it will hold."""
    side = path.parent / f".{path.name}.part"
    _remove(side)
    side.mkdir()
    (side / _NEEDS).write_text(str(nbytes))
    return side


def _write(
    side: Path, path: Path, key: Mapping[str, Any], layout: Layout, pieces: Pieces, about: str
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

    for parts, found in pieces:
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
    manifest = {"about": about, "key": dict(key), "files": files}
    (side / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    (side / _NEEDS).unlink()
    side.rename(path)


def _check_room(root: Path, needed: int, limit: float, about: str) -> None:
    """Refuses what would take the caches beyond their limit, after sweeping what was cut short.

    Raises:
      NoRoom: says what there is.
    """
    held = {}
    for path in sorted(root.iterdir()):  # which may hold what is none of ours
        if not path.is_dir() or path.is_symlink():
            continue
        if partial := re.fullmatch(rf"\.({_NAME})\.part", path.name):
            try:
                with _lock(root, partial[1]):
                    shutil.rmtree(path, ignore_errors=True)  # cut short
            except BlockingIOError:
                held[path] = _reserved(path)
        elif re.fullmatch(_NAME, path.name):
            held[path] = 0
            with contextlib.suppress(PermissionError):  # another user's, closed to this one
                held[path] = sum(file.lstat().st_size for file in path.iterdir())
    taken, free = sum(held.values()), shutil.disk_usage(root).free
    if taken + needed <= limit and needed <= free:
        return
    lines = [f"{path.name}: {_gb(size)}, {_about(path)}" for path, size in held.items()]
    raise NoRoom(
        f"config.cache_limit_gb: {_gb(limit)}; {about} needs {_gb(needed)}; {root}, with "
        f"{_gb(free)} free on its disk, holds {_gb(taken)} in {len(held)} caches:\n  "
        + "\n  ".join(lines or ["(none)"])
        + "\nRemove folders there, raise the limit, or set config.cache=off."
    )


def _reserved(side: Path) -> int:
    try:
        return int((side / _NEEDS).read_text())
    except (OSError, ValueError):
        return 0


def _about(path: Path) -> str:
    if path.name.startswith("."):
        return "being written"
    try:
        return str(json.loads((path / _MANIFEST).read_bytes())["about"])
    except _DAMAGE:
        return "damaged"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


@contextlib.contextmanager
def _lock(root: Path, name: str, about: str | None = None) -> Iterator[None]:
    """A lock that ends with its process, however that ends; waits for it.

    Raises:
      BlockingIOError: another process holds it, and nothing is said `about` what to wait for.
    """
    path = root / f"{name}.lock"
    # In a folder that others can write to, a lock could be a link to a file of ours, or a pipe.
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags | os.O_RDWR, 0o666)
    except PermissionError:  # another user made it
        file = os.open(path, flags | os.O_RDONLY, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "a lock that is no file: remove it", str(path))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if about is None:
                raise
            log.warning("waiting for another process, which computes %s", about)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
