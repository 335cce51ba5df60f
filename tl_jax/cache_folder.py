"""The folder of all caches on disk: locks, the room there is, what was cut short.

Each cache is a folder of its own, whose name is a hash; it is made under a side name, which says
how much it will hold. What else lies here is not touched.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from tl_jax.errors import DAMAGE, UserError

MANIFEST = "manifest.json"  # in which a cache says what it is "about"
_NEEDS = "needs"  # bytes that a cache in the making will hold
_NAME = "[0-9a-f]{32}"  # of a cache's folder
_ROOM = ".tl_jax_room"  # the lock under which room is counted and reserved
log = logging.getLogger(__name__)


class NoRoom(UserError):
    """A cache on disk cannot be kept where it was to be."""


@contextlib.contextmanager
def usable(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder of all caches, there; what the disk refuses in it is the user's error."""
    root = root_of(folder)
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


def check(folder: str | os.PathLike[str]) -> None:
    """Refuses what can be no folder of caches.

    Raises:
      NoRoom: it is not there and cannot be made.
    """
    with usable(folder):
        pass


def root_of(folder: str | os.PathLike[str]) -> Path:
    """Its path.

    Raises:
      NoRoom: it is in the home of a user who does not exist.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise NoRoom(f"config.cache_dir: {folder}: there is no such user") from error


def is_there(path: Path) -> bool:
    """Whether there is something that this process may look at."""
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def remove(path: Path) -> None:
    """Removes what has a cache's name, whatever it is; of a link the link alone.

    Raises:
      OSError: it cannot be removed, as it is another user's.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def lock(root: Path, name: str, about: str | None = None) -> Iterator[None]:
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


def check_room(root: Path, sizes: Mapping[str, int], limit: float, about: str) -> None:
    """Refuses what would take the caches beyond their limit, or fill the disk.

    Args:
      root: the folder of all caches.
      sizes: bytes of each cache, by name. One that another process is making needs no more.
      limit: bytes that all caches may take together.
      about: what is to be kept, for people.

    Raises:
      NoRoom: says what there is.
    """
    with lock(root, _ROOM, "what room there is"):
        _count(root, sizes, limit, about)


def reserve(path: Path, needed: int, limit: float, about: str) -> Path:
    """The side folder of a cache, which says to others how much it will hold.

    Args:
      path: of the cache, which its maker locked.
      needed: bytes.
      limit: bytes that all caches may take together.
      about: what is to be kept, for people.

    Raises:
      NoRoom: as `check_room` does.
    """
    side = path.parent / f".{path.name}.part"
    with lock(path.parent, _ROOM, "what room there is"):
        remove(side)
        _count(path.parent, {path.name: needed}, limit, about)
        side.mkdir()
        (side / _NEEDS).write_text(str(needed))
    return side


def finish(side: Path, path: Path) -> None:
    """Gives what was written under a side name its own."""
    with lock(path.parent, _ROOM, "what room there is"):
        (side / _NEEDS).unlink()
        side.rename(path)


def _count(root: Path, sizes: Mapping[str, int], limit: float, about: str) -> None:
    """Refuses what would take the caches beyond their limit, after sweeping what was cut short.

    Raises:
      NoRoom: says what there is.
    """
    needed, held, unwritten = sum(sizes.values()), {}, 0
    for path in sorted(root.iterdir()):  # which may hold what is none of ours
        if not path.is_dir() or path.is_symlink():
            continue
        if partial := re.fullmatch(rf"\.({_NAME})\.part", path.name):
            try:
                with lock(root, partial[1]):
                    shutil.rmtree(path, ignore_errors=True)  # cut short
            except BlockingIOError:  # in the making
                held[path] = _reserved(path)
                unwritten += max(held[path] - _written(path), 0)
                needed -= sizes.get(partial[1], 0)
        elif re.fullmatch(_NAME, path.name):
            held[path] = _written(path)
    taken, free = sum(held.values()), max(shutil.disk_usage(root).free - unwritten, 0)
    if taken + needed <= limit and needed <= free:
        return
    lines = [f"{path.name}: {_gb(size)}, {_about(path)}" for path, size in held.items()]
    raise NoRoom(
        f"config.cache_limit_gb: {_gb(limit)}; {about} needs {_gb(needed)}; {root}, with "
        f"{_gb(free)} free on its disk, holds {_gb(taken)} in {len(held)} caches:\n  "
        + "\n  ".join(lines or ["(none)"])
        + "\nRemove folders there, raise the limit, or set config.cache=off."
    )


def _written(path: Path) -> int:
    with contextlib.suppress(OSError):  # another user's, closed to this one, or just renamed
        return sum(file.lstat().st_size for file in path.iterdir() if file.name != _NEEDS)
    return 0


def _reserved(side: Path) -> int:
    try:
        return int((side / _NEEDS).read_text())
    except (OSError, ValueError):
        return 0


def _about(path: Path) -> str:
    if path.name.startswith("."):
        return "being written"
    try:
        return str(json.loads((path / MANIFEST).read_bytes())["about"])
    except DAMAGE:
        return "damaged"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
