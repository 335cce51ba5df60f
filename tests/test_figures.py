"""The figures: what is on them, read from the Figure before rendering, and that they render."""

import io
import itertools
import struct
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from plan_examples import leaf, network, plan

from tl_jax import figures, plan_figure
from tl_jax.figure_style import BLUE, GREEN, ORANGE, PALE, SKY, VERMILLION, count, label, png, style

NASTY = [
    "$x_{1}$ \\frac{1}{2}",
    "two\nlines\t_a_",
    "日本語 العربية 😀",
    "\x00\ud800\u202e",
    "%s {0} <b>",
]


def drawn(draw, *args):
    with style():
        return draw(*args)


def texts(figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def pixels(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def record(step, split="epoch", loss=1.0, accuracy=0.5):
    return {"step": step, "epoch": step / 10, "split": split, "loss": loss, "accuracy": accuracy}


# Learning curves.


def test_learning_curves_draw_both_splits_in_both_panels():
    records = [
        record(20, loss=1.0, accuracy=0.6),
        record(10, loss=2.0, accuracy=0.4),
        record(20, "validation", loss=1.5, accuracy=0.55),
    ]
    loss, accuracy = drawn(figures.draw_learning_curves, records).axes
    train, validation = loss.lines
    assert train.get_xydata().tolist() == [[10, 2.0], [20, 1.0]]
    assert validation.get_xydata().tolist() == [[20, 1.5]]
    assert (train.get_color(), validation.get_color()) == (BLUE, VERMILLION)
    assert accuracy.lines[0].get_xydata().tolist() == [[10, 0.4], [20, 0.6]]
    names = [t.get_text() for t in accuracy.get_legend().get_texts()]
    assert names == ["train, mean of the epoch", "validation (best 0.550)"]


def test_the_later_record_of_a_step_counts():
    loss, _ = drawn(
        figures.draw_learning_curves, [record(1, loss=9.0), record(2), record(1, loss=3.0)]
    ).axes
    assert loss.lines[0].get_ydata().tolist() == [3.0, 1.0]


def test_what_is_not_finite_leaves_a_gap_and_a_cross():
    records = [record(1), record(2, loss=float("nan")), record(3, loss=float("inf")), record(4)]
    loss, accuracy = drawn(figures.draw_learning_curves, records).axes
    curve, crosses = loss.lines
    assert np.isnan(curve.get_ydata()).tolist() == [False, True, True, False]
    assert (crosses.get_marker(), crosses.get_xdata().tolist()) == ("x", [2, 3])
    assert len(accuracy.lines) == 1
    assert size(figures.learning_curves(records)) == (1200, 480)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(1)],
        [record(5, "validation", accuracy=None)],
        [{"step": 1, "split": "epoch", "loss": 2.0, "learning_rate": 0.1}],
        [{"step": 1, "split": "epoch", "loss": float("nan"), "accuracy": None}],
        [{"step": 3, "event": "compiled"}, record(4, "test")],
    ],
)
def test_learning_curves_of_little_render(records):
    assert size(figures.learning_curves(records)) == (1200, 480)


def test_one_record_is_seen():
    loss, _ = drawn(figures.draw_learning_curves, [record(1)]).axes
    assert loss.lines[0].get_marker() == "o"


def test_panels_without_records_say_so():
    assert texts(drawn(figures.draw_learning_curves, [])).count("nothing recorded") == 2


# Confusion matrix.


