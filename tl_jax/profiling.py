"""A trace of some training steps, on demand."""

import jax

from tl_jax.workdir import WorkDir


class Profile:
    """A trace of some steps by `jax.profiler`, in `profile/` of the work directory.

    Args:
      workdir: of the run.
      first: steps that were done before this start.
      steps: how many to trace; 0 for none.
    """

    WARM_UP = 2  # the first steps compile

    def __init__(self, workdir: WorkDir, first: int, steps: int):
        self._folder, self._steps = str(workdir.path / "profile"), steps
        self._start = first + 1 + self.WARM_UP
        self._running = False

    def before(self, step: int) -> None:
        """Starts or stops, if it is time to; steps that are one program are traced together."""
        if self._running and step >= self._start + self._steps:
            self._stop()
        elif self._steps and not self._running and step >= self._start:
            jax.profiler.start_trace(self._folder)
            self._running, self._start = True, step

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._steps = False, 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()
