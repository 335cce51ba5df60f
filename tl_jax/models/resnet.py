"""ResNet (https://arxiv.org/abs/1512.03385) as in transformers' `ResNetForImageClassification`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tl_jax.models import heads
from tl_jax.models.family import MAX_DEPTH, BlockSpec, Family, Fields, check_images
from tl_jax.models.layers import ACTIVATIONS, Block, Chain

EPSILON = 1e-5  # of every BatchNorm
REDUCTION = 4  # a bottleneck's inner width is its outer one over this

DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": (256, 512, 1024, 2048),
    "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


class Options(NamedTuple):
    """The fields of transformers' `ResNetConfig` that shape the network."""

    num_channels: int
    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    layer_type: str
    hidden_act: str
    downsample_in_first_stage: bool
    downsample_in_bottleneck: bool


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, activation. Running variances are biased (PyTorch's are not)."""

    features: int
    kernel: int
    stride: int
    activation: str | None
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`convolution` without bias, `normalization` with PyTorch's momentum (0.1 there)."""
        # Symmetric padding as in PyTorch: "SAME" pads stride 2 on one side only.
        self.convolution = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            use_bias=False,
            dtype=self.dtype,
        )
        self.normalization = nn.BatchNorm(
            momentum=0.9,
            epsilon=EPSILON,
            dtype=self.dtype,
            axis_name=self.axis_name,
            use_fast_variance=False,
        )

    def __call__(self, x: jax.Array, batch_norm: bool) -> jax.Array:
        """x [N, H, W, C] → [N, ceil(H/stride), ceil(W/stride), features]."""
        x = self.normalization(self.convolution(x), use_running_average=not batch_norm)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class Embedder(nn.Module):
    """The stem: 7×7 convolution and 3×3 max pooling, both with stride 2."""

    options: Options
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`embedder` once more, as the checkpoint calls the convolution."""
        width, activation = self.options.embedding_size, self.options.hidden_act
        self.embedder = ConvNorm(width, 7, 2, activation, self.dtype, self.axis_name)

    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, batch_norm: bool = False
    ) -> jax.Array:
        """x [N, H, W, C] → [N, ceil(H/4), ceil(W/4), embedding_size]."""
        check_images(x, self.options.num_channels)
        x = self.embedder(x.astype(self.dtype), batch_norm)
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Residual(nn.Module):
    """A residual block: `layer` (basic: 3×3, 3×3; bottleneck: 1×1, 3×3, 1×1) plus the shortcut."""

    in_features: int
    features: int
    stride: int
    options: Options
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`layer_0` … and, where the shape changes, `shortcut`."""
        inner = self.features // REDUCTION
        early = self.stride if self.options.downsample_in_bottleneck else 1
        # The inner activation is ReLU whatever `hidden_act` says, as in transformers.
        rows: tuple[tuple[int, int, int, str | None], ...] = (
            ((self.features, 3, self.stride, "relu"), (self.features, 3, 1, None))
            if self.options.layer_type == "basic"
            else (
                (inner, 1, early, "relu"),
                (inner, 3, self.stride // early, "relu"),
                (self.features, 1, 1, None),
            )
        )
        self.layer = [ConvNorm(*row, self.dtype, self.axis_name) for row in rows]
        changes = self.in_features != self.features or self.stride != 1
        self.shortcut = (
            ConvNorm(self.features, 1, self.stride, None, self.dtype, self.axis_name)
            if changes
            else None
        )

    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, batch_norm: bool = False
    ) -> jax.Array:
        """x [N, H, W, in_features] → [N, ceil(H/stride), ceil(W/stride), features]."""
        residual = x if self.shortcut is None else self.shortcut(x, batch_norm)
        for layer in self.layer:
            x = layer(x, batch_norm)
        return ACTIVATIONS[self.options.hidden_act](x + residual)


