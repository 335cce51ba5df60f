"""What a run shows in the terminal."""

import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.progress
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tl_jax.config import Config
from tl_jax.errors import printable
from tl_jax.evaluation import Evaluation

# Nobody's window to fit into: a pipe or a file takes the tables' own width.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class Progress:
    """A bar over the training steps with the newest figures; in a pipe or file, a line an epoch.

    Args:
      done: steps done before this start.
      total: steps of the whole training.
      steps_per_epoch: when a line is due.
    """

    def __init__(self, done: int, total: int, steps_per_epoch: int):
        self._total, self._steps_per_epoch = total, steps_per_epoch
        self._figures: dict[str, float] = {}
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def show(self, step: int, figures: Mapping[str, float], split: str) -> None:
        """Moves the bar and renews loss and accuracy of a split."""
        name = "validation" if split == "validation" else "loss"
        self._figures[name] = figures["accuracy" if split == "validation" else "loss"]
        text = "  ".join(f"{name} {value:.4f}" for name, value in self._figures.items())
        self._bar.update(self._task, completed=step, figures=text)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def filling(self, pieces: Iterable[Any], layout: Any) -> Iterator[Any]:
        """The pieces of a cache (leaves and labels), with a bar of its own while they come."""
        task = self._bar.add_task("filling", total=layout.rows, figures=f"cache of {layout.name}")
        for leaves, labels in pieces:
            self._bar.update(task, advance=len(labels))
            yield leaves, labels
        self._bar.remove_task(task)

    def end_epoch(self, step: int) -> None:
        """Where there is no bar to look at, prints the figures."""
        if not console.is_terminal:
            epoch, epochs = step // self._steps_per_epoch, self._total // self._steps_per_epoch
            text = "  ".join(f"{name} {value:.4f}" for name, value in self._figures.items())
            console.print(f"epoch {epoch} of {epochs}  {text}")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def accuracy(metrics: Mapping[str, Any]) -> str:
    """`0.874 [0.867, 0.880] of 10,000`."""
    low, high = metrics["accuracy_ci95"]
    return f"{metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}] of {metrics['examples']:,}"


