"""Makes a TFDS data set in array_record format, without TensorFlow where that is possible.

    python -m tl_jax.prepare NAME [--from PATH] [--data-dir DIR]

PATH is a folder with idx files or with images in one sub-folder per class (below train/,
validation/, test/ if there are such). Without it the data set is downloaded: fashion_mnist, mnist,
kmnist and cats_vs_dogs by this module, any other one of TFDS's by TFDS itself, with TensorFlow.
Preparing is a process of its own, so that training never holds TensorFlow.
"""

import argparse
import difflib
import errno
import importlib.util
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tl_jax import downloads, idx_files, raw_datasets, tfds_writer
from tl_jax.errors import NOT_UTF8, UserError, is_text, printable_lines
from tl_jax.raw_datasets import RawDataset

DOWNLOADED = ("fashion_mnist", "mnist", "kmnist", "cats_vs_dogs")
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EIO),
}


def prepare(name: str, source: str | None = None, data_dir: str | None = None) -> pathlib.Path:
    """Prepares a data set so that `tfds.data_source(name, data_dir=data_dir)` finds it.

    Args:
      name: of the data set: lower-case letters, digits and underscores.
      source: folder with idx files or images; None downloads.
      data_dir: TFDS's data directory; None is TFDS's default.

    Returns:
      The folder that holds the prepared data set.

    Raises:
      UserError: what is missing, damaged, unreachable or in the way, and what to do.
    """
    from tensorflow_datasets.core import constants

    data_dir = data_dir or constants.get_default_data_dir()
    if "://" in data_dir:
        raise UserError(f"{data_dir}: prepare into a local folder, then copy that there.")
    root = pathlib.Path(data_dir).expanduser()
    if source is None and name not in DOWNLOADED:
        return _prepare_with_tensorflow(name, root)
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{name!r} is no name for a data set: use lower-case letters, digits, underscores."
        )
    builder = tfds_writer.tfds_builder(name, root)
    version = str(builder.version) if builder else "1.0.0"
    final = root / name / version
    if source is not None:
        raw = read_source(name, pathlib.Path(source).expanduser())
        return tfds_writer.write_once(raw, name, builder, final)
    if tfds_writer.is_prepared(final):
        print(f"{name} is already prepared in {final}")
        return final
    folder = root / "downloads" / "tl_jax" / name
    command = f"python -m tl_jax.prepare {name} --from FOLDER --data-dir {root}"
    paths = downloads.fetch(name, folder, command)
    raw = read_source(name, paths[0] if name == "cats_vs_dogs" else folder)
    tfds_writer.write_once(raw, name, builder, final)
    shutil.rmtree(folder, ignore_errors=True)
    return final


def prepare_in_subprocess(name: str, data_dir: str | None = None) -> None:
    """`python -m tl_jax.prepare NAME` in a process of its own; its output passes through.

    Raises:
      UserError: with the message of the process, when it could not prepare the data set.
    """
    package_root = str(pathlib.Path(__file__).resolve().parents[1])
    paths = [package_root, os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        error_file = pathlib.Path(folder, "error")
        command = [sys.executable, "-m", "tl_jax.prepare", f"--error-file={error_file}"]
        command += [f"--data-dir={data_dir}"] if data_dir else []
        code = subprocess.run([*command, "--", name], env=environment).returncode
        if code == 2 and error_file.exists():
            raise UserError(error_file.read_text("utf-8"))
    if code:
        raise UserError(f"Preparing {name} ended with exit code {code}; its output is above.")


def read_source(name: str, source: pathlib.Path) -> RawDataset:
    """The data set in a folder or, for cats_vs_dogs, in Microsoft's zip archive.

    Raises:
      UserError: what is missing, damaged or refused, each file named.
    """
    if not source.exists():
        raise UserError(f"There is no {source}.")
    if source.is_file():
        if name != "cats_vs_dogs":
            raise UserError(f"{source} is a file; give the folder with idx files or images.")
        return raw_datasets.read_cats_vs_dogs(source)
    if idx_files.has_idx_files(source):
        return idx_files.read_idx(source)
    if name == "cats_vs_dogs":
        archives = sorted(source.glob("kagglecatsanddogs*.zip"))
        return raw_datasets.read_cats_vs_dogs(archives[0] if archives else source)
    return raw_datasets.read_image_folder(source)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_jax.prepare",
        description="Makes a TFDS data set that tfds:NAME then finds.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="such as fashion_mnist")
    parser.add_argument(
        "--from", dest="source", metavar="PATH", help="folder of idx files or of images"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="default: TFDS's own")
    parser.add_argument("--error-file", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # which may be of another encoding than UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for word in filter(None, (flags.name, flags.source, flags.data_dir)):
            if not is_text(word):
                raise UserError(f"{word!r} is {NOT_UTF8}")
        prepare(flags.name, flags.source, flags.data_dir)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        message = f"{error.filename or flags.data_dir}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted; nothing was prepared", file=sys.stderr)
        return 130
    else:
        return 0
    message = printable_lines(message)
    if flags.error_file:
        pathlib.Path(flags.error_file).write_text(message, "utf-8")
    else:
        print(f"error: {message}", file=sys.stderr)
    return 2


def _prepare_with_tensorflow(name: str, root: pathlib.Path) -> pathlib.Path:
    """TFDS's own builder, in this process."""
    import tensorflow_datasets as tfds

    alone = re.split("[/:]", name)[0]  # without configuration and version
    try:
        builder_class = tfds.builder_cls(alone)
    except tfds.core.registered.DatasetNotFoundError as error:
        near = difflib.get_close_matches(alone, tfds.list_builders(with_community_datasets=False))
        raise UserError(
            f"TFDS knows no data set {name!r}"
            + (f" (it knows {', '.join(near)})" if near else "")
            + f", and none is prepared in {root}. To make it from your own files: "
            f"python -m tl_jax.prepare {alone} --from FOLDER --data-dir {root}"
        ) from error
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{name} is not prepared in {root}, and preparing it needs TensorFlow, once. Run\n"
            '  pip install -e ".[tensorflow]"\n'
            f"  python -m tl_jax.prepare {name} --data-dir {root}"
        )
    urls = list(builder_class.url_infos or ())[:3] or ["https://storage.googleapis.com"]
    if not downloads.reachable(urls):
        raise UserError(
            f"{name} is not prepared in {root}, and {', '.join(urls)} cannot be reached. Prepare "
            f"it where there is a network and copy {root / name} here."
        )
    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # every builder raises what it likes
        raise UserError(f"TFDS could not prepare {name}: {error}") from error
    print(f"Prepared {name} in {builder.data_dir}")
    return pathlib.Path(builder.data_dir)


if __name__ == "__main__":
    sys.exit(main())
