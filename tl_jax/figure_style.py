"""What the figures share: colours, matplotlib's settings, untrusted text, rendering to PNG."""

import contextlib
import io
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinct for every common form of colour blindness.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN = "#009E73"
INK, GREY, PALE = "#222222", "#767676", "#EDEDED"
# Fonts with the letters that DejaVu lacks, used where they are installed.
FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for these figures, while they are built and while they are rendered."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    defaults: dict[Any, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k
    }
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.family": ["DejaVu Sans", *(name for name in FONTS if name in installed)],
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "figure.dpi": 150,
        "savefig.dpi": 150,
    }
    with matplotlib.rc_context(defaults | settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png(draw: Callable[..., "Figure"], *args: Any) -> bytes:
    """Builds a figure by `draw(*args)` and renders it, the same bytes for the same figure."""
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = draw(*args)
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def new_figure(width: float, height: float, **options: Any) -> "Figure":
    """A figure of width × height inches, apart from pyplot's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def label(text: Any, limit: int = 24) -> str:
    """Untrusted text on one line: what cannot be printed left out, cut to `limit` columns."""
    words = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    ends = list(accumulate(1 + (unicodedata.east_asian_width(c) in "WF") for c in words))
    if not words or ends[-1] <= limit:
        return words
    return words[: bisect_left(ends, limit)].rstrip() + "…"


def count(number: int) -> str:
    """A number in three digits: 812, 20.5K, 23.5M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{(value < 99.95) + (value < 9.995)}f}{unit}"
    return str(number)
