"""What became of a finished run's features: drift, corrupted images, forgetting, gradients."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tl_jax import (
    corruptions,
    drift,
    gradient_flow,
    inference,
    input_pipeline,
    lora,
    probe,
    retention,
    subsets,
)
from tl_jax import job as job_lib
from tl_jax.config import Config, Measure
from tl_jax.datasets import Examples, open_dataset
from tl_jax.errors import UserError
from tl_jax.job import Job
from tl_jax.pretrained import Pretrained, preprocess
from tl_jax.workdir import WorkDir


def measure(config: Config, path: Any, options: Measure) -> dict[str, Any]:
    """Measures a finished run.

    Args:
      config: the run's.
      path: its work directory.
      options: what is measured.

    Returns:
      "drift": a row for each block but the head, see `drift.measure`. "clean": accuracy,
      accuracy_ci95, loss and examples of the exported classifier on the test images that "shifts"
      corrupts (None without a test split); "shifts": the same with kind and severity.
      "forgetting": source, and of `retention.forgetting` before and after; None where no source is
      named, the checkpoint has no head, or the run started from random weights. "gradients": see
      `gradient_flow.measure`; None where more than the head was trained, or the trunk is not as it
      was pretrained. "not_finite": names of figures that overflowed, which are None. "made_of": as
      `made_of` has it.

    Raises:
      UserError: no such run is finished there, or options that cannot be.
    """
    _check_options(options)
    workdir = WorkDir(path)
    workdir.exported()
    workdir.claim(config)
    chosen = (workdir.read_json("probe.json") or {}).get("chosen")
    config = config if chosen is None else probe.with_setting(config, chosen)
    job = job_lib.prepare(config)
    trained = inference.load_trained(path, config.model)
    found = {
        "drift": _drift(job, trained, options.probe_images),
        **_shifts(job, trained, options),
    }
    source = _source(job, options)
    found |= {"forgetting": _forgetting(job, trained, source, options), "gradients": None}
    if options.gradient_steps and _is_head_alone(job):
        head = trained.variables["params"][trained.family.head]
        found["gradients"] = gradient_flow.measure(job, head, options.gradient_steps)
    whole = {**_finite(found), "not_finite": sorted(set(_not_finite(found)))}
    return {**whole, "made_of": _made_of(source)}


def made_of(job: Job, options: Measure) -> dict[str, str]:
    """By name, hashes of what is measured on besides the run's own data; before it is trained.

    Raises:
      UserError: the options, or the data of the checkpoint's own task, cannot be measured with.
    """
    _check_options(options)
    return _made_of(_source(job, options))


def _made_of(source: tuple[Pretrained, Examples] | None) -> dict[str, str]:
    return {} if source is None else {"images of ablate.measure.source": source[1].fingerprint}


def _drift(job: Job, trained: Pretrained, count: int) -> list[dict[str, Any]]:
    start = dict(job.pretrained.variables)
    start["params"] = {k: v for k, v in start["params"].items() if k != lora.ROOT}
    examples = job.examples.get("validation") or job.examples.get("test")
    images: list[jax.Array] = []
    if examples is not None and count:
        preprocessing = job_lib.on_device(trained.preprocessing, examples)
        chosen = subsets.first(examples, count)
        rows = input_pipeline.ImageRows(chosen, trained.preprocessing)
        size = min(job.config.data.batch_size, len(chosen))
        images = [
            preprocess(preprocessing, rows.load(range(len(chosen))[first : first + size])["image"])
            for first in range(0, len(chosen), size)
        ]
    return drift.measure(job.pretrained, start, trained.variables, images)


def _shifts(job: Job, trained: Pretrained, options: Measure) -> dict[str, Any]:
    if "test" not in job.examples or not options.shifts or not options.severities:
        return {"clean": None, "shifts": []}
    chosen = subsets.first(job.examples["test"], options.shift_images)
    clean, rows = retention.shifts(job, trained, chosen, options.shifts, options.severities)
    return {"clean": clean, "shifts": rows}


def _forgetting(
    job: Job,
    trained: Pretrained,
    found: tuple[Pretrained, Examples] | None,
    options: Measure,
) -> dict[str, Any] | None:
    if found is None:
        return None
    source, examples = found
    chosen = subsets.first(examples, options.source_images)
    before, after = retention.forgetting(job, trained, source, chosen)
    return {"source": options.source, "before": before, "after": after}


def _source(job: Job, options: Measure) -> tuple[Pretrained, Examples] | None:
    """The checkpoint with its own head, and examples of its own task; None without either."""
    source = None if options.source is None else retention.source_network(job)
    if options.source is None or source is None:
        return None
    splits = {"test": options.source_split}
    try:
        examples = open_dataset(options.source, splits, options.source_dir)["test"]
        retention.check_classes(source, examples)
    except UserError as error:
        why = str(error).replace("config.data.dir", "config.ablate.measure.source_dir")
        raise UserError(
            f"config.ablate.measure.source: {why}\nWithout it forgetting is not measured."
        ) from error
    return source, examples


def _is_head_alone(job: Job) -> bool:
    """Whether the run trained a head on the very trunk that was pretrained."""
    plan = job.plan
    alone = plan.training_blocks == (len(plan.blocks) - 1,)
    return alone and plan.trunk == "pretrained" and plan.batch_norm == "frozen"


def _check_options(options: Measure) -> None:
    problems = [
        f"{kind!r} is no corruption: there are {', '.join(corruptions.KINDS)}"
        for kind in options.shifts
        if kind not in corruptions.KINDS
    ]
    problems += [
        f"severity {severity!r} is none of {', '.join(map(str, corruptions.SEVERITIES))}"
        for severity in options.severities
        if severity not in corruptions.SEVERITIES or type(severity) is not int
    ]
    least = {"probe_images": 0, "shift_images": 1, "gradient_steps": 0, "source_images": 1}
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            problems.append(f"{name} = {getattr(options, name)} is less than {smallest}")
    if problems:
        raise UserError("measures: " + "; ".join(problems))


def _finite(found: Any) -> Any:
    """The same with None for each figure that is not finite."""
    if isinstance(found, Mapping):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _not_finite(found: Any, name: str = "") -> Iterator[str]:
    """Names of the figures that are not finite."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _not_finite(value, f"{name}.{key}" if name else key)
    elif isinstance(found, list):
        for value in found:
            yield from _not_finite(value, name)
    elif isinstance(found, float) and not math.isfinite(found):
        yield name
