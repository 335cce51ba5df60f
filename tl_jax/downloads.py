"""Files that TensorFlow Datasets knows by address and checksum, fetched without TensorFlow."""

import hashlib
import http.client
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tl_jax.errors import UserError

TIMEOUT = 8.0  # seconds to wait for an answer
ATTEMPTS = 3  # in a row without a new byte
PATIENCE = 6.0  # seconds without a new byte after which there is no further attempt
BLOCK = 1 << 18  # bytes
NETWORK_ERRORS = (OSError, http.client.HTTPException)


def fetch(name: str, folder: pathlib.Path, command: str) -> list[pathlib.Path]:
    """The files of a TFDS dataset, downloaded into `folder` and checked.

    Args:
      name: a dataset whose addresses and SHA-256 are in the tensorflow-datasets package.
      folder: created if need be; complete files in it are not fetched again.
      command: what to run once the files were downloaded by hand into FOLDER.

    Raises:
      UserError: no network, or a file that is not the one expected.
    """
    files = known_files(name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    paths = []
    with Progress(*columns) as progress:
        for url, info in files.items():
            # Only the last part: a name from a list must not lead out of the folder.
            path = folder / pathlib.PurePosixPath(info.filename or url).name
            paths.append(path)
            task = progress.add_task(path.name, total=int(info.size))

            def advance(received: int, task=task) -> None:
                progress.update(task, completed=received)

            try:
                download(url, info.checksum, path, advance)
            except NETWORK_ERRORS as error:
                raise UserError(_by_hand(name, list(files), url, error, command)) from error
    return paths


def known_files(name: str) -> dict[str, Any]:
    """TFDS's `UrlInfo` (size, checksum, filename) by address; they come with its package."""
    import tensorflow_datasets as tfds

    return dict(tfds.builder_cls(name).url_infos or {})


def download(
    url: str, sha256: str, path: pathlib.Path, advance: Callable[[int], None] = lambda _: None
) -> None:
    """One file; goes on where it stopped, for as long as bytes arrive.

    Args:
      url: http or https.
      sha256: of the whole file, hexadecimal.
      path: where it shall be; until it is whole and checked it is called `path` + ".part".
      advance: called with the number of bytes that are there.

    Raises:
      OSError: no network, or the server refuses.
      UserError: the file is not the one expected.
    """
    if path.exists() and _sha256(path) == sha256:
        return
    part = path.with_name(path.name + ".part")
    failures, last_byte = 0, time.monotonic()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, advance)
            break
        except NETWORK_ERRORS as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
            if part.exists() and part.stat().st_size > before:
                failures, last_byte = 0, time.monotonic()
            failures += 1
            if failures >= ATTEMPTS or time.monotonic() - last_byte > PATIENCE:
                raise
            time.sleep(failures)
    if (found := _sha256(part)) != sha256:
        part.unlink()
        raise UserError(
            f"{url} is not the file that was expected: its SHA-256 is {found}, not {sha256}. "
            "Try again; if it stays so, the server's file has changed or something on the way "
            "replaces it."
        )
    part.replace(path)


def reachable(urls: list[str]) -> bool:
    """Whether a server of these addresses answers, within seconds; one server is enough."""
    for url in urls:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            return True
        except (*NETWORK_ERRORS, ValueError):
            continue
        return True
    return False


def _receive(url: str, part: pathlib.Path, advance: Callable[[int], None]) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left: the part is whole, or longer than the file
            return
        raise
    part.parent.mkdir(parents=True, exist_ok=True)
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        while block := response.read(BLOCK):
            file.write(block)
            advance(file.tell())
        expected = response.headers.get("Content-Length")
        received = file.tell() - (start if response.status == 206 else 0)
        if expected is not None and received < int(expected):
            raise http.client.IncompleteRead(b"", int(expected) - received)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(name: str, urls: list[str], url: str, error: Exception, command: str) -> str:
    debian = (
        "\n(On Debian: apt-get install dataset-fashion-mnist, FOLDER is "
        "/usr/share/datasets/fashion-mnist.)"
    )
    reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
    return (
        f"{name} cannot be downloaded ({url}: {reason}). Where there is a network, download\n  "
        + "\n  ".join(urls)
        + "\ninto a folder, copy it here, and run\n"
        + f"  {command}"
        + (debian if name == "fashion_mnist" else "")
    )
