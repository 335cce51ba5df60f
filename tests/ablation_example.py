"""A small sweep: two strategies and two seeds of a tiny network on the quickstart's digits."""

import csv
import pathlib

import command_line

STRATEGIES = ("linear_probe", "top_k")
AXES = (
    ("strategy", tuple({"freeze.strategy": name} for name in STRATEGIES)),
    ("seed", (0, 1)),
)
RATES = (0.01, 1e38)  # with the second no loss stays finite
MEASURE = {
    "probe_images": 16,
    "shifts": ("contrast",),
    "severities": (3,),
    "shift_images": 32,
    "gradient_steps": 2,
}
# What depends on the clock and on the machine's memory.
CLOCK = ("seconds", "memory")


def write(folder: pathlib.Path, network: str, *, axes=AXES, **ablate) -> pathlib.Path:
    """A config file of a sweep; `ablate` holds fields of its section."""
    section = {"axes": axes, "learning_rates": RATES, "measure": MEASURE, **ablate}
    fields = {"cache": "auto", "ablate": section}
    return command_line.write_config(folder / "sweep.py", network, **fields)


def rows(workdir: pathlib.Path) -> list[dict[str, str]]:
    """`results.csv` without what depends on the clock."""
    with (workdir / "ablation" / "results.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not any(word in k for word in CLOCK)}
            for row in csv.DictReader(file)
        ]
