"""The files of a work directory, on any path that epath knows."""

import contextlib
import fcntl
import json
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from tl_jax import config as config_lib
from tl_jax import tensor_files
from tl_jax.config import Config
from tl_jax.errors import UserError


class WorkDir:
    """One run's directory. JSON files appear whole or not at all.

    Args:
      path: the directory; made when something is written.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path).expanduser()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, None where there is no such file.

        Raises:
          UserError: the file holds no JSON object.
        """
        file = self.path / name
        if not file.exists():
            return None
        try:
            content, problem = json.loads(file.read_bytes()), "it holds no JSON object"
        except (ValueError, RecursionError) as error:
            content, problem = None, str(error)
        if not isinstance(content, dict):
            raise UserError(
                f"{file} is damaged: {problem}. Remove it: the same command goes on from what else "
                "is there, and writes it anew."
            )
        return content

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file: to a side name, then renamed."""
        self.write_bytes(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file whole: to a side name, then renamed."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        side = target.parent / f".{target.name}.part"
        side.write_bytes(content)
        side.replace(target)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes of this machine out until this one leaves or ends, however it ends.

        Raises:
          UserError: another process trains here.
        """
        if "://" in str(self.path):
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}; give another --workdir"
                ) from None
            yield

    def check_writable(self) -> None:
        """Fails now rather than after an hour of training.

        Raises:
          UserError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{uuid.uuid4().hex}"  # every process has its own
            probe.write_bytes(b"tl_jax")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"the work directory {self.path} cannot be written: {reason}. "
                "Mend that, or give another --workdir."
            ) from error

    def differences(self, config: Config) -> list[str]:
        """A line for each field in which the run that lies here differs; none without a run."""
        theirs = self.read_json("config.json")
        return [] if theirs is None else config_lib.differences(config, theirs)

    def claim(self, config: Config) -> None:
        """Refuses a directory that belongs to a run with another configuration.

        Raises:
          UserError: shows every field that differs.
        """
        if different := self.differences(config):
            raise UserError(
                f"{self.path} holds a run with another configuration:\n  "
                + "\n  ".join(different)
                + "\nGive another --workdir, or the configuration that it was started with."
            )

    def finished(self) -> dict[str, Any] | None:
        """The content of `summary.json` of a run that ended; None where its export is not whole.

        Raises:
          UserError: `summary.json` is damaged.
        """
        summary, folder = self.read_json("summary.json"), self.path / "export"
        if summary is None or not folder.exists():
            return None
        if "://" in str(folder):
            return summary
        try:
            files = list(pathlib.Path(folder).glob("*.safetensors"))
            for file in files:
                tensor_files.read_safetensors(file)
        except (UserError, OSError):
            return None
        return summary if files else None

    def exported(self) -> epath.Path:
        """The folder of the trained classifier.

        Raises:
          UserError: this is no work directory, or its run has not ended.
        """
        folder = self.path / "export"
        if folder.exists():
            return folder
        content = self.read_json("config.json")
        if content is None or "model_type" in content:  # the latter is a Hugging Face config
            raise UserError(f"{self.path} is no work directory: it holds no run's config.json")
        raise UserError(
            f"the run in {self.path} is not finished: start it again to let it end, then there is "
            "an export to use"
        )

    def config(self) -> dict[str, Any]:
        """The fields that the run was started with.

        Raises:
          UserError: no run was started here.
        """
        fields = self.read_json("config.json")
        if fields is None or "model_type" in fields:  # the latter is a Hugging Face config
            raise UserError(
                f"{self.path} is no work directory: it holds no run's config.json. "
                "For an exported folder give --config, too: it says which data."
            )
        return fields


class MetricsLog:
    """`metrics.jsonl`: one object a line, in the order of the steps.

    Args:
      workdir: where it lies.
      step: of the checkpoint that training continues from; what came after it is dropped, since
        it will happen again.
      writes: False for all processes but the first: they only keep `records`.

    Raises:
      UserError: a line is JSON, but no record.
    """

    def __init__(self, workdir: WorkDir, step: int, writes: bool):
        self._file, self._writes = workdir.path / "metrics.jsonl", writes
        self.records: list[dict[str, Any]] = []
        lines = self._file.read_bytes().splitlines() if self._file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                break  # the line that a kill cut short
            if not (isinstance(record, dict) and type(record.get("step")) is int):
                raise UserError(
                    f"{self._file} is damaged: line {number} is no record of a step. Remove that "
                    "line to go on without it."
                )
            if record["step"] <= step:
                self.records.append(record)
        if writes:
            workdir.write_bytes("metrics.jsonl", b"".join(map(_line, self.records)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record."""
        self.records.append(dict(record))
        if not self._writes:
            return
        if "://" in str(self._file):  # object stores do not append
            self._file.write_bytes(b"".join(map(_line, self.records)))
        else:
            with self._file.open("ab") as file:
                file.write(_line(record))


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()
