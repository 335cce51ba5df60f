"""What training changes, kept by Orbax: the trainable part, optimizer state and input position.

The frozen part is not copied: it is named by its source, revision and hash, and loaded from there.
The last checkpoint is kept, and the best by validation.
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tl_jax.errors import UserError

_METRIC = "validation_accuracy"


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """TensorStore's ValueError for a full or forbidden disk as the OSError that it stands for."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextlib.contextmanager
def _damage(folder: epath.Path) -> Iterator[None]:
    """What goes wrong with the files of a checkpoint as an error that names its folder."""
    try:
        yield
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise UserError(
            f"the checkpoint {folder} cannot be restored: {reason}. "
            "Remove that folder to go on from the one before it, or from the start."
        ) from error


def _check_metrics(folder: epath.Path) -> None:
    """Orbax reads the metrics of all checkpoints at once, and would not say which are damaged."""
    for file in folder.glob("*/metrics/metrics"):
        if file.parents[1].name.isdigit():  # not a save that was cut short
            with _damage(file.parents[1]):
                float(json.loads(file.read_bytes())[_METRIC])


class _Waiting(NamedTuple):
    """A checkpoint that is not yet being written."""

    state: Any
    position: dict[str, Any]
    accuracy: float | None


class Checkpoints:
    """The folder `checkpoints/` of a work directory.

    Args:
      folder: any path that epath knows.
      keep: steps whose checkpoints stay whatever comes after.

    Raises:
      UserError: a checkpoint's metrics are damaged.
    """

    def __init__(self, folder: epath.PathLike, keep: Sequence[int] = ()):
        folder = epath.Path(folder)
        _check_metrics(folder)
        self._keep, self._waiting = frozenset(keep), dict[int, _Waiting]()
        self._manager = ocp.CheckpointManager(
            folder if "://" in str(folder) else folder.absolute(),  # Orbax takes no relative path
            item_names=("state", "position"),
            options=ocp.CheckpointManagerOptions(
                create=True,
                enable_async_checkpointing=True,
                best_fn=_accuracy,
                # A save that was cut short is swept away on the next start.
                cleanup_tmp_directories=True,
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(1),
                        preservation_policy.CustomSteps(list(keep)),
                        preservation_policy.BestN(
                            get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )

    def save(
        self, step: int, kept: Any, position: dict[str, Any], accuracy: float | None = None
    ) -> None:
        """Writes a copy of both in the background: the caller may change or donate them at once.

        While an earlier one is still being written, a later one waits; of those that wait only the
        last, the best and those to be kept are written, as the others would be deleted again.

        Args:
          step: steps done.
          kept: tree of arrays, replicated over devices; see `stages.kept`.
          position: what else a resumed run needs, as JSON: position of the input, plan, hashes.
          accuracy: on the validation split, where it was just measured.

        Raises:
          OSError: the disk is full, now or since the last call.
        """
        if step in self._manager.all_steps():
            return
        host, position = jax.tree.map(np.array, kept), copy.deepcopy(position)
        best = max((w.accuracy or -1.0 for w in self._waiting.values()), default=-1.0)
        self._waiting = {
            earlier: w
            for earlier, w in self._waiting.items()
            if earlier in self._keep or (w.accuracy == best >= (accuracy or -1.0))
        }
        self._waiting[step] = _Waiting(host, position, accuracy)
        # Processes save together, so that none may find it ready where another does not.
        if jax.process_count() > 1 or not self._manager.is_saving_in_progress():
            self._write()

    def _write(self) -> None:
        """Hands everything that waits over, each after the one before it."""
        waiting, self._waiting = self._waiting, {}
        for step, found in sorted(waiting.items()):
            with _disk_errors():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(found.state),
                        position=ocp.args.JsonSave(found.position),
                    ),
                    metrics=None if found.accuracy is None else {_METRIC: found.accuracy},
                )

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int:
        """Step of the best checkpoint by validation; the newest where nothing was measured."""
        best = self._manager.best_step()
        best = self.last if best is None else best
        assert best is not None, "a run ends with a checkpoint"
        return best

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """A checkpoint as a tree of NumPy arrays of the shapes in `like`, and its position.

        Raises:
          UserError: the checkpoint is damaged, or holds another network or optimizer.
        """
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        with _damage(self.folder / str(step)):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore()
                ),
            )
        return found.state, found.position

    def position(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint alone.

        Raises:
          UserError: the checkpoint is damaged.
        """
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        with _damage(self.folder / str(step)):
            found = self._manager.restore(step, args=args).position
            if not isinstance(found, dict):
                raise ValueError("its position is no JSON object")
        return found

    @property
    def folder(self) -> epath.Path:
        """Where they lie."""
        return self._manager.directory

    def wait(self) -> None:
        """Returns when everything is written."""
        self._write()
        with _disk_errors():
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._write()
        with _disk_errors():
            self._manager.close()  # waits, so that an interrupted run keeps what it had saved
