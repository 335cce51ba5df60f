"""Exact accuracy and loss over a whole split: sums over padded, masked batches, divided once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import layer_forms, losses

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclasses.dataclass
class Evaluation:
    """What a classifier does on one split.

    Attributes:
      loss: mean cross-entropy in nats.
      confusion: int64 [C, C], examples by true class (rows) and predicted class (columns).
      mistakes: the most confident wrong answers, most confident first: (probability, example's
        index, true class, predicted class).
      answers: "label", "prediction" int [N] and "probability" (of the prediction) float32 [N], by
        example.
      loss_error: standard error of the loss; None of one example.
    """

    loss: float
    confusion: np.ndarray
    mistakes: list[tuple[float, int, int, int]]
    answers: Mapping[str, np.ndarray]
    loss_error: float | None = None

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of examples whose most probable class is the true one."""
        return int(np.trace(self.confusion)) / self.examples

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """The same for the examples of each class; None where there are none."""
        totals = self.confusion.sum(1)
        return [
            int(hit) / int(n) if n else None
            for hit, n in zip(np.diag(self.confusion), totals, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """As `summary.json` holds it."""
        hits = int(np.trace(self.confusion))
        wide = None if self.loss_error is None else Z95 * self.loss_error
        return {
            "accuracy": self.accuracy,
            "accuracy_ci95": list(wilson_interval(hits, self.examples)),
            "loss": self.loss,
            "loss_ci95": None if wide is None else [self.loss - wide, self.loss + wide],
            "examples": self.examples,
        }


def wilson_interval(hits: int, examples: int, z: float = Z95) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927, doi:10.2307/2276774); z: 95 % by default.

    With p = hits / n: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    share = hits / examples
    centre = share + z * z / (2 * examples)
    spread = z * math.sqrt(share * (1 - share) / examples + (z / (2 * examples)) ** 2)
    scale = 1 + z * z / examples
    low = 0.0 if hits == 0 else (centre - spread) / scale
    return low, 1.0 if hits == examples else (centre + spread) / scale


def make_eval_step(classify: Callable, num_classes: int, axis_name: str | None = None) -> Callable:
    """Sums over one batch, the same function for every device.

    Args:
      classify: `classify(variables, batch)` → float32 logits [n, C].
      num_classes: C.
      axis_name: of the devices.

    Returns:
      `step(variables, batch)` → dict of loss: float32 [], sum over the examples of the batch;
      confusion: int32 [C, C]; and of every example of the global batch, [N]: label, prediction,
      probability (of the prediction), nats (its loss), index and mask (0 for padding).
      batch: what `classify` takes, label int32 [n], index int32 [n], mask float32 [n].
    """

    def eval_step(variables, batch):
        with layer_forms.suited():
            logits = classify(variables, batch)
        real = batch["mask"] > 0
        label, prediction = batch["label"], logits.argmax(-1).astype(jnp.int32)
        nats = jnp.where(real, losses.cross_entropy(logits, label), 0.0)
        loss = nats.sum()
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        confusion = confusion.at[label, prediction].add(real.astype(jnp.int32))
        examples = {
            "label": label,
            "prediction": prediction,
            "probability": jax.nn.softmax(logits).max(-1),
            "nats": nats,
            "index": batch["index"],
            "mask": real,
        }
        if axis_name is not None:
            loss, confusion = jax.lax.psum((loss, confusion), axis_name)
            examples = jax.tree.map(
                lambda x: jax.lax.all_gather(x, axis_name, tiled=True), examples
            )
        return {"loss": loss, "confusion": confusion, **examples}

    return eval_step


def evaluate(
    eval_step: Callable, variables: Any, batches: Iterable[Any], mistakes: int = 25
) -> Evaluation:
    """Runs a compiled `make_eval_step` over all batches, one result behind the device.

    Raises:
      ValueError: there is no example.
    """
    loss, confusion = 0.0, None
    columns = ("index", "label", "prediction", "probability", "nats")
    parts: list[dict[str, np.ndarray]] = []

    def add(sums):
        nonlocal loss, confusion
        sums = jax.device_get(sums)
        loss += float(sums["loss"])
        counts = sums["confusion"].astype(np.int64)
        confusion = counts if confusion is None else confusion + counts
        parts.append({name: sums[name][sums["mask"]] for name in columns})

    pending = None
    for batch in batches:
        sums = eval_step(variables, batch)
        if pending is not None:
            add(pending)
        pending = sums
    if pending is None:
        raise ValueError("no example to evaluate")
    add(pending)
    assert confusion is not None
    answers = {name: np.concatenate([part[name] for part in parts]) for name in columns}
    order = np.argsort(answers.pop("index"), kind="stable")
    answers = {name: values[order] for name, values in answers.items()}
    nats = answers.pop("nats").astype(np.float64)
    label, prediction, probability = (answers[name] for name in columns[1:-1])
    wrong = np.flatnonzero(label != prediction)
    worst = wrong[np.argsort(-probability[wrong], kind="stable")][:mistakes].tolist()
    listed = [(float(probability[i]), i, int(label[i]), int(prediction[i])) for i in worst]
    error = float(nats.std(ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else None
    return Evaluation(loss / int(confusion.sum()), confusion, listed, answers, error)
