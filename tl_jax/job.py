"""A configuration → everything that its run consists of, before anything is trained."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tl_jax import config as config_lib
from tl_jax import depth_map, freezing, lora, models, optimizer, param_tree, subsets
from tl_jax.augmentation import augment
from tl_jax.config import Config
from tl_jax.datasets import Examples, open_dataset
from tl_jax.errors import UserError
from tl_jax.freezing import Plan
from tl_jax.input_pipeline import ImageRows
from tl_jax.models import Head
from tl_jax.phases import Stage, stages_of
from tl_jax.preprocessing import Preprocessing
from tl_jax.pretrained import Pretrained, load_pretrained
from tl_jax.recipes import Recipe
from tl_jax.workdir import WorkDir


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run consists of.

    Attributes:
      config: as it was asked for.
      pretrained: the network; its `variables` are those that training starts from.
      examples: by role: "train", "validation", "test" (the latter two may be missing).
      recipe: what the strategy comes to.
      stages: its phases.
      plan: what trains in any of them.
      steps_per_epoch: full batches in the training split.
    """

    config: Config
    pretrained: Pretrained
    examples: Mapping[str, Examples]
    recipe: Recipe
    stages: tuple[Stage, ...]
    plan: Plan
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

    def stage_at(self, step: int) -> Stage:
        """The phase in which step `step` (from 1 on) is done."""
        return next(stage for stage in self.stages if step <= stage.last)

    def stops_at(self, step: int) -> tuple[bool, bool]:
        """Whether an epoch ends with step `step`, and whether a checkpoint is due after it."""
        every, epoch_ends = (
            self.config.train.checkpoint_every_steps,
            not step % self.steps_per_epoch,
        )
        due = every is not None and not step % every
        return epoch_ends, epoch_ends or due or step == self.stage_at(step).last

    def next_stop(self, step: int, longest: int) -> int:
        """The step up to which training can go on from `step`, by at most `longest`."""
        return next(
            stop
            for stop in range(step + 1, step + longest + 1)
            if stop == step + longest or self.stops_at(stop)[1]
        )

    def learning_rate(self, step: int) -> float:
        """The configuration's learning rate at step `step` (from 1 on), before any multiplier."""
        return float(self.stage_at(step).schedule(step - 1))

    @property
    def plan_sha256(self) -> str:
        """SHA-256 of the resolved strategy: what trains in each step, how fast and until when."""
        phases = [
            [sorted(stage.plan.groups.items()), stage.config, stage.clip_norm, stage.last]
            for stage in self.stages
        ]
        return self._recipe_sha256(phases)

    @property
    def strategy_sha256(self) -> str:
        """SHA-256 of what the strategy's function makes of this network.

        Whatever the optimizer's settings and the number of examples are.
        """
        phases = [
            [sorted(stage.plan.groups.items()), stage.plan.rate, stage.clip_norm]
            for stage in self.stages
        ]
        return self._recipe_sha256([phases, [phase.epochs for phase in self.recipe.phases]])

    def _recipe_sha256(self, phases: Any) -> str:
        recipe = self.recipe
        whole = [phases, recipe.trunk, recipe.one_schedule, recipe.adapters, recipe.interpolate]
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    def describe_plan(self) -> dict[str, Any]:
        """The content of `plan.json`: of all phases together, of each, and what would run."""
        described = [
            optimizer.describe(stage.config, stage.plan, stage.optimizer) for stage in self.stages
        ]
        phases = [
            {
                "name": stage.plan.phase,
                "first_step": stage.first + 1,
                "last_step": stage.last,
                "epochs": (stage.last - stage.first) / self.steps_per_epoch,
                "gradient_clip_norm": stage.clip_norm,
                "warmup_steps": self._warmup_steps(stage),
                **fields,
            }
            for stage, fields in zip(self.stages, described, strict=True)
        ]
        adapters = self.recipe.adapters
        return {
            **optimizer.describe_all(self.plan, described),
            "epochs": self.config.train.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "batch_size": self.config.data.batch_size,
            "one_schedule": self.recipe.one_schedule,
            "adapters": None if adapters is None else dataclasses.asdict(adapters),
            "interpolate": list(self.recipe.interpolate),
            "data": {
                "source": self.config.data.source,
                "classes": len(self.class_names),
                "splits": {
                    role: {"split": split.split, "examples": len(split)}
                    for role, split in self.examples.items()
                },
            },
            "phases": phases,
        }

    def _warmup_steps(self, stage: Stage) -> int:
        length = self.total_steps if self.recipe.one_schedule else stage.last - stage.first
        return config_lib.steps_of(
            stage.config.warmup, steps_per_epoch=self.steps_per_epoch, total_steps=length
        )

    def rows(self, role: str) -> ImageRows:
        """The images of a split."""
        return ImageRows(self.examples[role], self.pretrained.preprocessing)

    def preprocess(self, batch: Mapping[str, jax.Array], keys: jax.Array | None = None) -> Any:
        """A batch of images → what the network takes; with a key for each, augmented.

        The draws of an augmentation of a fixed number of views depend on example and view alone.
        """
        images, data = batch["image"], self.config.data
        if "view" in batch:
            keys = jax.vmap(functools.partial(_view_key, self.config.seed))(
                batch["index"], batch["view"]
            )
        if keys is not None:
            images = augment(images, keys, data.augmentation)
        return self.device_preprocessing.device(images)


