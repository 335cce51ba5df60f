"""The configuration's schema: every field with its type, default and limits, and its hash."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def option(default: Any, *, choices: Sequence[str] = (), at_least=None, above=None, below=None):
    """A field with its default and the values that it accepts."""
    limits = {"choices": tuple(choices), "at_least": at_least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Model:
    """The pretrained network."""

    pretrained: str = ""  # a Hub id, or a folder in the Hub's format
    revision: str | None = None  # a branch, tag or commit of the Hub
    image_size: int | None = option(None, at_least=1)  # None: as the checkpoint's processor says
    dtype: str = option("float32", choices=("float32", "bfloat16"))  # of the computation
    # Of float32 products: on a GPU "tensorfloat32" is faster, and errs by about 1e-3.
    precision: str = option("float32", choices=("float32", "tensorfloat32"))


@dataclasses.dataclass(frozen=True)
class Head:
    """The new classifier, and what it sees of the network."""

    kind: str = option("linear", choices=("linear", "mlp"))  # an MLP's one hidden layer has GELU
    hidden: int | None = option(None, at_least=1)  # width of an MLP; None: that of its input
    init: str = option("zeros", choices=("zeros", "normal"))  # of the output layer; 1 / fan-in
    dropout: float = option(0.0, at_least=0.0, below=1.0)  # of what enters the head
    # "cls" is a ViT's class token, "pooled" the mean over patches or positions, "default" the
    # network's own: "cls" of a ViT, "pooled" of a ResNet.
    input: str = option("default", choices=("default", "pooled", "cls", "cls+mean"))
    last_blocks: int = option(1, at_least=1)  # whose outputs it sees, concatenated


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which examples serve for what, in TensorFlow Datasets' slicing syntax."""

    train: str = "train"
    validation: str | None = None
    test: str | None = "test"


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples, and how they become batches."""

    source: str = ""  # tfds:NAME, hf:OWNER/NAME or folder:PATH
    dir: str | None = None  # TensorFlow Datasets' data directory
    splits: Splits = Splits()
    # Of each class of the training split a subset drawn by the run's seed; those of one seed are
    # nested. So many examples, or such a share.
    examples_per_class: int | None = option(None, at_least=1)
    fraction: float | None = option(None, above=0.0)  # at most 1
    image_column: str | None = None  # None: found by its type
    label_column: str | None = None
    batch_size: int = option(256, at_least=1)  # over all devices and processes
    augmentation: str = option("none", choices=("none", "flip", "random_resized_crop"))
    views: int | None = option(None, at_least=1)  # draws of the augmentation; None: anew each step
    skip_unreadable: bool = False  # leave unreadable images of a folder out instead of stopping
    threads: int | None = option(None, at_least=1)  # that read; None: 8, or 2 for small images
    workers: int = option(0, at_least=0)  # processes for it, each with so many threads


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and on which loss."""

    epochs: int = option(10, at_least=1)
    label_smoothing: float = option(0.0, at_least=0.0, below=1.0)
    # Over the trainable part; 0 for none, None for 1 in phases that train more than the head: a
    # new head's large errors would throw the trunk's weights far off.
    gradient_clip_norm: float | None = option(None, at_least=0.0)
    gradient_accumulation: int = option(1, at_least=1)  # micro-batches a step
    rematerialise: bool = False  # compute blocks again in the backward pass, for less memory
    checkpoint_every_steps: int | None = option(None, at_least=1)  # besides each epoch's end


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule; a strategy multiplies the learning rate group by group."""

    name: str = option("sgd", choices=("sgd", "adam", "adamw"))
    learning_rate: float = option(0.1, above=0.0)
    weight_decay: float = option(0.0, at_least=0.0)  # on kernels; coupled (L2) but for adamw
    momentum: float = option(0.9, at_least=0.0, below=1.0)  # of sgd
    schedule: str = option("cosine", choices=("constant", "cosine", "linear"))
    warmup: str | int = 0  # steps, or "5%", "2 epochs", "100 steps"


@dataclasses.dataclass(frozen=True)
class Freeze:
    """The strategy, and what goes with any of them; a strategy's options stand beside these."""

    strategy: str = "linear_probe"
    # "frozen": running statistics stay. "batch": blocks that train use the batch's and update the
    # running ones. "stats_only": all blocks do, with frozen weights. "reestimate": one pass over
    # the training data measures them anew, before training or after.
    batch_norm: str = option("frozen", choices=("frozen", "batch", "stats_only", "reestimate"))
    reestimate: str = option("before", choices=("before", "after"))
    layer_decay: float | None = option(
        None, above=0.0, below=1.0
    )  # rate × this for each block down
    discriminative: tuple | None = None  # (lowest, highest) multiplier, from the stem to the head
    phases: tuple | None = None  # a dict for each phase: "epochs", and any field of optimizer
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as freeze.NAME


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values of which every combination trains a head; None leaves the configuration's own."""

    learning_rate: tuple | None = None
    weight_decay: tuple | None = None
    seed: tuple | None = None
    input: tuple | None = None  # of head.input


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a linear probe's features are used for besides."""

    grid: Grid = Grid()  # all heads train as one program; the best by validation is then the run's
    # "logistic_regression" (L-BFGS) and "nearest_neighbours" on the same features.
    baselines: tuple = ()


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a sweep measures of a run's features besides its accuracy; 0 or () leaves a part out."""

    probe_images: int = option(256, at_least=0)  # of validation, on which activations are compared
    shifts: tuple = ()  # names in corruptions.KINDS; images of the test split
    severities: tuple = (1, 3, 5)  # of 1 to 5
    shift_images: int = option(300, at_least=1)
    gradient_steps: int = option(10, at_least=0)  # of full fine-tuning, block by block
    source: str | None = None  # data of the checkpoint's own task, as data.source
    source_dir: str | None = None
    source_split: str = "test"
    source_images: int = option(1000, at_least=1)


