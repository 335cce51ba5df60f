"""The written files: the same numbers everywhere, hostile names, and the same bytes each time."""

import csv
import html
import html.parser
import io
import json
import re

import pytest
from report_examples import cell, full_sweep, hits, sweep

from tl_jax import report
from tl_jax.report import answers, cell_table, cells, markdown
from tl_jax.workdir import WorkDir


def written(tmp_path, results):
    said = report.write(WorkDir(tmp_path), results)
    return said, tmp_path / "ablation"


class Page(html.parser.HTMLParser):
    """Tables by id: rows of (text, data-value or text)."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self._row, self._cell = {}, [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables[dict(attrs)["id"].removeprefix("table-")] = []
        elif tag == "tr":
            self._row = []
            self._rows.append(self._row)
        elif tag in ("td", "th"):
            self._cell = [dict(attrs).get("data-value"), ""]

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            exact, text = self._cell
            self._row.append((text, text if exact is None else exact))
            self._cell = None


def rows_of_csv(folder):
    return list(csv.reader(io.StringIO((folder / "results.csv").read_text())))


def test_all_files_are_there(sample):
    _, folder = sample
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {"accuracy.png", "accuracy.pdf", "plan_0.png", "plan_0.pdf", "drift_2.png"} <= figures
    linked = re.findall(r"\(figures/([^)]+)\)", (folder / "report.md").read_text())
    assert set(linked) == figures
    assert (folder / "report.html").stat().st_size < 4e6


def test_html_and_csv_hold_the_same_cells(sample):
    _, folder = sample
    header, *lines = rows_of_csv(folder)
    page = Page((folder / "report.html").read_text())
    _, *shown = page.tables["cells"]
    assert len(lines) == len(shown) == 48
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    for line, row in zip(lines, shown, strict=True):
        assert [line[i] for i in filled] == [exact for _, exact in row]
    place = header.index("accuracy")
    for line, row in zip(lines, shown, strict=True):
        text = row[filled.index(place)][0]
        assert text == (f"{100 * float(line[place]):.1f} %" if line[place] else "–")


def test_html_and_markdown_hold_the_same_tables(sample):
    _, folder = sample
    page = Page((folder / "report.html").read_text())
    text = (folder / "report.md").read_text()
    for key in ("strategies-0", "strategies-1", "differences", "shifts", "forgetting", "search"):
        for row in page.tables[key]:
            line = "| " + " | ".join(markdown.escape(shown) for shown, _ in row) + " |"
            assert line in text


def test_the_answers_come_first_in_both(sample):
    said, folder = sample
    page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
    plain = html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\u00a0", " ")
    for paragraph in said:
        assert 0 < plain.find(paragraph) < plain.find("All paired comparisons")
    assert text.index("has the highest mean accuracy") < text.index("##")


def test_failed_and_missing_cells_are_listed(sample):
    _, folder = sample
    header, *lines = rows_of_csv(folder)
    by_status = {
        line[header.index("status")]: dict(zip(header, line, strict=True)) for line in lines
    }
    assert by_status["failed"]["error"] == "RunFailed: the loss is not finite at step 12"
    assert by_status["missing"]["accuracy"] == "" and by_status["missing"]["command"]
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "the loss is not finite at step 12" in text and "surgical,100,2" in text


def test_the_csv_keeps_all_digits(sample):
    _, folder = sample
    header, first, *_ = rows_of_csv(folder)
    row = dict(zip(header, first, strict=True))
    expected = full_sweep(n=200)["cells"][0]
    assert float(row["accuracy"]) == expected["summary"]["metrics"]["test"]["accuracy"]
    assert row["certificate"] == "ok" and row["examples"] == "200"
    assert float(row["training_flops"]) == 150 * expected["summary"]["cost"]["flops_per_step"]


def test_nothing_can_be_loaded(sample):
    _, folder = sample
    text = (folder / "report.html").read_text()
    page = Page(text)
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attrs)


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(tmp_path):
    results = full_sweep(("linear_probe",), settings=("10",), n=50)
    for name in ("one", "two"):
        written(tmp_path / name, json.loads(json.dumps(results)))
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in _files(tmp_path / name)}
        for name in ("one", "two")
    )
    assert one == two


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_hostile_names_stay_text(hostile):
    folder = hostile
    text = (folder / "report.html").read_text()
    page = Page(text)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert text.count("</script>") == 3
    assert "\u202e" not in text and "\x00" not in text
    assert "alert(1)" in "".join(shown for row in page.tables["cells"] for shown, _ in row)
    document = (folder / "report.md").read_text()
    outside = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", document, flags=re.S | re.M)
    outside = re.sub(r"\]\(figures/\w+\.(png|pdf)\)", "", outside)
    assert "<img" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    width = 0
    for line in outside.splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("| ") else 0
        assert not (width and bars) or bars == width  # no name begins a column
        width = bars
    names = {path.name for path in (folder / "figures").iterdir()}
    assert all(re.fullmatch(r"\w+\.(png|pdf)", name) for name in names)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@sum", "\tx"])
def test_no_cell_of_the_csv_is_a_formula(text):
    assert cell_table.harmless(text) == "'" + text


@pytest.mark.parametrize("text", ["-1.5", "+2", "1e-5", "plain", "", "a=b"])
def test_numbers_and_plain_text_are_left_alone(text):
    assert cell_table.harmless(text) == text


def test_formulas_in_names_errors_and_axes(tmp_path):
    made = [cell({"strategy": "=A1", "@axis": "-x"}, status="failed", error="+boom")]
    _, folder = written(tmp_path, sweep(made))
    header, row = rows_of_csv(folder)
    assert header[:2] == ["strategy", "'@axis"]
    assert row[:2] == ["'=A1", "'-x"] and "'+boom" in row


def test_no_axis_doubles_a_column(tmp_path):
    values = {"strategy": "a", "status": "b", "loss": "c", "axis loss": "d"}
    _, folder = written(tmp_path, sweep([cell(values, status="failed")]))
    header, row = rows_of_csv(folder)
    assert header[:4] == ["strategy", "axis status", "axis axis loss", "axis loss"]
    assert row[:5] == ["a", "b", "c", "d", "failed"]
    assert len(set(header)) == len(header)


def test_commands_are_fenced_whatever_they_hold():
    assert markdown.fenced("a ``` b")[0] == "````sh"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b", r"a\_b"),
        ("<b>", "&lt;b&gt;"),
        ("a|b", r"a\|b"),
        ("[x](y)", r"\[x\](y)"),
        (" two\nlines ", " two lines "),
        ("$x$", r"\$x\$"),
    ],
)
def test_markdown_is_escaped(text, escaped):
    assert markdown.escape(text) == escaped


SMALL = {
    "one seed": [cell({"strategy": s, "n": "1", "seed": "0"}, hits=hits(0.8, 60, s)) for s in "ab"],
    "one strategy": [cell({"strategy": "a", "seed": s}, hits=hits(0.8, 60, s)) for s in "012"],
    "no seeds": [cell({"strategy": s}) for s in "ab"],
    "nothing finished": [cell({"strategy": s}, status="missing") for s in "ab"],
    "equal": [cell({"strategy": s, "seed": k}, hits=[0, 1] * 30) for s in "ab" for k in "01"],
    "another axis": [cell({"rate": s}, compared="rate") for s in ("0.1", "0.01")],
}


@pytest.mark.parametrize("name", SMALL)
def test_small_sweeps_are_written(tmp_path, name):
    compared = "rate" if name == "another axis" else "strategy"
    said, folder = written(tmp_path, sweep(SMALL[name], compared))
    assert said and len(rows_of_csv(folder)) == 1 + len(SMALL[name])
    assert "nan" not in (folder / "report.md").read_text()


def test_what_is_not_finite_is_left_out(tmp_path):
    one = cell({"strategy": "a"})
    one["summary"]["metrics"]["test"]["loss"] = float("nan")
    one["curves"] = [{"step": 1, "epoch": 1.0, "split": "validation", "accuracy": None}]
    one["search"] = {"trials": [{"learning_rate": 1.0, "accuracy": None, "loss": None}]}
    _, folder = written(tmp_path, sweep([one]))
    header, row = rows_of_csv(folder)
    assert row[header.index("loss")] == ""


def test_hits_outweigh_the_rounded_summary():
    one = cell({"strategy": "a", "seed": "0"}, share=0.8, hits=[1, 1, 0])
    two = cell({"strategy": "a", "seed": "1"}, share=0.8, hits=[1, 0, 0])
    answer = answers.find(cells.read(sweep([one, two]))).settings[0]
    assert answer.best.accuracy.mean == pytest.approx(0.5)