class Stage(nn.Module):
    """Holds the residual blocks of one width under their names in the checkpoint."""

    index: int
    options: Options
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`layers_0`, `layers_1` …; the first one changes width and resolution."""
        options = self.options
        width = options.hidden_sizes[self.index]
        before = (options.embedding_size, *options.hidden_sizes)[self.index]
        stride = 2 if self.index > 0 or options.downsample_in_first_stage else 1
        rows = [(before, width, stride)] + [(width, width, 1)] * (options.depths[self.index] - 1)
        self.layers = [Residual(*row, options, self.dtype, self.axis_name) for row in rows]


class Encoder(nn.Module):
    """Holds the stages."""

    options: Options
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`stages_0`, `stages_1` …"""
        self.stages = [
            Stage(index, self.options, self.dtype, self.axis_name)
            for index in range(len(self.options.depths))
        ]


class Trunk(nn.Module):
    """Holds everything but the head."""

    options: Options
    dtype: Any
    axis_name: str | None

    def setup(self) -> None:
        """`embedder` and `encoder`."""
        self.embedder = Embedder(self.options, self.dtype, self.axis_name)
        self.encoder = Encoder(self.options, self.dtype, self.axis_name)


class ResNet(Chain):
    """Stem, residual blocks, mean over positions, head."""

    options: Options

    def setup(self) -> None:
        """`resnet` and `classifier_1`."""
        self.resnet = Trunk(self.options, self.dtype, self.axis_name)
        # In the checkpoint the head is a Sequential of a flattening and a linear layer.
        self.classifier = [None, heads.layer(self.head, self.num_classes)]

    def blocks(self, last: int | None = None) -> Sequence[Block]:
        """See `chain`."""
        residual = [layer for stage in self.resnet.encoder.stages for layer in stage.layers]
        return [
            self.resnet.embedder,
            *heads.tapped(residual, self.head.last_blocks),
            heads.seeing(mean_pool),
            heads.block(self.head, self.classifier[1]),
        ]


def mean_pool(x: jax.Array) -> jax.Array:
    """x [N, H, W, C] → float32 [N, C], the mean over positions."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def module(
    config: Mapping[str, Any],
    num_classes: int | None,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
) -> ResNet:
    """The network that config.json describes (checked before with `problems`)."""
    values = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    values |= {name: tuple(values[name]) for name in ("hidden_sizes", "depths")}
    return ResNet(Options(**values), num_classes, dtype, axis_name)


def chain(config: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    """`stem`, `stages_0/layers_0` …, `pool`, `head`."""
    names = [
        f"stages_{stage}/layers_{layer}"
        for stage, depth in enumerate(config.get("depths", DEFAULTS["depths"]))
        for layer in range(depth)
    ]
    return (
        BlockSpec("stem", ("resnet/embedder",)),
        *(BlockSpec(name, (f"resnet/encoder/{name}",)) for name in names),
        BlockSpec("pool"),
        BlockSpec("head", ("classifier_1",)),
    )


def problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the config's fields, one line each."""
    fields = Fields(config, DEFAULTS)
    fields.size("num_channels")
    fields.size("embedding_size")
    known = fields.one_of("layer_type", ("basic", "bottleneck"))
    bottleneck = known and fields.get("layer_type") == "bottleneck"
    sized = fields.sizes("hidden_sizes", least=REDUCTION if bottleneck else 1)
    deep = fields.sizes("depths", MAX_DEPTH)
    if sized and deep:
        stages = len(fields.get("hidden_sizes"))
        fields.expect("depths", len(fields.get("depths")) == stages, f"{stages}, as hidden_sizes")
        fields.expect("depths", sum(fields.get("depths")) <= MAX_DEPTH, f"≤ {MAX_DEPTH} in all")
    fields.one_of("hidden_act", ACTIVATIONS)
    fields.flag("downsample_in_first_stage")
    fields.flag("downsample_in_bottleneck")
    return fields.problems


FAMILY = Family(
    model_type="resnet",
    architecture="ResNetForImageClassification",
    prefix="resnet",
    head="classifier_1",
    head_key="classifier.1",
    module=module,
    chain=chain,
    problems=problems,
    example_shape=lambda config: (1, 32, 32, config.get("num_channels", DEFAULTS["num_channels"])),
    inputs=("pooled",),
    kinds=((r"/normalization/", "norm"), (r"/convolution/", "convolution")),
    folds={"normalization": "convolution"},
    epsilon=EPSILON,
    # Flax files of basic blocks: the list within the list got its name from Linen.
    renames=((r"\.layer\.layer_(\d+)\.", r".layer.\1."),),
)
