"""The one exception for what a user can cause: `main` prints its message and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite, a broken certificate): exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest known name; by its last part where the whole is far."""
    known = list(known)
    initials = {"".join(word[0] for word in k.rsplit(".", 1)[-1].split("_")): k for k in known}
    if (last := name.rsplit(".", 1)[-1]) in initials:  # lr
        return f"; did you mean {initials[last]}?"
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    near = near or [
        by_last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1)
    ]
    return f"; did you mean {near[0]}?" if near else ""
