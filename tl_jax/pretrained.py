"""A pretrained classifier: load it, run any range of its blocks, write it back.

network = load_pretrained("microsoft/resnet-50", num_classes=10)
logits = network.apply(network.preprocess(images))
save_pretrained(network, "export")
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tl_jax import models, weight_conversion
from tl_jax.errors import UserError
from tl_jax.hub import CONFIG, HEAD, HEAD_FIELD, PROCESSOR, Checkpoint, open_checkpoint
from tl_jax.models import heads
from tl_jax.models.family import BlockSpec, Family, is_size
from tl_jax.models.layers import Chain, Head
from tl_jax.preprocessing import Preprocessing
from tl_jax.weight_conversion import Conversion

WEIGHTS = "model.safetensors"
DEFAULT_LABELS = 2  # transformers' number of labels when config.json says nothing
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A network with its parameters and everything that belongs to them.

    Attributes:
      module: the Flax module; see `tl_jax.models.layers.Chain` for the ranges it can run.
      variables: {"params": …} and, where there is BatchNorm, {"batch_stats": …}.
      config: content of config.json, with the labels of the head as it is here.
      processor: uint8 images → what the network takes; None where the checkpoint does not say.
      checkpoint: the source.
      family: what kind of network it is.
      conversion: what became of every tensor of the source.
    """

    module: Chain
    variables: dict[str, Any] = dataclasses.field(repr=False)
    config: dict[str, Any] = dataclasses.field(repr=False)
    processor: Preprocessing | None
    checkpoint: Checkpoint = dataclasses.field(repr=False)
    family: Family = dataclasses.field(repr=False)
    conversion: Conversion = dataclasses.field(repr=False)

    @property
    def preprocessing(self) -> Preprocessing:
        """Uint8 images → what the network takes.

        Raises:
          UserError: the checkpoint has no preprocessor_config.json.
        """
        if self.processor is None:
            raise UserError(
                f"{self.checkpoint.source} holds no {PROCESSOR}, so nothing says how images are "
                "resized and normalised for it: put one beside its config.json"
            )
        return self.processor

    @property
    def chain(self) -> tuple[BlockSpec, ...]:
        """The blocks in order with the parameters each owns."""
        return self.family.chain(self.config)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks in order."""
        return tuple(block.name for block in self.chain)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class in the order of the logits; () without a head."""
        if self.module.num_classes is None:
            return ()
        return tuple(self.config["id2label"][str(i)] for i in range(self.module.num_classes))

    @property
    def own_head(self) -> dict[str, Any] | None:
        """The fields of a head that transformers' classifier does not have; None for its own."""
        head = self.module.head
        if heads.is_standard(head, self.family):
            return None
        return {**dataclasses.asdict(head), "input": heads.seen(head, self.family)}

    def apply(self, images: Any, first: int = 0, last: int | None = None) -> jax.Array:
        """Runs blocks[first:last]; by default images float [N, H, W, C] → float32 logits [N, K].

        Raises:
          UserError: the images do not fit, there is no head to run, or there are no such blocks.
        """
        count = len(self.blocks)
        end = slice(first, last).indices(count)[1]
        if not 0 <= first <= end or not -count <= (0 if last is None else last) <= count:
            raise UserError(
                f"first={first}, last={last}: no range of the blocks, which are 0 to {count - 1}"
            )
        return _apply(self.module, self.variables, images, first, last)

    def features(self, images: Any) -> jax.Array:
        """What the head sees: images float [N, H, W, C] → float32 [N, D]."""
        return self.apply(images, last=-1)

    def preprocess(self, images: Any) -> jax.Array:
        """Images uint8 [N, h, w, c] → float32 [N, H, W, C] as the network takes them."""
        return preprocess(self.preprocessing, images)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(module: Chain, variables: Any, x: Any, first: int, last: int | None) -> Any:
    return module.apply(variables, x, first=first, last=last)


