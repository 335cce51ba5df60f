"""A trained classifier at work: evaluated on a data set, or asked about single images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import (
    config_files,
    display,
    evaluation,
    image_files,
    input_pipeline,
    job,
    parallel,
    results,
)
from tl_jax.config import Config, Model
from tl_jax.errors import RunFailed, UserError
from tl_jax.parallel import DataParallel
from tl_jax.pretrained import Pretrained, load_pretrained
from tl_jax.workdir import WorkDir

TOP = 5


def predict(path: str, images: Sequence[str]) -> list[list[tuple[str, float]]]:
    """The most probable classes of each image file, printed and returned.

    Args:
      path: a finished work directory, or an exported folder.
      images: image files.

    Raises:
      UserError: no classifier there, or files that are no images (all of them are named).
    """
    classifier = load_trained(path)
    pixels, problems = [], []
    for name in images:
        try:
            pixels.append(classifier.preprocessing.host(image_files.decode(name)))
        except image_files.UnreadableImage as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError("cannot read these images:\n  " + "\n  ".join(problems))
    ready = classifier.preprocessing.after_host().device(jnp.asarray(np.stack(pixels)))
    probabilities = np.asarray(jax.nn.softmax(classifier.apply(ready)))
    if not np.isfinite(probabilities).all():
        raise RunFailed(f"the classifier in {path} gives numbers that are not finite")
    answers = []
    for name, row in zip(images, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:TOP]
        answers.append([(classifier.class_names[i], float(row[i])) for i in best])
        display.console.print(display.predictions(name, answers[-1]))
    return answers


def evaluate(config: Config, path: str) -> dict[str, Any]:
    """Accuracy and loss over the configuration's validation and test splits, printed and returned.

    Args:
      config: says which data and, as `model`, how to compute; that of the work directory, or
        another.
      path: a finished work directory, or an exported folder. With a work directory's own
        configuration its `evaluation.json` and figures are written anew.

    Raises:
      UserError: no classifier there, or other classes than the data has.
    """
    classifier = load_trained(path, config.model)
    splits = {"validation": config.data.splits.validation, "test": config.data.splits.test}
    if not any(splits.values()):
        raise UserError("config.data.splits names neither a validation nor a test split")
    workdir = WorkDir(path)
    if (workdir.path / "export").exists():  # what it was trained on says nothing about it
        splits["train"] = config.data.splits.train
    examples = job.open_examples(config, splits)
    examples.pop("train", None)
    names = next(iter(examples.values())).class_names
    if names != classifier.class_names:
        raise UserError(
            f"{config.data.source} has the classes {', '.join(names)}, "
            f"the classifier in {path} has {', '.join(classifier.class_names)}"
        )
    size = parallel.round_up(config.data.batch_size)
    data = dataclasses.replace(config.data, batch_size=size)
    devices = DataParallel(config.parallel)
    variables = devices.replicate(classifier.variables)
    evaluations = {}
    for split, found in examples.items():
        preprocessing = job.on_device(classifier.preprocessing, found)

        def classify(variables, batch, preprocessing=preprocessing):
            return classifier.module.apply(variables, preprocessing.device(batch["image"]))

        step = evaluation.make_eval_step(classify, len(names), parallel.AXIS)
        rows = input_pipeline.ImageRows(found, classifier.preprocessing)
        batches = input_pipeline.all_batches(rows, data)
        compiled = devices.compile(step, arguments=1, donate=False)
        evaluations[split] = evaluation.evaluate(compiled, variables, map(devices.shard, batches))
        display.console.print(display.evaluation_table(split, evaluations[split], names))
    own = (workdir.path / "export").exists() and not workdir.differences(config)
    if parallel.is_first() and own:
        results.write_evaluations(workdir, names, evaluations)
        if config.logging.figures:
            results.draw_evaluations(workdir, names, examples, evaluations)
    return {split: found.summary() for split, found in evaluations.items()}


def load_trained(path: str, model: Model | None = None) -> Pretrained:
    """The classifier of a finished work directory or of an exported folder, with its head.

    Args:
      path: of either.
      model: says the dtype and precision to compute in and the size of the images; None takes those
        of the run, or of an exported folder float32 and its processor's size.

    Raises:
      UserError: there is none.
    """
    workdir = WorkDir(path)
    content = workdir.read_json("config.json")
    exported = workdir.path / "export"
    if exported.exists():
        if model is None and content is not None:
            model = config_files.resolve(content, recorded=True).model
        try:
            return _load(str(exported), model or Model())
        except UserError as error:
            raise UserError(
                f"{error}\nTo have it written anew, remove {exported} and start the run again."
            ) from error
    if content is None:
        raise UserError(f"{path} is neither a work directory nor an exported folder")
    if "model_type" not in content:
        workdir.exported()  # says that the run is not finished
    classifier = _load(str(workdir.path), model or Model())
    if not classifier.class_names:
        raise UserError(f"{path} holds a network without a classification head")
    return classifier


def _load(folder: str, model: Model) -> Pretrained:
    return load_pretrained(
        folder,
        image_size=model.image_size,
        dtype=jnp.dtype(model.dtype),
        precision=model.precision,
    )
