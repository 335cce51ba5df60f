"""The README.md of an exported classifier: what it is, how good, how to load and to make it again.

Its front matter is what the Hugging Face Hub reads
(https://huggingface.co/docs/hub/model-cards). Names of classes, data and folders are untrusted.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LISTED_CLASSES = 100
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter.

    Args:
      facts: what is known of the run:
        source: Hub id or folder of the pretrained network; revision: commit hash, None for folders.
        family: "resnet" or "vit". data_source: `tfds:…`, `hf:…` or `folder:…`.
        splits: {"train": …, "validation": … | None, "test": … | None}. class_names: in order.
        strategy: its name. boundary_block: name of the first block that trains.
        parameters: numbers {"total", "trainable", "frozen"}.
        certificate: {"ok", "leaves", "sha256_before", "sha256_after"}.
        test, validation: None or {"accuracy", "accuracy_ci95": (low, high), "loss": nats,
        "examples"}.
        image_size: (H, W) that the network takes. config_image_size: what its config.json says
        (int, (H, W) or None). channels: of the network's input, 3 when left out. head: fields of a
        head that transformers' classifier does not have, None when left out.
        command: that makes it again. versions: by name of the package.
    """
    sections = [
        _front_matter(facts),
        *_what(facts),
        "## Result",
        *_result(facts),
        "## What was trained",
        *_training(facts),
        "## Use",
        *_use(facts),
        "## Make it again",
        _fence(facts["command"], "bash"),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(facts["versions"].items())) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kind, name = _data(facts)
    test = facts["test"]
    results = test and [
        EvalResult(
            task_type="image-classification",
            dataset_type=name if kind != "folder" else "imagefolder",
            dataset_name=name,
            dataset_split=facts["splits"]["test"],
            metric_type="accuracy",
            metric_value=float(test["accuracy"]),
        )
    ]
    card = ModelCardData(
        library_name="tl_jax" if facts.get("head") else "transformers",
        pipeline_tag="image-classification",
        tags=["tl_jax", "transfer-learning"],
        base_model=facts["source"] if _is_hub_id(facts) and not _random_trunk(facts) else None,
        datasets=[name] if kind != "folder" else None,
        metrics=["accuracy"],
        model_name=_title(facts) if results else None,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml().strip()}\n---"


def _is_hub_id(facts: Mapping[str, Any]) -> bool:
    # A relative folder may look like an id, but only an id was resolved to a commit.
    return facts["revision"] is not None and bool(HUB_ID.fullmatch(facts["source"]))


def _random_trunk(facts: Mapping[str, Any]) -> bool:
    return facts["trunk"] == "random"


