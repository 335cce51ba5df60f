"""What a user can cause, and how messages name things; `main` prints them and exits with code 2."""

import csv
import difflib
import re
import sys
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite, a broken certificate): exit code 1."""


class NotFinite(RunFailed):
    """A loss or gradient is not finite."""


# What reading a file makes of another content than was written there.
DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, csv.Error),
)

# Of a terminal (C0, C1), lines within a line, the direction of writing, what is no Unicode.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# In another locale names that are UTF-8 look as if they were not.
NOT_UTF8 = (
    "not UTF-8"
    if sys.getfilesystemencoding() == "utf-8"
    else "not of this locale's encoding (with PYTHONUTF8=1 it is UTF-8)"
)


def printable(text: str) -> str:
    """The text on one line, with escapes for what would steer a terminal: names come from files."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """The same line by line: a message may have several."""
    return "\n".join(map(printable, text.split("\n")))


def is_text(name: str) -> bool:
    """Whether the name can be written as UTF-8; of a file with other bytes it cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest known name; by its last part where the whole is far."""
    known = list(known)
    initials = {
        "".join(word[0] for word in k.rsplit(".", 1)[-1].split("_")): k for k in reversed(known)
    }
    if (last := name.rsplit(".", 1)[-1]) in initials:  # lr
        return f"; did you mean {initials[last]}?"
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    near = near or [
        by_last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1)
    ]
    return f"; did you mean {near[0]}?" if near else ""