@functools.partial(jax.jit, static_argnums=0)
def preprocess(preprocessing: Preprocessing, images: Any) -> jax.Array:
    """Images uint8 [N, h, w, c] → float32 [N, H, W, C], by one program for all equal steps."""
    return preprocessing.device(images)


def load_pretrained(
    id_or_folder: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    revision: str | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    head: Head | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    precision: str = "float32",
) -> Pretrained:
    """Loads a checkpoint in Hugging Face format.

    Args:
      id_or_folder: a Hub id, or a folder with config.json, weights and preprocessor_config.json.
      num_classes: puts a new float32 head with so many outputs in the place of the checkpoint's;
        None keeps it. Without one in the file, `features` works and `apply` says so.
      revision: branch, tag or commit of a Hub id.
      image_size: resize straight to image_size × image_size pixels; None does what the checkpoint's
        image processor says.
      class_names: a name for each class of the new head.
      head: what the new head is and sees; None is transformers' own, linear, of zeros.
      seed: of what is random in it.
      dtype: what the trunk computes in, float32 or bfloat16; the head computes in float32.
      precision: of products of float32 numbers: "float32", or "tensorfloat32", faster on a GPU.
      param_dtype: dtype of the parameters read from the file; running statistics stay float32.

    Raises:
      UserError: the checkpoint is not there, not supported, or its files do not fit together.
    """
    checkpoint = open_checkpoint(os.fspath(id_or_folder), revision)
    family = models.family_of(checkpoint.config, checkpoint.source)
    labels: list[str] | None = None
    if num_classes is not None:
        labels = _new_labels(num_classes, class_names)
    elif class_names is not None or head is not None:
        name = "head" if class_names is None else "class_names"
        raise UserError(f"{name} goes with a new head: give num_classes, too")
    elif weight_conversion.has_head(checkpoint, family):
        labels = _stored_labels(checkpoint)
    new = num_classes is not None
    head = _head(head, checkpoint, family) if new else _stored_head(checkpoint, family)
    config = {key: value for key, value in checkpoint.config.items() if key != HEAD_FIELD}
    if labels is not None:
        config.pop("num_labels", None)
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    _check_depth(checkpoint, family, config)
    module = family.module(config, None if labels is None else len(labels), jnp.dtype(dtype))
    module = module.clone(precision=precision, head=head)
    template = models.variable_shapes(module, family.example_shape(config))
    variables, conversion = weight_conversion.load(
        checkpoint, family, template, jnp.dtype(param_dtype), new
    )
    if new:
        params = variables["params"]
        params[family.head] = heads.initial(head, params[family.head], seed)
    if conversion.ignored:
        log.info("%s: not used: %s", checkpoint.source, ", ".join(conversion.ignored))
    channels = family.example_shape(config)[-1]
    preprocessing = None
    if checkpoint.processor is not None:
        preprocessing = Preprocessing.from_processor(
            checkpoint.processor, channels, image_size, model_type=family.model_type
        )
    return Pretrained(module, variables, config, preprocessing, checkpoint, family, conversion)


