"""A sweep's results, as they were handed over, in the form that the report works with."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tl_jax.errors import printable
from tl_jax.report.words import finite

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What compared cells share: the values of the axes but that of comparison and the seed."""

    values: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """`examples_per_class = 10, image_size = 64`; nothing where there are no such axes."""
        return ", ".join(f"{short_axis(axis)} = {value}" for axis, value in self.values)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the sweep.

    Attributes:
      strategy: its value on the axis that is compared.
      certificate: "ok", "BROKEN", or "n.a." where nothing stays frozen or nothing is known.
      numbers: by column of `results.csv`; None where unknown. Accuracies are shares, times seconds.
        `clean_accuracy` is that on the images that are then shifted, else on the whole test split.
      hits: bool [N], which test examples were right.
      search, plan, measures: as in the results, empty where there is none.
      grid: settings of heads that it tried itself (`probe.grid`), and which was chosen; or empty.
      curves: records of `metrics.jsonl`.
    """

    name: str
    status: str
    error: str
    values: Mapping[str, str]
    strategy: str
    setting: Setting
    seed: str
    workdir: str
    command: str
    certificate: str
    numbers: Mapping[str, float | None]
    hits: np.ndarray | None
    search: Json
    grid: Json
    plan: Json
    measures: Json
    curves: Sequence[Json] = field(default_factory=tuple)

    @property
    def finished(self) -> bool:
        """Whether it has an accuracy."""
        return self.status == "finished" and self.numbers["accuracy"] is not None

    @property
    def at_edge(self) -> bool:
        """Whether its learning rate is the least or the greatest of several that were tried."""
        if len(rates := {setting["learning_rate"] for setting in self.settings}) > 1:
            return self.grid["chosen"]["learning_rate"] in (min(rates), max(rates))
        return bool(self.search.get("at_edge"))

    @property
    def settings(self) -> Sequence[Json]:
        """Of its grid of heads, none without one."""
        return self.grid.get("settings") or ()

    @property
    def tried(self) -> int:
        """How many settings validation chose from."""
        return max(1, len(self.search.get("trials") or ())) * max(1, len(self.settings))


@dataclass(frozen=True, eq=False)
class Sweep:
    """All cells. `axes` holds the values' names in their order; `compared` is one of the axes."""

    name: str
    command: str
    compared: str
    axes: Mapping[str, Sequence[str]]
    environment: Json
    cells: Sequence[Cell]

    @property
    def strategies(self) -> Sequence[str]:
        """The values that are compared, in their order."""
        return self.axes[self.compared]

    @property
    def noun(self) -> str:
        """What one of them is called."""
        return short_axis(self.compared).replace("_", " ")

    @property
    def nouns(self) -> str:
        """The same of many."""
        noun = self.noun
        if noun == "data":  # is one
            return noun
        if noun == "pretrained":
            return "pretrained networks"
        if noun.endswith(("s", "x", "ch", "sh")) or len(noun) == 1:
            return f"values of {noun}"
        return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"

    @property
    def settings(self) -> list[Setting]:
        """Those that have a cell, in the order of their axes."""
        axes = [(axis, self.axes[axis]) for axis in self.setting_axes]
        present = {cell.setting for cell in self.cells}
        every = itertools.product(*([(axis, v) for v in values] for axis, values in axes))
        return [setting for setting in map(Setting, every) if setting in present]

    @property
    def setting_axes(self) -> list[str]:
        """The axes that make a setting."""
        return [axis for axis in self.axes if axis not in (self.compared, "seed")]

    def finished(self, strategy: str, setting: Setting) -> list[Cell]:
        """The finished cells of a strategy in a setting, one a seed, in the order of the seeds."""
        return [
            cell
            for cell in self.cells
            if cell.finished and (cell.strategy, cell.setting) == (strategy, setting)
        ]


def short_axis(axis: str) -> str:
    """The last part of a dotted name."""
    return axis.rpartition(".")[2] or axis


def read(results: Json) -> Sweep:
    """The results as a `Sweep`. All text is brought onto one line, without control characters."""
    results = _clean(results)
    compared = results["compared"]
    axes = {axis: list(map(str, values)) for axis, values in results["axes"].items()}
    cells = [_cell(cell, compared, axes) for cell in results["cells"]]
    return Sweep(
        results["name"],
        results.get("command") or "",
        compared,
        axes,
        results.get("environment") or {},
        cells,
    )


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not (value and isinstance(value[0], int | float)):
        return [_clean(item) for item in value]
    return value