def result(summary: Mapping[str, Any], workdir: Any) -> Table:
    """What a finished run found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for split in ("test", "validation"):
        if metrics := summary["metrics"].get(split):
            table.add_row(f"{split} accuracy", f"{accuracy(metrics)} (95 % interval)")
    certificate, parameters = summary["freeze"]["certificate"], summary["model"]["parameters"]
    if not certificate["leaves"]:
        table.add_row("certificate", "nothing was to stay frozen")
    elif certificate["ok"]:
        table.add_row(
            "certificate", f"ok: {certificate['leaves']} frozen leaves bit for bit as before"
        )
        table.add_row("", f"(sha256 {certificate['sha256_after'][:16]}…)")
    else:
        table.add_row("certificate", "[red]BROKEN: what was to stay frozen moved[/]")
    share = parameters["trainable"] / parameters["total"]
    percent = f"{100 * share:.2g}" if share < 0.99 else f"{100 * share:.4g}"
    table.add_row("trained", f"{parameters['trainable']:,} parameters ({percent} % of all)")
    if len(summary["freeze"]["phases"]) > 1 and "best_phase" in summary["steps"]:
        steps = summary["steps"]
        table.add_row(
            "checkpoint",
            f"of step {steps['best']} of {steps['trained']}, in the phase {steps['best_phase']}: "
            "the best by validation, else the last",
        )
    cost = summary["cost"]
    least = cost["flops_per_step"] / cost["flops_minimum"]
    table.add_row(
        "cost",
        f"{cost['train_seconds']:.1f} s at {cost['examples_per_second']:,.0f} images/s, "
        f"{least:.3f} × the least FLOPs",
    )
    table.add_row("work directory", escape(str(workdir)))
    return table


def evaluation_table(split: str, found: Evaluation, class_names: Sequence[str]) -> Group:
    """Accuracy of a split, and of each of its classes."""
    title = escape(f"{split}: accuracy {accuracy(found.summary())}, loss {found.loss:.4f}")
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("examples", justify="right")
    table.add_column("accuracy", justify="right")
    rows = zip(class_names, found.confusion.sum(1), found.per_class_accuracy, strict=True)
    for name, examples, share in rows:
        table.add_row(
            escape(printable(name)), f"{examples:,}", "–" if share is None else f"{share:.4f}"
        )
    return Group(title, table)  # a table's own title wraps at the table's width


def grid_table(searched: Mapping[str, Any], classes: int, most: int = 5) -> Group:
    """The best heads of a grid; and whether the best one's loss is worse than guessing."""
    found = [row for row in searched["settings"] if row["validation"] is not None]
    ranked = sorted(
        found, key=lambda row: (-row["validation"]["accuracy"], row["validation"]["loss"])
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    names = list(searched["chosen"])
    for name in (*names, "validation accuracy", "epoch"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in ranked[:most]:
        figures = row["validation"]
        cells = [
            f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in names
        ]
        table.add_row(*cells, f"{figures['accuracy']:.4f}", str(figures["epoch"]))
    lost = len(searched["settings"]) - len(found)
    infinite = f", of which {lost} did not stay finite" if lost else ""
    text = f"{len(searched['settings'])} heads{infinite}; by validation the best:"
    lines: list[Any] = [text, table]
    loss, guessing = ranked[0]["validation"]["loss"], math.log(classes)
    if loss > guessing:
        lines.append(
            f"The best head's loss on validation, {loss:.3g}, is above that of guessing, "
            f"{guessing:.3g}: its probabilities mean nothing. Try lower learning rates."
        )
    return Group(*lines)


def baselines_table(found: Mapping[str, Any]) -> Group:
    """What the features are worth by other means."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("on the same features")
    table.add_column("test accuracy (95 % interval)")
    table.add_column("chosen by validation")
    for name, row in found.items():
        low, high = row["test_accuracy_ci95"]
        setting = f"k = {row['neighbours']}" if "neighbours" in row else f"λ = {row['penalty']:g}"
        table.add_row(
            name.replace("_", " "), f"{row['test_accuracy']:.4f} [{low:.4f}, {high:.4f}]", setting
        )
    return Group("Baselines", table)


def side_by_side(ours: Mapping[str, Any], control: Mapping[str, Any]) -> Table:
    """What transfer bought: the run beside its control."""
    table = Table(
        title="What transfer bought", title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("trunk")
    table.add_column("strategy")
    table.add_column("test accuracy (95 % interval)")
    for trunk, summary in (("pretrained", ours), ("random weights", control)):
        if metrics := summary["metrics"].get("test"):
            table.add_row(trunk, summary["freeze"]["strategy"], accuracy(metrics))
    return table


def predictions(name: str, ranked: list[tuple[str, float]]) -> Group:
    """Classes of one image with their probabilities, best first."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("probability", justify="right")
    for label, probability in ranked:
        table.add_row(escape(printable(label)), f"{probability:.4f}")
    return Group(escape(printable(name)), table)


def what_next(command: Sequence[str], workdir: Any, config: Config, own_head: bool = False) -> str:
    """Commands to try after a run.

    Args:
      command: the run's own command line without its work directory.
      workdir: of the run.
      config: of the run.
      own_head: whether the head is one that transformers' classifier does not have.
    """
    other = "full" if config.freeze.strategy == "top_k" else "top_k"
    again = [*command, f"--config.freeze.strategy={other}", f"--workdir={workdir}_{other}"]
    images = ["python", "run.py", "--mode=predict", f"--workdir={workdir}", "--images"]
    folder = escape(str(workdir))
    look = f"Look at {folder}/figures; " if config.logging.figures else ""
    return (
        "\n[bold]What to try next[/]\n"
        "Another strategy (add --mode=plan to see its plan first):\n"
        f"  {escape(shlex.join(again))}\n"
        "The classifier on images of your own:\n"
        f"  {escape(shlex.join(images))} a.png b.png\n"
        f"{look}{folder}/export is the classifier, "
        + ("whose trunk transformers loads." if own_head else "for transformers or the Hub.")
    )