def save_pretrained(pretrained: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json, each whole or not at all.

    The folder is one of transformers' `…ForImageClassification`, in PyTorch's layout. Where that
    class has no such head, it is one of the base model with the head beside it, in
    head.safetensors, and `tl_jax_head` in config.json. Tensors that are bit for bit as loaded keep
    the bytes and dtype of the source; the head and what has changed is float32.

    Args:
      pretrained: what to write; `dataclasses.replace(pretrained, variables=…)` after training.
      folder: made if need be; files of these names in it are replaced.

    Raises:
      UserError: there is no head, or the folder cannot be written.
    """
    if pretrained.module.num_classes is None:
        raise UserError(
            f"{pretrained.checkpoint.source} has no classification head to save: "
            "load it with num_classes=N"
        )
    tensors = weight_conversion.unload(
        pretrained.variables, pretrained.conversion, pretrained.checkpoint, pretrained.family
    )
    tensors = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    config = {key: value for key, value in pretrained.config.items() if key != "torch_dtype"}
    architecture, files = pretrained.family.architecture, {WEIGHTS: tensors}
    if pretrained.own_head is not None:
        # transformers' classifier would take such tensors for those of its own linear layer.
        architecture = architecture.replace("ForImageClassification", "Model")
        own = [key for key in tensors if key.startswith(f"{pretrained.family.head_key}.")]
        files[HEAD] = {key: tensors.pop(key) for key in own}
        config[HEAD_FIELD] = pretrained.own_head
    config["architectures"] = [architecture]
    config["num_labels"] = pretrained.module.num_classes
    # A half-precision dtype here would make transformers round the float32 head.
    config["dtype"] = "float32"
    target = epath.Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(target / name, safetensors.numpy.save(content, metadata={"format": "pt"}))
        if pretrained.processor is not None:
            _write(target / PROCESSOR, _json(pretrained.processor.to_processor()))
        _write(target / CONFIG, _json(config))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def _check_depth(checkpoint: Checkpoint, family: Family, config: dict[str, Any]) -> None:
    """Every block but the head needs a tensor; tracing a network of too many takes minutes."""
    blocks = sum(bool(block.prefixes) for block in family.chain(config)[:-1])
    if blocks > len(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.source}: config.json describes {blocks} blocks, but {checkpoint.folder} "
            f"holds only {len(checkpoint.tensors)} tensors: they do not belong together"
        )


def _new_labels(num_classes: int, class_names: Sequence[str] | None) -> list[str]:
    if not is_size(num_classes):
        raise UserError(f"num_classes must be a whole number from 1, is {num_classes!r:.80}")
    if class_names is None:
        return [f"LABEL_{index}" for index in range(num_classes)]
    if len(class_names) != num_classes:
        raise UserError(f"{len(class_names)} class_names for num_classes={num_classes}")
    return [str(name) for name in class_names]


def _stored_labels(checkpoint: Checkpoint) -> list[str]:
    """The labels by which config.json names the outputs of the head in the file."""
    stored = checkpoint.config.get("id2label")
    if stored is None:
        count = checkpoint.config.get("num_labels", DEFAULT_LABELS)
        if not is_size(count):
            raise UserError(
                f"{checkpoint.source}: config.json cannot be used:\n"
                f"  num_labels: must be a whole number from 1, is {count!r:.80}"
            )
        return [f"LABEL_{index}" for index in range(count)]
    names = [str(index) for index in range(len(stored))] if isinstance(stored, dict) else []
    if (
        not names
        or stored.keys() != set(names)
        or not all(isinstance(label, str) for label in stored.values())
    ):
        raise UserError(
            f"{checkpoint.source}: config.json cannot be used:\n"
            f'  id2label: must name each class from "0" on, is {stored!r:.80}'
        )
    return [stored[name] for name in names]


def _head(head: Head | None, checkpoint: Checkpoint, family: Family) -> Head:
    """A head that was asked for, fit for the network."""
    fields = dataclasses.asdict(head or Head())
    return heads.checked(fields, family, checkpoint.config, f"{checkpoint.source}: the head")


def _stored_head(checkpoint: Checkpoint, family: Family) -> Head:
    """What config.json says of the head in the file."""
    fields = checkpoint.config.get(HEAD_FIELD, {})
    name = f"{checkpoint.source}: {HEAD_FIELD} in config.json"
    if not isinstance(fields, dict):
        raise UserError(f"{name} must be an object, is {fields!r:.80}")
    if fields and not weight_conversion.has_head(checkpoint, family):
        raise UserError(f"{name} describes a head, and there is no {HEAD} with one beside it")
    return heads.checked(fields, family, checkpoint.config, name)


def _json(content: dict[str, Any]) -> bytes:
    # Sorted on top only: labels stay in the order of their numbers.
    return (json.dumps(dict(sorted(content.items())), indent=2) + "\n").encode()


def _write(path: epath.Path, content: bytes) -> None:
    """The file under another name first, so that a crash never leaves half of it."""
    partial = path.parent / f".{path.name}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
