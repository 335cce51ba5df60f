"""Draws what the other benchmarks measured.

    python benchmarks/draw.py time_to_probe LINES.jsonl docs/images/time_to_probe.png
    python benchmarks/draw.py depth LINES.jsonl docs/images/cost_by_depth.png
    python benchmarks/draw.py image_size LINES.jsonl docs/images/cost_by_image_size.png
    python benchmarks/draw.py head_grid LINES.jsonl docs/images/head_grid.png

LINES.jsonl holds the JSON lines that time_to_probe.py, step.py (`--vary depth`, `image_size`) or
head_grid.py printed; other lines are left out.
"""

import argparse
import json
from pathlib import Path

from tl_jax import figure_style


def read(path):
    """The JSON lines of a file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line[:1] == "{"]


def time_to_probe(axes, rows):
    """Seconds against epochs, a line a method, beside one forward pass."""
    for method in dict.fromkeys(row["method"] for row in rows if row["epochs"]):
        mine = [row for row in rows if row["method"] == method]
        axes.plot([r["epochs"] for r in mine], [r["seconds"] for r in mine], "o-", label=method)
    for row in rows:
        if not row["epochs"]:
            axes.axhline(row["seconds"], ls=":", c="0.4" if row["method"] == "forward" else "0.7")
            side = "top" if row["method"] == "forward" else "bottom"
            middle = max(row["epochs"] or 1 for row in rows) ** 0.5
            axes.annotate(row["method"], (middle, row["seconds"]), va=side, fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="epochs", ylabel="seconds")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()


def _law(axes, rows, label):
    """Measured time of a step, and the least FLOPs scaled to pass through the last point."""
    x = [row["case"] for row in rows]
    axes.plot(x, [1e3 * row["seconds"] for row in rows], "o-", label="measured")
    scale = rows[-1]["seconds"] / rows[-1]["flops_minimum"]
    law = [1e3 * scale * row["flops_minimum"] for row in rows]
    axes.plot(x, law, "--", label="least FLOPs, scaled to the last point")
    axes.set(xlabel=label, ylabel="milliseconds a step", ylim=(0, None))
    axes.legend()


def depth(axes, rows):
    """Time of a step against the number of blocks that train."""
    _law(axes, rows, "blocks that train, from the top")


def image_size(axes, rows):
    """Time of a step against the height and width of the images."""
    _law(axes, rows, "height and width in pixels")


def head_grid(axes, rows):
    """Time of a whole run against the number of heads that it searched."""
    seconds = [row["seconds"] for row in rows]
    axes.plot([row["heads"] for row in rows], seconds, "o-")
    axes.set(xscale="log", xlabel="heads", ylabel="seconds, cache included")
    axes.set_ylim(0, 1.1 * max(seconds))
    axes.xaxis.set_major_formatter("{x:g}")


def main():
    kinds = {f.__name__: f for f in (time_to_probe, depth, image_size, head_grid)}
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("lines")
    parser.add_argument("picture")
    flags = parser.parse_args()

    def draw():
        figure = figure_style.new_figure(5.0, 3.2, layout="constrained")
        kinds[flags.kind](figure.add_subplot(), read(flags.lines))
        return figure

    Path(flags.picture).write_bytes(figure_style.png(draw))


if __name__ == "__main__":
    main()
