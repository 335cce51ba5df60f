"""What all processes compute together, though the first alone knows whether it must be computed."""

from collections.abc import Callable
from typing import Any

from tl_jax import parallel
from tl_jax.errors import UserError
from tl_jax.feature_rows import Pieces, Produce


def lead(take: Callable[[Produce], Any], produce: Produce) -> None:
    """The first process's part; `follow` is that of the others meanwhile.

    Whether a cache must be computed is known under its lock alone: another run may be writing it.

    Args:
      take: is given what gives rows, and may take them or not.
      produce: gives this process's rows.

    Raises:
      UserError: `take` or `produce` raised it.
    """
    computed = _Computed(produce)
    problem: UserError | None = None
    try:
        take(computed)
    except UserError as error:
        if computed.broken:
            raise  # the others cannot go on either
        problem = error
    computed.end()
    parallel.first_process_says(int(problem is not None))
    if problem is not None:
        raise problem


def follow(produce: Produce) -> None:
    """Computes its share of the rows, if the first process computes them.

    Raises:
      UserError: the first process could not take them.
    """
    if parallel.first_process_says(0):
        for _ in produce():
            pass
    if parallel.first_process_says(0):
        raise UserError("config.cache_dir: the first process could not write the cache")


class _Computed:
    """What gives rows, in all processes at once: told to the others before it begins.

    `broken` says that it failed itself, and not whoever takes its rows.
    """

    def __init__(self, produce: Produce):
        self._produce, self.broken = produce, False
        self._pieces: Pieces | None = None
        self.seconds = produce.seconds

    def __call__(self) -> Pieces:
        parallel.first_process_says(1)
        self._pieces = self._watched()
        return self._pieces

    def _watched(self) -> Pieces:
        try:
            yield from self._produce()
        except Exception:
            self.broken = True
            raise

    def end(self) -> None:
        """Goes to the end of what was begun, since the others do; or says that nothing was."""
        if self._pieces is None:
            parallel.first_process_says(0)
        else:
            for _ in self._pieces:
                pass
