"""A configuration → everything that its run consists of, before anything is trained."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tl_jax import freezing, optimizer
from tl_jax.augmentation import augment
from tl_jax.config import Config
from tl_jax.datasets import Examples, open_dataset
from tl_jax.errors import UserError
from tl_jax.freezing import Plan
from tl_jax.preprocessing import Preprocessing
from tl_jax.pretrained import Pretrained, load_pretrained


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run consists of.

    Attributes:
      config: as it was asked for.
      pretrained: the network; its `variables` are those that training starts from.
      examples: by role: "train", "validation", "test" (the latter two may be missing).
      plan: what trains.
      schedule: learning rate by step.
      optimizer: over the trainable parameters.
      steps_per_epoch: full batches in the training split.
    """

    config: Config
    pretrained: Pretrained
    examples: Mapping[str, Examples]
    plan: Plan
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Steps from the first to the last epoch."""
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.examples["train"].class_names

    @property
    def device_preprocessing(self) -> Preprocessing:
        """What is left for the device to do with the images of a batch."""
        return on_device(self.pretrained.preprocessing, self.examples["train"])

    def describe_plan(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return optimizer.describe(self.config, self.plan, self.optimizer)

    def training_preprocess(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """uint8 images and a key each → what the network takes, augmented."""
        preprocessing, name = self.device_preprocessing, self.config.data.augmentation
        return lambda images, keys: preprocessing.device(augment(images, keys, name))


def prepare(config: Config) -> Job:
    """Finds data and network and resolves the plan.

    Raises:
      UserError: something is missing, damaged, or does not fit together.
    """
    data = config.data
    examples = open_examples(config, dataclasses.asdict(data.splits))
    names = examples["train"].class_names
    if len(names) < 2:
        raise UserError(f"{data.source} has one class only, {names[0]!r}: nothing to tell apart")
    pretrained = load_pretrained(
        config.model.pretrained,
        len(names),
        revision=config.model.revision,
        image_size=config.model.image_size,
        class_names=names,
        dtype=jnp.dtype(config.model.dtype),
        precision=config.model.precision,
    )
    _check_images(pretrained)
    plan = freezing.resolve(config.freeze, pretrained.chain, pretrained.variables)
    if plan.trunk == "random":
        variables = with_random_trunk(pretrained, config.seed)
        pretrained = dataclasses.replace(pretrained, variables=variables)
    steps_per_epoch = len(examples["train"]) // data.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.data.batch_size: {data.batch_size} is more than the "
            f"{len(examples['train'])} examples of the training split {data.splits.train!r}"
        )
    schedule = optimizer.make_schedule(
        config,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * config.train.epochs,
    )
    update = optimizer.make_optimizer(config, plan, schedule)
    return Job(config, pretrained, examples, plan, schedule, update, steps_per_epoch)


def _check_images(pretrained: Pretrained) -> None:
    """Runs the shapes of an image through the network, to fail now if it is too small for it."""
    height, width = pretrained.preprocessing.output_size
    shape = (1, height, width, pretrained.preprocessing.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    jax.eval_shape(lambda v, x: pretrained.module.apply(v, x, last=1), pretrained.variables, images)


def open_examples(config: Config, splits: Mapping[str, str | None]) -> dict[str, Examples]:
    """The examples of some splits, by role."""
    data = config.data
    return open_dataset(
        data.source,
        splits,
        data.dir,
        image_column=data.image_column,
        label_column=data.label_column,
        skip_unreadable=data.skip_unreadable,
    )


def on_device(preprocessing: Preprocessing, examples: Examples) -> Preprocessing:
    """Images of many sizes were resized by the host; those of one size are by the device."""
    return preprocessing.after_host() if examples.image_shape is None else preprocessing


def with_random_trunk(pretrained: Pretrained, seed: int) -> dict[str, Any]:
    """The variables with a trunk as before any training, and the head as it is."""
    shape = pretrained.family.example_shape(pretrained.config)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    module, head = pretrained.module, pretrained.family.head

    def initialise(key):
        return module.init(key, jnp.zeros(images.shape, images.dtype))

    variables = jax.jit(initialise)(jax.random.key(seed))
    variables["params"][head] = pretrained.variables["params"][head]
    return variables