def test_confusion_matrix_is_normalised_by_row_and_holds_counts():
    confusion = np.array([[6, 2, 0], [0, 3, 0], [1, 0, 0]])
    figure = drawn(figures.draw_confusion_matrix, confusion, ["cat", "dog", "owl"])
    axes, bar = figure.axes
    share = axes.images[0].get_array()
    np.testing.assert_allclose(share, [[0.75, 0.25, 0], [0, 1, 0], [1, 0, 0]])
    cells = {tuple(map(float, t.get_position())): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "6", (1, 0): "2", (1, 1): "3", (0, 2): "1"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog", "owl"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "owl"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert axes.get_title(loc="left") == "Accuracy 0.750 on 12 examples"
    assert bar.get_ylabel() == "share of the true class"


def test_a_class_without_examples_is_grey():
    axes = drawn(figures.draw_confusion_matrix, np.array([[1, 0], [0, 0]]), ["a", "b"]).axes[0]
    assert np.ma.getmaskarray(axes.images[0].get_array()).tolist() == [[False] * 2, [True] * 2]
    empty = figures.confusion_matrix(np.zeros((2, 2), int), ["a", "b"])
    assert (pixels(empty) == int(PALE[1:3], 16)).all(-1).mean() > 0.2


@pytest.mark.parametrize(
    ("classes", "counted", "named"),
    [(1, True, True), (2, True, True), (20, True, True), (21, False, True), (60, False, True),
     (61, False, False), (1000, False, False)],
)  # fmt: skip
def test_large_confusion_matrices_hold_no_counts_and_no_names(classes, counted, named):
    names = [f"class {i}" for i in range(classes)]
    figure = drawn(figures.draw_confusion_matrix, np.eye(classes, dtype=int), names)
    axes = figure.axes[0]
    assert len(axes.texts) == classes * counted
    assert len([t for t in axes.get_xticklabels() if t.get_text()]) == classes * named
    assert len([t for t in axes.get_yticklabels() if t.get_text()]) == classes * named
    width, height = figure.get_size_inches()
    assert 4 < height <= 8 and 4 < width <= 9


def test_many_classes_name_their_worst_confusions():
    confusion = np.eye(100, dtype=int) * 50
    confusion[3, 4], confusion[7, 5] = 2, 11
    names = [f"class {i}" for i in range(100)]
    figure = drawn(figures.draw_confusion_matrix, confusion, names)
    lines = figure.axes[0].get_xlabel().splitlines()
    assert lines == [
        "predicted class (100)",
        "11 × class 7 taken for class 5",
        "2 × class 3 taken for class 4",
    ]


def test_a_thousand_classes_render():
    data = figures.confusion_matrix(np.eye(1000, dtype=int), [str(i) for i in range(1000)])
    assert size(data) == (1290, 1200)


# Mistakes.


def image(height, width, channels, value=100):
    return np.full((height, width, channels), value, np.uint8)


def test_mistakes_show_each_image_with_its_names():
    items = [
        (image(28, 28, 1), "coat", "shirt", 0.987),
        (image(8, 8, 3), "bag", "dress", 0.5),
        (image(512, 300, 3), "cat", "dog", 0.25),
        (image(1, 64, 1), "one", "two", 0.125),
    ]
    figure = drawn(figures.draw_mistakes, items)
    assert [axes.images[0].get_array().shape for axes in figure.axes] == [
        (28, 28), (8, 8, 3), (512, 300, 3), (1, 64),
    ]  # fmt: skip
    assert figure.axes[0].images[0].get_clim() == (0, 255)
    assert texts(figure)[2:] == [
        "coat", "shirt (0.99)", "bag", "dress (0.50)", "cat", "dog (0.25)", "one", "two (0.12)",
    ]  # fmt: skip
    assert size(figures.mistakes(items)) == (960, 360)


def test_pixels_are_shown_as_they_are():
    data = figures.mistakes(
        [(image(8, 8, 1, 100), "a", "b", 0.9), (image(8, 8, 3, 37), "c", "d", 0.8)]
    )
    shown = pixels(data)
    for value in (100, 37):
        assert (shown == value).all(-1).sum() > 150**2


def test_at_most_25_mistakes():
    items = [(image(8, 8, 1), str(i), "x", 0.5) for i in range(30)]
    figure = drawn(figures.draw_mistakes, items)
    assert len(figure.axes) == 25
    assert "24" in texts(figure) and "25" not in texts(figure)


def test_no_mistakes_say_so():
    figure = drawn(figures.draw_mistakes, [])
    assert not figure.axes and "No mistakes" in texts(figure)[0]
    assert size(figures.mistakes([])) == (750, 150)


# The plan.

PROBE = network({"head": "head"})
MIXED = network({("layer_1", "convolution"): "trunk", "head": "head"})
PLAN = plan(MIXED)


def boxes(figure, colour):
    wanted = matplotlib.colors.to_rgba(colour)
    return [
        p for p in figure.axes[0].patches if p.get_facecolor() == wanted and p.get_width() > 0.2
    ]


def swatches(figure):
    return [p.get_facecolor() for p in figure.axes[0].patches if p.get_width() < 0.2]


def test_plan_colours_blocks_by_group():
    figure = drawn(figures.draw_plan, PLAN)
    stem, lower, above = boxes(figure, SKY)
    (part,), (head,), (pool,) = (boxes(figure, c) for c in (ORANGE, VERMILLION, PALE))
    for box in (stem, lower, head, pool):
        assert box.get_height() == pytest.approx(plan_figure.TALL)
    assert part.get_height() + above.get_height() == pytest.approx(plan_figure.TALL)
    assert part.get_x() == above.get_x() and part.get_y() < above.get_y()
    assert stem.get_x() < lower.get_x() < part.get_x() < pool.get_x() < head.get_x()


def test_a_share_is_that_of_the_parameters_and_is_seen():
    halves = [leaf("a", "mlp", 500, "trunk", blocks="a"), leaf("a", "norm", 500, blocks="a")]
    figure = drawn(figures.draw_plan, plan(halves, blocks=("a",)))
    assert boxes(figure, ORANGE)[0].get_height() == pytest.approx(plan_figure.TALL / 2)
    sliver = [leaf("a", "mlp", 10**6, blocks="a"), leaf("a", "adapter", 1, "adapter", blocks="a")]
    figure = drawn(figures.draw_plan, plan(sliver, blocks=("a",)))
    assert boxes(figure, GREEN)[0].get_height() > 0.09 * plan_figure.TALL


def test_plan_names_blocks_counts_and_groups():
    found = texts(drawn(figures.draw_plan, PLAN))
    assert found[:5] == [
        "sample: 100K of 198K parameters train (50.8 %)",
        "frozen 97.4K",
        "trunk 80.0K",
        "head 20.5K",
        "gradients end here",
    ]
    assert {"stem", "layer_0", "layer_1", "pool", "head", "9.41K", "84.0K", "20.5K"} < set(found)


def test_a_row_for_each_phase_with_its_own_boundary():
    both = network(dict.fromkeys(("stem", "layer_0", "layer_1"), "trunk") | {"head": "head"})
    figure = drawn(figures.draw_plan, plan(PROBE, (both, {"learning_rate": 0.01})))
    found = texts(figure)
    assert {"1. phase_0", "steps 1 to 200", "20.5K train, rate 0.1"} < set(found)
    assert {"2. phase_1", "steps 201 to 400", "198K train, rate 0.01"} < set(found)
    assert "frozen" in found and "trunk 177K" in found and found.count("layer_0") == 1
    assert len(boxes(figure, SKY)) == len(boxes(figure, ORANGE)) == 3
    assert boxes(figure, SKY)[0].get_y() > boxes(figure, ORANGE)[0].get_y()
    segments = [c.get_segments() for c in figure.axes[0].collections]
    upright = [s for (s,) in segments if s[0][0] == s[1][0]]
    head, stem = boxes(figure, VERMILLION)[0].get_x(), boxes(figure, ORANGE)[0].get_x()
    _legend, first, second = (line[0][0] for line in upright)
    assert second < stem and stem < first < head


def test_what_stays_frozen_through_all_phases_is_counted():
    found = texts(drawn(figures.draw_plan, plan(PROBE, MIXED)))
    assert "frozen 97.4K throughout" in found


def test_groups_of_one_kind_are_shaded_by_rate():
    groups = {"layer_0": ("trunk/layer_0", 0.01), "layer_1": ("trunk/layer_1", 0.1)}
    figure = drawn(figures.draw_plan, plan(network({**groups, "head": "head"})))
    found = texts(figure)
    assert "trunk/… 168K, rate × 0.01–0.1" in found and {"×.01", "×.1", "×1"} < set(found)
    pale, full = (matplotlib.colors.to_rgba(c) for c in ("#F8E2B2", ORANGE))
    assert swatches(figure)[1:3] == [pale, full]
    assert boxes(figure, "#F8E2B2")[0].get_x() < boxes(figure, ORANGE)[0].get_x()


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.0, "1"),
        (0.0563, ".056"),
        (7.5e-4, "8e-4"),
        (0.00237, ".0024"),
        (2.4e-7, "2e-7"),
        (10, "10"),
    ],
)
def test_rates_are_short(rate, text):
    assert plan_figure._short(rate) == text


