"""What a sweep shows in the terminal."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
from rich.markup import escape
from rich.table import Table

from tl_jax.ablation_config import Sweep
from tl_jax.display import accuracy, console
from tl_jax.errors import printable
from tl_jax.launchers import Outcome
from tl_jax.report.words import counted


def plan(sweep: Sweep, estimates: Mapping[str, Any]) -> None:
    """The runs by group, what each takes, what they share, and how long all may take."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("runs that differ in the seed alone", no_wrap=True)
    for name in ("runs", "trials", "parameters", "GFLOP a run"):
        table.add_column(name, justify="right")
    table.add_column("trains from")
    table.add_column("cache")
    total, runs, trials = 0.0, 0, 0
    for group, cells in sweep.groups.items():
        found = estimates["groups"][group]
        tried = len(cells[0].rates)
        kinds = dict.fromkeys(c["kind"] if c["first"] else "–" for c in found["cache"])
        table.add_row(
            escape(group),
            str(len(cells)),
            str(tried) if tried else "–",
            f"{found['trainable']:,}",
            f"{found['flops'] / 1e9:,.1f}",
            escape(printable(found["boundary"])),
            ", ".join(kinds),
        )
        total += (found["flops"] - found["shared"]) * (len(cells) + tried)
        runs, trials = runs + len(cells), trials + tried
    console.print(table)
    prefixes: dict[tuple[str, int | None], float] = {}
    begin = 0
    for group, cells in sweep.groups.items():
        if (found := estimates["groups"][group])["prefix"]:
            begin += 1
            seeds = [cell.config.seed for cell in cells] if found["by_seed"] else [None]
            prefixes |= {(found["prefix"], seed): found["shared"] for seed in seeds}
    total += sum(prefixes.values())
    minutes = total / estimates["flops_per_second"] / 60
    lines = [
        f"{counted(runs, 'run')} and {counted(trials, 'trial')} of learning rates in "
        f"{counted(len(sweep.groups), 'group')}.",
        f"Training takes about {total / 1e9:,.3g} GFLOP, {minutes:.2g} min at the "
        f"{estimates['flops_per_second'] / 1e9:,.3g} GFLOP/s that one forward pass reaches here; "
        "starting, compiling, evaluating and measuring come on top.",
    ]
    if prefixes:
        lines.append(
            f"Groups that start from a frozen prefix: {begin}; prefixes that differ: "
            f"{len(prefixes)}. One is computed once for runs that follow each other, and counts "
            "once."
        )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def track(what: str, total: int, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes, a line printed for each as it comes."""
    started = time.perf_counter()
    for number, outcome in enumerate(outcomes, 1):
        took = time.perf_counter() - started
        text = f"[{number}/{total} {what}, {took:.0f} s] {outcome.task.name}: {_said(outcome)}"
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        yield outcome


def _said(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"FAILED: {outcome.error}"
    found = outcome.result
    if "metrics" not in found:
        return f"learning rate {found['learning_rate']:g}" + ", at the edge" * found["at_edge"]
    split = "test" if "test" in found["metrics"] else "validation"
    metrics = found["metrics"].get(split)
    return f"{split} {accuracy(metrics)}" if metrics else "done"


def answers(sentences: Sequence[str], folder: Any) -> None:
    """What the report says first, and where it lies."""
    console.print()
    for sentence in sentences:
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nThe report: {escape(str(folder))}/report.html (and report.md, results.csv)")
