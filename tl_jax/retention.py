"""What a trained classifier still tells apart: corrupted images, and the classes of its source."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import corruptions, evaluation, input_pipeline, parallel, prefix, sharing
from tl_jax import job as job_lib
from tl_jax.datasets import Examples
from tl_jax.errors import UserError
from tl_jax.freezing import Plan
from tl_jax.job import Job
from tl_jax.parallel import DataParallel
from tl_jax.pretrained import Pretrained, load_pretrained
from tl_jax.workdir import WorkDir

Figures = dict[str, Any]


class Classifier:
    """A network that classifies the images of a split: one program for any of its variables.

    Args:
      job: a run with the same trunk.
      network: with a head.
      examples: the split.
    """

    def __init__(self, job: Job, network: Pretrained, examples: Examples):
        self._network, self._devices = network, DataParallel(job.config.parallel)
        # All below the head is a prefix here: its form is free, and another one is faster.
        top = len(network.blocks) - 1
        plan: Plan = dataclasses.replace(job.plan, boundary=top, adapters=None)
        preprocessing = job_lib.on_device(network.preprocessing, examples)

        module, family, classes = network.module, network.family, len(network.class_names)

        def classify(held, batch):
            x = preprocessing.device(batch["image"])
            x = prefix.apply(module, plan, held["below"], x)
            return module.apply(held["above"], x, first=top)

        def hold(variables):
            below = prefix.ready(module, family, plan, variables)
            return {
                "below": below,
                "above": {"params": {family.head: variables["params"][family.head]}},
            }

        def make() -> tuple[Callable, Callable]:
            step = evaluation.make_eval_step(classify, classes, parallel.AXIS)
            return self._devices.compile(step, arguments=1), jax.jit(hold)

        made_of = "classify", module, classes, repr(preprocessing), job.config.parallel
        self._step, self._hold = sharing.programs(made_of, make)  # whatever trained
        data, count = job.config.data, len(examples)
        size = -(-count // -(-count // data.batch_size))  # equal batches, the least to pad
        self.batches: list[dict[str, Any]] = list(
            input_pipeline.all_batches(
                input_pipeline.ImageRows(examples, network.preprocessing),
                dataclasses.replace(data, batch_size=parallel.round_up(size)),
            )
        )

    def hold(self, variables: Mapping[str, Any]) -> Any:
        """The network's variables on the devices, for `figures`."""
        return self._devices.replicate(self._hold(variables))

    def figures(self, held: Any, batches: Sequence[dict[str, Any]] | None = None) -> Figures:
        """Accuracy, accuracy_ci95, loss and examples over `batches`, by default the split's."""
        batches = self.batches if batches is None else batches
        return evaluation.evaluate(
            self._step, held, map(self._devices.shard, batches), mistakes=0
        ).summary()


def shifts(
    job: Job,
    trained: Pretrained,
    examples: Examples,
    kinds: Sequence[str],
    severities: Sequence[int],
) -> tuple[Figures, list[Figures]]:
    """The classifier on images as they are, and with each corruption at each severity.

    Images are corrupted as the data set holds them where they have one size, else after the host
    made one size of them.

    Returns:
      The figures of `Classifier.figures`; and those with "kind" and "severity" of the corrupted.
    """
    classifier = Classifier(job, trained, examples)
    held, rows = classifier.hold(trained.variables), []
    clean = classifier.figures(held)
    for kind in kinds:
        for severity in severities:
            batches = [_corrupted(batch, kind, severity) for batch in classifier.batches]
            figures = classifier.figures(held, batches)
            rows.append({"kind": kind, "severity": severity, **figures})
    return clean, rows


def _corrupted(batch: dict[str, Any], kind: str, severity: int) -> dict[str, Any]:
    images = corruptions.corrupt(batch["image"], kind, severity, batch["index"])
    return {**batch, "image": np.asarray(images)}


def source_network(job: Job) -> Pretrained | None:
    """The checkpoint that the run started from, with its own head.

    None where it has no head, or where the run kept nothing of it but its shape.
    """
    config, model = job.config, job.config.model
    if job.plan.trunk == "random":
        return None
    earlier = config.init_from
    network = load_pretrained(
        model.pretrained if earlier is None else str(WorkDir(earlier).exported()),
        revision=model.revision if earlier is None else None,
        image_size=model.image_size,
        dtype=jnp.dtype(model.dtype),
        precision=model.precision,
    )
    return network if network.class_names else None


def forgetting(
    job: Job, trained: Pretrained, source: Pretrained, examples: Examples
) -> tuple[Figures, Figures]:
    """What the source's own head makes of its own task, before training and after.

    Args:
      job: the run.
      trained: what it exported.
      source: what it started from, see `source_network`.
      examples: of the source's task.

    Returns:
      The figures of `Classifier.figures` with the trunk that training started from, and with the
      trained one, by one program: equal where the trunk did not move.

    Raises:
      UserError: see `check_classes`.
    """
    check_classes(source, examples)
    classifier, head = Classifier(job, source, examples), source.family.head
    params = {**trained.variables["params"], head: source.variables["params"][head]}
    after = {**trained.variables, "params": params}
    return classifier.figures(classifier.hold(source.variables)), classifier.figures(
        classifier.hold(after)
    )


def check_classes(source: Pretrained, examples: Examples) -> None:
    """Whether a checkpoint's own head fits data of its own task.

    Raises:
      UserError: the data's classes are not the head's, name by name in the same order.
    """
    if examples.class_names != source.class_names:
        raise UserError(
            f"{examples.name} has the classes {', '.join(examples.class_names)}; the "
            f"head of {source.checkpoint.source} tells {', '.join(source.class_names)} apart"
        )