def _view_key(seed: int, index: jax.Array, view: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"view"))
    return jax.random.fold_in(jax.random.fold_in(key, view), index)


def prepare(config: Config) -> Job:
    """Finds data and network and resolves the plan.

    Raises:
      UserError: something is missing, damaged, or does not fit together.
    """
    data = config.data
    examples = open_examples(config, dataclasses.asdict(data.splits))
    examples["train"] = subsets.of_each_class(
        examples["train"],
        config.seed,
        examples_per_class=data.examples_per_class,
        fraction=data.fraction,
    )
    names = examples["train"].class_names
    if len(names) < 2:
        raise UserError(f"{data.source} has one class only, {names[0]!r}: nothing to tell apart")
    pretrained = _network(config, names)
    _check_images(pretrained)
    recipe, plans, pretrained = resolve_plans(config, pretrained)
    steps_per_epoch = len(examples["train"]) // data.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.data.batch_size: {data.batch_size} is more than the "
            f"{len(examples['train'])} examples of the training split {examples['train'].split!r}"
        )
    stages = stages_of(config, recipe, plans, steps_per_epoch)
    union = freezing.union(plans)
    return Job(config, pretrained, examples, recipe, stages, union, steps_per_epoch)


def _network(config: Config, names: tuple[str, ...]) -> Pretrained:
    """The pretrained network with a new head, or what an earlier run trained.

    Raises:
      UserError: it is not there, or another head or other classes are in the earlier run's.
    """
    model, head = config.model, Head(**dataclasses.asdict(config.head))
    if config.init_from is None:
        return load_pretrained(
            model.pretrained,
            len(names),
            revision=model.revision,
            image_size=model.image_size,
            class_names=names,
            head=head,
            seed=config.seed,
            dtype=jnp.dtype(model.dtype),
            precision=model.precision,
        )
    folder = WorkDir(config.init_from).exported()
    earlier = load_pretrained(
        str(folder),
        image_size=model.image_size,
        dtype=jnp.dtype(model.dtype),
        precision=model.precision,
    )
    if earlier.class_names != names:
        raise UserError(
            f"config.init_from: {config.init_from} tells {', '.join(earlier.class_names)} apart, "
            f"{config.data.source} has {', '.join(names)}. For a new head on its trunk set "
            f"config.model.pretrained={folder} instead."
        )
    trained = earlier.module.head
    if dataclasses.replace(head, dropout=trained.dropout, init=trained.init) != trained:
        raise UserError(f"config.head: {head} is not that of config.init_from, {trained}")
    module = earlier.module.clone(head=dataclasses.replace(trained, dropout=head.dropout))
    return dataclasses.replace(earlier, module=module)


def resolve_plans(
    config: Config, pretrained: Pretrained
) -> tuple[Recipe, tuple[Plan, ...], Pretrained]:
    """The strategy on this network: its recipe, a plan a phase, and the network it starts from.

    Raises:
      UserError: the strategy does not fit the network.
    """
    names = pretrained.conversion.keys
    family, chain, variables = pretrained.family, pretrained.chain, pretrained.variables
    network = depth_map.describe(family, chain, variables["params"], names)
    recipe = freezing.recipe(config.freeze, network)
    if recipe.trunk == "random" and config.init_from is not None:
        raise UserError(
            f"config.init_from: {config.freeze.strategy} starts from random weights, and what "
            f"{config.init_from} trained would be lost: leave it out"
        )
    if recipe.trunk == "random":
        variables = with_random_trunk(pretrained, config.seed)
    if recipe.adapters is not None:
        adapters = lora.init(recipe.adapters, network.parameters, config.seed)
        variables = {**variables, "params": {**variables["params"], lora.ROOT: adapters}}
        network = depth_map.describe(family, chain, variables["params"], names)
    statistics = {
        path: depth_map.block_of(path, chain)
        for path in param_tree.flatten(variables.get("batch_stats", {}))
    }
    plans = freezing.resolve(config.freeze, recipe, network, statistics)
    return recipe, plans, dataclasses.replace(pretrained, variables=variables)


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
    variables = models.initial(pretrained.module, jax.random.key(seed), jnp.zeros(shape))
    head = pretrained.family.head
    variables["params"][head] = pretrained.variables["params"][head]
    return variables
