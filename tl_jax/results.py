"""What a run leaves behind: summary, evaluation, figures and the exported classifier."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tl_jax
from tl_jax import config as config_lib
from tl_jax import figures, input_pipeline, optimizer
from tl_jax.datasets import Examples
from tl_jax.evaluation import Evaluation
from tl_jax.job import Job
from tl_jax.model_card import model_card
from tl_jax.pretrained import Pretrained, save_pretrained
from tl_jax.records import fingerprint
from tl_jax.workdir import WorkDir

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def facts(job: Job, plan: Mapping[str, Any], certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `summary.json` that says what was trained, with what, and where."""
    return {
        "model": {
            **trunk(job),
            "family": job.pretrained.family.model_type,
            "head": job.pretrained.own_head,
            "parameters": optimizer.leaf_totals(plan["leaves"]),
        },
        "freeze": {
            "strategy": job.plan.strategy,
            "trunk": job.plan.trunk,
            "boundary": job.plan.boundary,
            "boundary_block": job.plan.blocks[job.plan.boundary],
            "batch_norm": job.plan.batch_norm,
            "statistics": {
                "moving": len(job.plan.statistics),
                "frozen": len(job.plan.frozen_statistics),
            },
            "phases": [
                {name: phase[name] for name in ("name", "first_step", "last_step", "boundary")}
                for phase in plan["phases"]
            ],
            "notes": plan["notes"],
            "certificate": dict(certificate),
        },
        **{name: value for name, value in identity(job).items() if name != "trunk"},
        "optimizer_state_bytes": plan["optimizer_state_bytes"],
        "environment": environment(),
    }


def identity(job: Job) -> dict[str, Any]:
    """What names the trunk, the data and the configuration."""
    return {
        "trunk": trunk(job),
        "data": {
            "source": job.config.data.source,
            "classes": len(job.class_names),
            "examples": {role: len(split) for role, split in job.examples.items()},
            "fingerprint": {role: split.fingerprint for role, split in job.examples.items()},
            "left_out_unreadable": job.examples["train"].unreadable,
        },
        "config_hash": config_lib.config_hash(job.config),
        "plan_sha256": job.plan_sha256,
        "order": input_pipeline.ORDER,
        "made_of": made_of(job),
    }


def made_of(job: Job) -> dict[str, str]:
    """What runs of one configuration share though their seeds and learning rates differ.

    By name: hashes of the weights, of the network's options, of each split's images (of all that a
    subset is drawn from), of their preparation, of what the strategy's function makes of the
    network; how orders are drawn.
    """
    network = job.pretrained
    images = {
        f"images of {role}": split.drawn_from or split.fingerprint
        for role, split in job.examples.items()
    }
    return {
        "weights": network.checkpoint.sha256,
        "network": fingerprint(repr((network.family.model_type, network.module.options))),
        **images,
        "preparation of images": fingerprint(repr(network.preprocessing)),
        "parameters trained by the strategy": job.strategy_sha256,
        "order of the examples": input_pipeline.ORDER,
    }


def trunk(job: Job) -> dict[str, Any]:
    """What names the frozen part: source, revision and hash of the weights."""
    checkpoint = job.pretrained.checkpoint
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
    }