@dataclasses.dataclass(frozen=True)
class Logging:
    """What is written down while training."""

    every_steps: int = option(50, at_least=1)
    profile_steps: int = option(0, at_least=0)  # so many steps are traced by jax.profiler
    figures: bool = True  # draw learning curves, confusion matrix, mistakes and plan
    compilation_cache: str | None = "~/.cache/tl_jax/compilation"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    model: Model = Model()
    head: Head = Head()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    freeze: Freeze = Freeze()
    probe: Probe = Probe()
    logging: Logging = Logging()
    parallel: str = option("pmap", choices=("pmap", "shard_map"))
    # Where what the frozen prefix yields is kept; "auto" weighs memory and cost, and says so.
    cache: str = option("auto", choices=("auto", "off", "device", "host", "disk"))
    cache_dir: str = "~/.cache/tl_jax/features"  # of caches on disk, shared between runs
    cache_limit_gb: float = option(50.0, above=0.0)  # of all caches in it together
    control: str | None = option(None, choices=("random_trunk", "from_scratch"))  # run beside
    # A finished work directory: its classifier, head and all, in the place of model.pretrained.
    init_from: str | None = None
    seed: int = option(0, at_least=0, below=2**31)


# What changes the speed, the log or the place of a run, but not its result.
WITHOUT_EFFECT = (
    "parallel",
    "cache",
    "cache_dir",
    "cache_limit_gb",
    "control",
    "logging",
    "data.dir",
    "data.threads",
    "data.workers",
    "train.checkpoint_every_steps",
)


def default_config() -> ConfigDict:
    """The schema's defaults, to be changed field by field in a config file."""
    # Not type-safe: `config_files` checks, and a field may take types ("5%" where 0 stands).
    return ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as written to `config.json`."""
    fields = dataclasses.asdict(config)
    fields["freeze"] |= fields["freeze"].pop("options")
    return json.loads(json.dumps(fields))


def config_hash(config: Config) -> str:
    """SHA-256 of all that changes the result (what `WITHOUT_EFFECT` names is left out)."""
    return hashlib.sha256(json.dumps(with_effect(config), sort_keys=True).encode()).hexdigest()


def with_effect(config: Config) -> dict[str, Any]:
    """The fields that change a run's result, by dotted name."""
    return {
        name: value
        for name, value in flatten(to_dict(config))
        if not any(name == left or name.startswith(f"{left}.") for left in WITHOUT_EFFECT)
    }


def differences(ours: Config, theirs: Mapping[str, Any]) -> list[str]:
    """One line for each field with effect in which `theirs` (a `to_dict`) differs from `ours`."""
    left = with_effect(ours)
    # A field that is younger than their file had its default there.
    right = with_effect(Config()) | {name: v for name, v in flatten(theirs) if name in left}
    return [
        f"config.{name}: {right.get(name)!r} there, {left[name]!r} here"
        for name in left
        if left[name] != right.get(name)
    ]


def steps_of(duration: str | int, *, steps_per_epoch: int, total_steps: int) -> int:
    """A duration in steps: 100, "100 steps", "2 epochs", "5%" (of the whole training).

    Raises:
      ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%|)\s*", str(duration))
    if not match:
        raise ValueError(f'{duration!r} is no duration: write 100, "100 steps", "2 epochs" or "5%"')
    number, unit = float(match[1]), match[2].rstrip("s")
    return round(
        number * {"": 1, "step": 1, "epoch": steps_per_epoch, "%": total_steps / 100}[unit]
    )


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted field name and its value."""
    for name, value in fields.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(dict(value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