def _data(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Kind of the data's source and the name that a reader knows it by."""
    kind, _, rest = facts["data_source"].partition(":")
    if kind == "folder":
        return kind, _plain(rest.rstrip("/").rsplit("/", 1)[-1])
    if kind == "tfds":  # NAME/CONFIG:VERSION
        return kind, _plain(re.split("[/:]", rest)[0])
    return kind, _plain("/".join(rest.split("/")[:2]))  # owner/name/config


def _title(facts: Mapping[str, Any]) -> str:
    source = _plain(facts["source"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{source}-{_data(facts)[1].rsplit('/', 1)[-1]}"


def _what(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_escape(_title(facts))}"
    classes, source = facts["class_names"], _code(facts["source"])
    revision = f" at revision {_code(facts['revision'])}" if facts["revision"] else ""
    origin = f"the pretrained network {source}{revision}"
    if _random_trunk(facts):
        origin = f"the architecture of {source}{revision}, its trunk from random weights,"
    yield (
        f"An image classifier with {len(classes):,} classes: {origin} with a new head, trained by "
        f"`tl_jax` with the strategy {_code(facts['strategy'])}. "
        "Mind the licences of the source and of the data."
    )
    splits = (f"{name} {_code(s)}" for name, s in facts["splits"].items() if s is not None)
    yield f"Data: {_code(facts['data_source'])} ({', '.join(splits)})."
    listed = ", ".join(_code(name) for name in classes[:LISTED_CLASSES])
    rest = len(classes) - LISTED_CLASSES
    yield f"Classes: {listed}" + (f" and {rest:,} more, see `config.json`." if rest > 0 else ".")


def _result(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = [(split, facts[split]) for split in ("test", "validation") if facts[split]]
    if not rows:
        yield "Not evaluated: the run had neither a test nor a validation split."
        return
    table = [
        "| split | accuracy | 95 % interval | loss (nats) | examples |",
        "|---|---|---|---|---|",
    ]
    for split, found in rows:
        low, high = found["accuracy_ci95"]
        table.append(
            f"| {split} | {found['accuracy']:.4f} | {low:.4f} – {high:.4f} "
            f"| {found['loss']:.4f} | {found['examples']:,} |"
        )
    yield "\n".join(table)


def _training(facts: Mapping[str, Any]) -> Iterator[str]:
    total, trainable, frozen = (facts["parameters"][k] for k in ("total", "trainable", "frozen"))
    yield (
        f"Strategy {_code(facts['strategy'])}: the first block with a trainable parameter is "
        f"{_code(facts['boundary_block'])}.\n\n"
        f"| parameters | number | share |\n|---|---|---|\n"
        f"| trainable | {trainable:,} | {100 * trainable / total:.4g} % |\n"
        f"| frozen | {frozen:,} | {100 * frozen / total:.4g} % |\n"
        f"| total | {total:,} | |"
    )
    if steps := facts.get("steps"):
        yield (
            f"These weights are those after step {steps['best']} of {steps['trained']}, in the "
            f"phase {_code(steps['best_phase'])}; later phases did not touch them."
        )
    proof = facts["certificate"]
    before, after = _code(proof["sha256_before"]), _code(proof["sha256_after"])
    if not proof["leaves"]:
        yield "Certificate: nothing was frozen."
    elif proof["ok"]:
        yield (
            f"Certificate: the {proof['leaves']:,} frozen arrays (parameters and statistics) are "
            f"bit for bit the same before and after training, SHA-256 {after}."
        )
    else:
        yield f"**Certificate broken: what was to stay frozen moved**, from {before} to {after}."


def _use(facts: Mapping[str, Any]) -> Iterator[str]:
    height, width = facts["image_size"]
    other_size = facts["family"] == "vit" and _pair(facts["config_image_size"]) != (height, width)
    yield (
        f"The network takes images of {height} × {width} pixels; the image processor in this "
        "folder makes them."
    )
    if other_size:
        yield (
            f"Its configuration says {_size(facts['config_image_size'])}: transformers needs "
            "`interpolate_pos_encoding=True`, `tl_jax` interpolates by itself."
        )
    mode = "L" if facts.get("channels", 3) == 1 else "RGB"
    option = ", interpolate_pos_encoding=True" if other_size else ""
    if head := facts.get("head"):
        kind, what, blocks = (head[name] for name in ("kind", "input", "last_blocks"))
        where = "the last block" if blocks == 1 else f"each of the last {blocks} blocks"
        yield (
            f"Its head ({_code(kind)} on {_code(what)} of {where}) is none of transformers': "
            "`tl_jax.load_pretrained` loads all of it, `transformers.AutoModel` the trunk."
        )
    else:
        yield "With transformers and PyTorch, in this folder (or give its id on the Hub):"
        yield _with_transformers(mode, option)
    yield "With tl_jax:"
    axis = "[None, :, :, None]" if mode == "L" else "[None]"
    yield _fence(
        f"""import numpy as np
from PIL import Image

import tl_jax

classifier = tl_jax.load_pretrained(".")
images = np.asarray(Image.open("image.png").convert("{mode}")){axis}
logits = classifier.apply(classifier.preprocess(images))
print(classifier.class_names[int(logits[0].argmax())])""",
        "python",
    )


def _with_transformers(mode: str, option: str) -> str:
    return _fence(
        f"""import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModelForImageClassification.from_pretrained(".")
inputs = processor(Image.open("image.png").convert("{mode}"), return_tensors="pt")
with torch.inference_mode():
    probabilities = model(**inputs{option}).logits.softmax(-1)[0]
print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))""",
        "python",
    )


def _size(size: int | Sequence[int] | None) -> str:
    pair = _pair(size)
    return f"{pair[0]} × {pair[1]}" if pair else "no size"


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _plain(text: Any) -> str:
    """Untrusted text on one line, without what cannot be printed."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def _escape(text: str) -> str:
    """Plain text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!$~&])", r"\\\1", text)


def _code(text: Any) -> str:
    """An inline code span that nothing in `text` can end."""
    text = _plain(text) or " "
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fence(text: str, language: str) -> str:
    """A code block that nothing in `text` can end."""
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
