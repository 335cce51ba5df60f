"""Tasks of a sweep in processes of their own: on this machine, or on a Ray cluster.

A task is a function of a module with arguments that can be pickled. It runs to its end, fails, or
takes its process with it; each comes back as an `Outcome`, and none stops the others.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, Protocol

from tl_jax.errors import RunFailed, UserError, printable_lines

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """A call.

    Attributes:
      name: for messages.
      function: of a module, so that another process finds it.
      arguments: of the function.
      kind: tasks of one kind share what a process has in memory.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
      task: which.
      result: what it returned.
      error: what went wrong, for people; None where nothing did.
    """

    task: Task
    result: Any = None
    error: str | None = None


class Launcher(Protocol):
    """Runs tasks in any order; yields what became of each."""

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """An outcome for each task, as they come."""

    def close(self) -> None:
        """Ends the processes that wait for more."""


def call(task: Task) -> Outcome:
    """Runs a task here; whatever it raises becomes its outcome."""
    try:
        return Outcome(task, task.function(*task.arguments))
    except (RunFailed, UserError) as error:
        return Outcome(task, error=printable_lines(str(error)))
    except Exception as error:
        return Outcome(task, error=printable_lines(f"{type(error).__name__}: {error}"))


class Local:
    """So many processes of this machine, each of which runs one task after the other.

    A process that dies (memory, a signal) takes its task along, which is tried again in a new one.
    Those that live wait for the next call. Each is given tasks of the kinds that it had before, as
    long as there are any.

    Args:
      jobs: processes at once.
      retries: of a task whose process died.
    """

    def __init__(self, jobs: int, retries: int):
        self._jobs, self._retries = jobs, retries
        self._context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
        self._idle: list[_Worker] = []
        self._busy: dict[connection.Connection, tuple[_Worker, Task, int]] = {}
        weakref.finalize(self, _end, self._idle, self._busy)  # also when the interpreter ends

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """See `Launcher`."""
        waiting = [(task, self._retries) for task in tasks]
        busy = self._busy
        try:
            while waiting or busy:
                while waiting and len(busy) < self._jobs:
                    worker = self._idle.pop() if self._idle else _Worker(self._context)
                    others = [*self._idle, *(other for other, _, _ in busy.values())]
                    chosen = worker.chooses([task for task, _ in waiting], others)
                    try:
                        worker.send(waiting[chosen][0])
                    except OSError:  # it died while it waited
                        worker.end()
                        continue
                    busy[worker.pipe] = worker, *waiting.pop(chosen)
                for pipe in connection.wait(list(busy)):
                    worker, task, left = busy.pop(pipe)  # type: ignore[call-overload]
                    try:
                        outcome = worker.pipe.recv()
                    except (EOFError, OSError):
                        code = worker.end()
                        if left:
                            waiting.insert(0, (task, left - 1))
                            continue
                        outcome = Outcome(task, error=f"its process died (exit code {code})")
                    else:
                        self._idle.append(worker)
                    yield outcome
        finally:
            _end([], busy)

    def close(self) -> None:
        """See `Launcher`."""
        _end(self._idle, self._busy)


def _end(idle: "list[_Worker]", busy: "dict[Any, tuple[_Worker, Task, int]]") -> None:
    """Ends processes; those are busy whose call failed or was left in the middle."""
    while busy:
        busy.popitem()[1][0].end()
    while idle:
        idle.pop().end()


class _Worker:
    """A process that runs the tasks which come through a pipe."""

    def __init__(self, context: Any):
        self.pipe, theirs = context.Pipe()
        self._kinds: set[str] = set()
        # Not as a daemon: the readers of images (`data.workers`) are its children.
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def chooses(self, tasks: Sequence[Task], others: Iterable["_Worker"]) -> int:
        """Which task it takes: of a kind that it had, else that nobody had, else the first."""
        theirs = set().union(*(other._kinds for other in others))

        def rank(number: int) -> int:
            kind = tasks[number].kind
            return 0 if kind in self._kinds else 1 if kind not in theirs else 2

        return min(range(len(tasks)), key=rank)

    def send(self, task: Task) -> None:
        """Gives it a task."""
        self._kinds.add(task.kind)
        self.pipe.send(task)

    def end(self) -> int | None:
        """Ends the process, whatever it does, and its own; its exit code."""
        self.pipe.close()
        # It may have no group yet, or no longer; macOS does not let signal one that has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        return self._process.exitcode


def _serve(pipe: connection.Connection) -> None:
    os.setsid()  # Control-C at the terminal is the sweep's alone
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(call(task))


def _follow(parent: int) -> None:
    """Dies with the parent: a sweep that was killed leaves nobody behind in its directories."""
    connection.wait([parent])
    os.killpg(0, signal.SIGKILL)


class Ray:
    """Tasks of a Ray cluster; those whose worker or node dies are tried again by Ray.

    Args:
      address: of the cluster; None starts one on this machine.
      cpus: that a task takes.
      gpus: that it takes.
      retries: of a task whose process or node died.

    Raises:
      UserError: Ray is not installed, the cluster does not answer, or this machine is too small.
    """

    def __init__(self, address: str | None, cpus: float, gpus: float, retries: int):
        try:
            import ray
        except ImportError:
            raise UserError(
                'config.ablate.launcher: ray is not installed: pip install "tl_jax[ray]" '
                "(or take local)"
            ) from None
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS")
        grows = bool(address) or ray.is_initialized()
        if not ray.is_initialized():
            try:
                ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except Exception as error:
                where = address or "on this machine"
                raise UserError(
                    f"config.ablate.ray_address: no cluster {where}: {error}"
                ) from error
        _check_nodes([n["Resources"] for n in ray.nodes() if n["Alive"]], cpus, gpus, grows)
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_call_in)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """See `Launcher`."""
        here = os.getcwd()  # configurations may name files from here on
        pending = {self._remote.remote(here, task): task for task in tasks}
        try:
            while pending:
                [done], _ = self._ray.wait(list(pending))
                task = pending.pop(done)
                try:
                    yield self._ray.get(done)
                except self._ray.exceptions.RayError as error:
                    yield Outcome(task, error=f"Ray: {str(error).splitlines()[0]}")
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """See `Launcher`; Ray looks after its processes itself."""


def _check_nodes(
    nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float, grows: bool
) -> None:
    """A task that no node has room for waits: for ever on one machine, where a cluster may grow.

    Raises:
      UserError: it would wait for ever.
    """
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return
    has = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
    said = f"no node has {cpus:g} CPUs and {gpus:g} GPUs; there are: {has}"
    if not grows:
        raise UserError(f"config.ablate.cpus, gpus: {said}")
    log.warning("%s: waiting for one that has", said)


def _call_in(folder: str, task: Task) -> Outcome:
    if os.path.isdir(folder):
        os.chdir(folder)
    return call(task)


def make(launcher: str, options: Any) -> Launcher:
    """The launcher that an `ablate` section asks for (`ablation_config.Ablate`)."""
    if launcher == "local":
        return Local(options.jobs, options.retries)
    return Ray(options.ray_address, options.cpus, options.gpus, options.retries)


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    """What all tasks returned.

    Raises:
      UserError: names those that did not, and each reason once.
    """
    wrong: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            wrong.setdefault(outcome.error, []).append(outcome.task.name)
    if wrong:
        lines = [
            f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}: {error}"
            for error, names in wrong.items()
        ]
        raise UserError("\n".join(lines))
    return [outcome.result for outcome in outcomes]