def environment() -> dict[str, Any]:
    """Versions, devices and the state of the source code."""
    versions = {"tl_jax": tl_jax.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the source code that ran, and whether it had changes; None outside a checkout."""

    def ask(*command: str) -> str:
        folder = Path(__file__).parent
        answer = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write(
    workdir: WorkDir,
    job: Job,
    trained: Pretrained,
    records: list[dict[str, Any]],
    evaluations: Mapping[str, Evaluation],
    summary: Mapping[str, Any],
    command: str | None = None,
) -> None:
    """Writes everything; `summary.json` comes last and says that the run is finished.

    `command` repeats the run, None for this process's command line.
    """
    write_evaluations(workdir, job.class_names, evaluations)
    if job.config.logging.figures:
        draw_evaluations(workdir, job.class_names, job.examples, evaluations)
        workdir.write_bytes("figures/learning_curves.png", figures.learning_curves(records))
        workdir.write_bytes("figures/plan.png", figures.plan(job.describe_plan()))
    _export(workdir, trained, model_card(_card(job, summary, command)))
    workdir.write_json("summary.json", summary)


def write_evaluations(
    workdir: WorkDir, class_names: tuple[str, ...], evaluations: Mapping[str, Evaluation]
) -> None:
    """`evaluation.json`, and every answer."""
    content = {
        split: {
            **found.summary(),
            "class_names": list(class_names),
            "per_class_accuracy": found.per_class_accuracy,
            "confusion_matrix": found.confusion.tolist(),
        }
        for split, found in evaluations.items()
    }
    workdir.write_json("evaluation.json", content)
    for split, found in evaluations.items():
        workdir.write_bytes(f"predictions_{split}.csv", _answers(found))


def draw_evaluations(
    workdir: WorkDir,
    class_names: tuple[str, ...],
    examples: Mapping[str, Examples],
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Confusion matrix and mistakes of the test split, else of validation."""
    split = "test" if "test" in evaluations else "validation"
    if split in evaluations:
        found = evaluations[split]
        pictures = [
            (_picture(examples[split][index]["image"]), class_names[true], class_names[guess], sure)
            for sure, index, true, guess in found.mistakes
        ]
        workdir.write_bytes("figures/mistakes.png", figures.mistakes(pictures))
        matrix = figures.confusion_matrix(found.confusion, class_names)
        workdir.write_bytes("figures/confusion_matrix.png", matrix)


def _answers(found: Evaluation) -> bytes:
    """A line for each example, in the order of its split."""
    columns = [found.answers[name].tolist() for name in ("label", "prediction", "probability")]
    lines = [f"{i},{y},{p},{q:.6g}" for i, (y, p, q) in enumerate(zip(*columns, strict=True))]
    return "\n".join(["index,label,prediction,probability", *lines, ""]).encode()


def _picture(image: Any) -> np.ndarray:
    """uint8 [h, w, 1 | 3], of an array or a PIL image."""
    return image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))


def _export(workdir: WorkDir, trained: Pretrained, card: str) -> None:
    """The classifier as a Hugging Face folder: written beside, then put in its place whole."""
    target, side = workdir.path / "export", workdir.path / ".export.part"
    for old in (side, target):
        if old.exists():
            old.rmtree()
    save_pretrained(trained, side)
    (side / "README.md").write_bytes(card.encode())
    side.rename(target)


def _public(source: str) -> str:
    """A source as others may read it: of a local folder its last name."""
    kind, colon, path = source.rpartition(":")
    if Path(path).expanduser().exists() or path.startswith(("/", ".", "~")):
        path = Path(path).name
    return f"{kind}{colon}{path}"


def _card(job: Job, summary: Mapping[str, Any], command: str | None) -> dict[str, Any]:
    config = job.config
    return {
        **{name: summary["model"][name] for name in ("revision", "family", "parameters")},
        "source": _public(summary["model"]["source"]),
        "data_source": _public(config.data.source),
        "splits": {role: split.split for role, split in job.examples.items()},
        "class_names": job.class_names,
        "strategy": job.plan.strategy,
        "trunk": job.plan.trunk,
        "boundary_block": job.plan.blocks[job.plan.boundary],
        "certificate": summary["freeze"]["certificate"],
        # With one phase, or weights between two, the best step says nothing of what was trained.
        "steps": summary["steps"] if len(job.stages) > 1 and not job.recipe.interpolate else None,
        "test": summary["metrics"].get("test"),
        "validation": summary["metrics"].get("validation"),
        "image_size": job.pretrained.preprocessing.output_size,
        "head": job.pretrained.own_head,
        "config_image_size": job.pretrained.config.get("image_size", 224),
        "channels": job.pretrained.preprocessing.channels,
        "command": command or shlex.join(["python", *sys.argv]),
        "versions": summary["environment"]["versions"],
    }