def _cell(cell: Json, compared: str, axes: Mapping[str, Sequence[str]]) -> Cell:
    values = {axis: str(cell["values"].get(axis, "")) for axis in axes}
    status = cell.get("status") or "missing"
    summary = (cell.get("summary") or {}) if status == "finished" else {}
    measures = cell.get("measures") or {}
    hits = cell.get("hits")
    kept = tuple((axis, values[axis]) for axis in axes if axis not in (compared, "seed"))
    return Cell(
        name=cell["name"],
        status=status,
        error=cell.get("error") or "",
        values=values,
        strategy=values[compared],
        setting=Setting(kept),
        seed=values.get("seed", ""),
        workdir=cell.get("workdir") or "",
        command=cell.get("command") or "",
        certificate=_certificate(_get(summary, "freeze", "certificate") or {}),
        numbers=_numbers(cell, summary, measures),
        hits=None if hits is None or not summary or not len(hits) else np.asarray(hits, bool),
        search=cell.get("search") or {},
        grid=summary.get("probe") or {},
        plan=cell.get("plan") or {},
        measures=measures if summary else {},
        curves=cell.get("curves") or (),
    )


def _certificate(certificate: Json) -> str:
    if certificate.get("ok") is False:
        return "BROKEN"
    return "ok" if certificate.get("ok") and certificate.get("leaves") else "n.a."


def _numbers(cell: Json, summary: Json, measures: Json) -> dict[str, float | None]:
    test, clean = _get(summary, "metrics", "test") or {}, _get(measures, "clean", "accuracy")
    low, high = test.get("accuracy_ci95") or (None, None)
    least, most = test.get("loss_ci95") or (None, None)
    cost = summary.get("cost") or {}
    flops, steps = finite(cost.get("flops_per_step")), finite(_get(summary, "steps", "trained"))
    names = ("train_seconds", "cache_seconds", "cache_validation_seconds")
    training, cache, unseen = (finite(cost.get(name)) for name in names)
    every = None if flops is None or steps is None else flops * steps
    parameters = _get(summary, "model", "parameters") or {}
    forgetting = measures.get("forgetting") or {}
    before, after = (_get(forgetting, when, "accuracy") for when in ("before", "after"))
    drift = [row for row in measures.get("drift") or () if row["block"] != "head"]
    alike = mean(row.get("cka") for row in drift)
    found = {
        "learning_rate": cell.get("learning_rate"),
        "accuracy": test.get("accuracy"),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": test.get("loss"),
        "loss_low": least,
        "loss_high": most,
        "examples": test.get("examples"),
        "validation_accuracy": _get(summary, "metrics", "validation", "accuracy"),
        "trainable_parameters": parameters.get("trainable"),
        "total_parameters": parameters.get("total"),
        "optimizer_bytes": summary.get("optimizer_state_bytes"),
        "flops_per_step": flops,
        "training_flops": cell.get("training_flops", every) if summary else None,
        "training_seconds": None if training is None else training + (cache or 0) - (unseen or 0),
        "train_seconds": training,
        "total_seconds": cost.get("total_seconds"),
        "cache_seconds": cache,
        "compile_seconds": cost.get("compile_seconds"),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
        "clean_accuracy": test.get("accuracy") if clean is None else clean,
        "shifted_accuracy": mean(row.get("accuracy") for row in measures.get("shifts") or ()),
        "forgetting": None if before is None or after is None else after - before,
        "drift_weights": mean(row.get("weights") for row in drift),
        "drift_cka": None if alike is None else 1 - alike,
        "certificate_leaves": _get(summary, "freeze", "certificate", "leaves"),
    }
    return {name: finite(value) for name, value in found.items()}


def _get(content: Json, *keys: str) -> Any:
    for key in keys:
        content = (content or {}).get(key)  # type: ignore[assignment]
    return content


def mean(values: Iterable[Any]) -> float | None:
    """Of the finite ones; None where there is none."""
    kept = [x for value in values if (x := finite(value)) is not None]
    return sum(kept) / len(kept) if kept else None
