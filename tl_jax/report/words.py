"""How the report writes numbers and names: units, precision and lists, in one place."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "–"


@dataclass(frozen=True)
class Name:
    """Untrusted text inside a sentence; each document sets it off and escapes it in its own way."""

    text: str


Sentence = tuple["str | Name", ...]


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def exact(value: float | None) -> str:
    """A number for machines: all its digits, integers without a point, nothing for None."""
    if value is None:
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 1e18 else repr(float(value))


def percent(share: float | None, digits: int = 1) -> str:
    """0.8733 → `87.3 %`."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def signed(value: str) -> str:
    """The text of a number with a sign that is as wide as a plus."""
    return value.replace("-", "−")


def points(difference: float | None) -> str:
    """0.031 → `+3.1`: percentage points, signed; +0.0 is above 0 and −0.0 below, 0.0 is 0."""
    if difference is None:
        return NOTHING
    return "0.0" if abs(difference) < 1e-9 else signed(f"{100 * difference:+.1f}")


def interval(low: float | None, high: float | None, *, differences: bool = False) -> str:
    """`85.9 to 88.6`, in percent; of differences signed, in percentage points."""
    if low is None or high is None:
        return NOTHING
    if differences:
        return f"{points(low)} to {points(high)}"
    return f"{100 * low:.1f} to {100 * high:.1f}"


def short(value: float | None, digits: int = 3) -> str:
    """A number in a few significant digits: 0.0123, 12.3, 1,230, 1.2e-07."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return signed(f"{value:,.0f}") if abs(value) < 1e7 else f"{value:.{digits - 1}e}"
    return signed(f"{value:.{digits}g}")


def scaled(value: float | None, unit: str) -> str:
    """With a decimal prefix, in three digits: 1.34 GFLOP, 197 KB."""
    if value is None:
        return NOTHING
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {prefix}{unit}".rstrip()
    return f"{value:.0f} {unit}".rstrip()


def _three(value: float) -> str:
    return f"{value:.{(value < 99.95) + (value < 9.995)}f}"


def seconds(value: float | None) -> str:
    """0.73 s, 8.4 s, 3.2 min, 1.4 h."""
    if value is None:
        return NOTHING
    if value < 99.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 5997 else f"{value / 3600:.1f} h"


def times(ratio: float) -> str:
    """A ratio as a factor: `0.043 ×`, `1.4 ×`, `120 ×`."""
    if ratio >= 99.5:
        return f"{ratio:,.0f} ×"
    return f"{ratio:.2g} ×" if ratio < 9.95 else f"{ratio:.0f} ×"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 seed`, `3 seeds`, `1,000 examples`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def listed(items: Iterable[Sequence["str | Name"]], last: str = " and ") -> Sentence:
    """Parts of a sentence joined as in speech: a, b and c."""
    items = [tuple(item) for item in items]
    found: list[str | Name] = []
    for index, item in enumerate(items):
        if index:
            found.append(last if index == len(items) - 1 else ", ")
        found += item
    return tuple(found)


def plain(sentence: Iterable["str | Name"]) -> str:
    """A sentence without marks."""
    return "".join(part.text if isinstance(part, Name) else part for part in sentence)