def test_groups_of_the_same_rate_are_told_apart():
    groups = {"layer_0": "trunk/2", "layer_1": "trunk/1", "head": "head"}
    figure = drawn(figures.draw_plan, plan(network(groups)))
    assert {"trunk/2 84.0K", "trunk/1 84.0K"} < set(texts(figure))
    assert len(set(swatches(figure))) == 4


def long_plan(phases):
    names = ("embeddings", *(f"stages_2/layers_{i}" for i in range(51)), "head")
    sizes = [
        leaf(n, "mlp", 12_345_678, f"trunk/{n}", 0.75 ** (53 - i), blocks=names)
        for i, n in enumerate(names)
    ]
    return plan(*[sizes] * phases, blocks=names, strategy="a_strategy_of_a_long_name" * 2)


@pytest.mark.parametrize("phases", [1, 3])
def test_long_chains_wrap_and_everything_stays_on_the_page(phases):
    figure = drawn(figures.draw_plan, long_plan(phases))
    rows = {round(p.get_y(), 3) for p in figure.axes[0].patches if p.get_width() > 0.2}
    assert len(rows) == 3 * phases
    width, height = size(figures.plan(long_plan(phases)))
    check_texts(figure, width, height)


def check_texts(figure, width, height):
    """All on the page, and none over another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = [(text, text.get_window_extent(renderer)) for text in figure.axes[0].texts]
    for text, box in found:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(found, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


PLANS = {
    "probe": plan(PROBE),
    "phases": plan(PROBE, MIXED, MIXED),
    "groups": plan(network({b: f"trunk/[{b}].*" for b in ("stem", "layer_0", "layer_1")})),
    "one": plan([leaf("a", "mlp", 1, "head", blocks="a")], blocks=("a",)),
    "empty block": plan([leaf("a", "mlp", 1, blocks="ab")], blocks=("a", "b")),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_render(name):
    width, height = size(figures.plan(PLANS[name]))
    assert 850 <= width <= 1400
    check_texts(drawn(figures.draw_plan, PLANS[name]), width, height)


# Untrusted text, and what all figures share.


@pytest.mark.parametrize("name", NASTY)
def test_names_are_not_parsed_and_cannot_break_a_figure(name):
    confusion = figures.confusion_matrix(np.ones((2, 2), int), [name, name])
    assert size(confusion) == (780, 690)
    assert size(figures.mistakes([(image(8, 8, 1), name, name, 0.5)])) == (720, 360)
    named = leaf(name, name, 1, f"trunk/{name}", blocks=(name,))
    assert size(figures.plan(plan([named], [named], blocks=(name,), strategy=name)))[0] == 870
    figure = drawn(figures.draw_confusion_matrix, np.ones((2, 2), int), [name, name])
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_label():
    assert label("two\n  lines\t_$") == "two lines _$"
    assert label("a\x00b\ud800c\u202ed") == "abcd"
    assert label("x" * 24) == "x" * 24
    assert label("x" * 25) == "x" * 23 + "…"
    assert label("a word cut", 8) == "a word…"
    assert label("日本語日本語", 12) == "日本語日本語"
    assert label("日本語日本語", 11) == "日本語日本…"
    assert label("") == label("\n") == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00K"), (9_999, "10.0K"), (20_490, "20.5K"), (99_960, "100K"),
     (999_499, "999K"), (999_500, "1.00M"), (23_508_032, "23.5M"), (10**10, "10.0B")],
)  # fmt: skip
def test_count(number, text):
    assert count(number) == text


def test_the_same_figure_is_the_same_bytes():
    assert figures.plan(PLAN) == figures.plan(PLAN)


def test_settings_of_the_user_neither_matter_nor_change():
    plain = figures.plan(PLAN)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        assert figures.plan(PLAN) == plain
        assert dict(matplotlib.rcParams) == before


def test_a_failure_restores_the_settings():
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError):
        png(lambda: 1 / 0)
    assert dict(matplotlib.rcParams) == before


def test_importing_the_figures_does_not_import_matplotlib_and_drawing_not_pyplot():
    code = (
        "import sys, types, pathlib\n"
        "from tl_jax import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.learning_curves([])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
