"""ViT (https://arxiv.org/abs/2010.11929) as in transformers' `ViTForImageClassification`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tl_jax.errors import UserError
from tl_jax.models import heads
from tl_jax.models.family import MAX_DEPTH, BlockSpec, Family, Fields, check_images, pair
from tl_jax.models.layers import ACTIVATIONS, Block, Chain, Dropout, bicubic_matrix

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}


class Options(NamedTuple):
    """The fields of transformers' `ViTConfig` that shape the network; sizes are (height, width)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    layer_norm_eps: float
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    qkv_bias: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across for which the checkpoint has position embeddings."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class PatchEmbeddings(nn.Module):
    """Cuts images into patches and projects each."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`projection`, a convolution whose stride is its size."""
        patch = self.options.patch_size
        self.projection = nn.Conv(
            self.options.hidden_size, patch, strides=patch, padding="VALID", dtype=self.dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, H, W, C] → [N, H // patch, W // patch, hidden_size]."""
        return self.projection(x)


class Embeddings(nn.Module):
    """Patches with a class token in front and position embeddings added."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`cls_token`, `position_embeddings` (the checkpoint's size), `patch_embeddings`."""
        rows, columns = self.options.grid
        normal = nn.initializers.normal(0.02)
        width = self.options.hidden_size
        self.cls_token = self.param("cls_token", normal, (1, 1, width))
        shape = (1, rows * columns + 1, width)
        self.position_embeddings = self.param("position_embeddings", normal, shape)
        self.patch_embeddings = PatchEmbeddings(self.options, self.dtype)
        self.dropout = Dropout(self.options.hidden_dropout_prob)

    def positions(self, grid: tuple[int, int]) -> jax.Array:
        """Position embeddings for a grid of patches: float [1, 1 + rows · columns, hidden_size]."""
        stored = self.position_embeddings
        if grid == self.options.grid:
            return stored
        down, across = (
            bicubic_matrix(*sizes) for sizes in zip(self.options.grid, grid, strict=True)
        )
        patches = stored[0, 1:].reshape(*self.options.grid, -1)
        patches = jnp.einsum("ih,jw,hwc->ijc", down, across, patches, precision="highest")
        patches = patches.reshape(1, grid[0] * grid[1], -1)
        return jnp.concatenate([stored[:, :1], patches.astype(stored.dtype)], axis=1)

    def __call__(
        self, x: jax.Array, keys: jax.Array | None = None, batch_norm: bool = False
    ) -> jax.Array:
        """x [N, H, W, C] → [N, 1 + patches, hidden_size]."""
        check_images(x, self.options.num_channels)
        if x.shape[1] < self.options.patch_size[0] or x.shape[2] < self.options.patch_size[1]:
            raise UserError(
                f"images of {x.shape[1]}×{x.shape[2]} are smaller than one patch of "
                f"{self.options.patch_size[0]}×{self.options.patch_size[1]}: "
                "choose a larger image_size"
            )
        patches = self.patch_embeddings(x.astype(self.dtype))
        count, rows, columns, width = patches.shape
        first = jnp.broadcast_to(self.cls_token.astype(self.dtype), (count, 1, width))
        tokens = jnp.concatenate([first, patches.reshape(count, rows * columns, width)], axis=1)
        return self.dropout(tokens + self.positions((rows, columns)).astype(self.dtype), keys)


class SelfAttention(nn.Module):
    """Scaled dot-product attention of every token over every token; softmax in float32."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`query`, `key`, `value`."""
        width, bias = self.options.hidden_size, self.options.qkv_bias
        self.query = nn.Dense(width, use_bias=bias, dtype=self.dtype)
        self.key = nn.Dense(width, use_bias=bias, dtype=self.dtype)
        self.value = nn.Dense(width, use_bias=bias, dtype=self.dtype)
        self.dropout = Dropout(self.options.attention_probs_dropout_prob)

    def __call__(
        self, x: jax.Array, keys: jax.Array | None, tokens: int | None = None
    ) -> jax.Array:
        """x [N, T, D] → [N, tokens, D]: softmax(q kᵀ / √d) v in each head."""
        read = x[:, :tokens]
        query, key, value = (
            project(y).reshape(*y.shape[:2], self.options.num_attention_heads, -1)
            for project, y in ((self.query, read), (self.key, x), (self.value, x))
        )
        return self.attend(query, key, value, keys).reshape(read.shape)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """query [N, tokens, heads, d], key and value [N, T, heads, d] → as query."""
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        return jnp.einsum("nhqk,nkhd->nqhd", self.dropout(weights, keys), value)


class Output(nn.Module):
    """Linear layer back to the residual stream's width, then dropout."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`dense`."""
        self.dense = nn.Dense(self.options.hidden_size, dtype=self.dtype)
        self.dropout = Dropout(self.options.hidden_dropout_prob)

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x [N, T, …] → [N, T, D]."""
        return self.dropout(self.dense(x), keys)


class Attention(nn.Module):
    """Attention and its output projection."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`attention` and `output`."""
        self.attention = SelfAttention(self.options, self.dtype)
        self.output = Output(self.options, self.dtype)

    def __call__(
        self, x: jax.Array, keys: jax.Array | None, tokens: int | None = None
    ) -> jax.Array:
        """x [N, T, D] → [N, tokens, D]."""
        return self.output(self.attention(x, keys, tokens), keys)


class Intermediate(nn.Module):
    """The wide layer of the MLP."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`dense`."""
        self.dense = nn.Dense(self.options.intermediate_size, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, T, D] → [N, T, intermediate_size]."""
        return ACTIVATIONS[self.options.hidden_act](self.dense(x))


class Layer(nn.Module):
    """One encoder layer, normalised before attention and before the MLP."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """Names as in the checkpoint."""
        self.layernorm_before = layer_norm(self.options, self.dtype)
        self.attention = Attention(self.options, self.dtype)
        self.layernorm_after = layer_norm(self.options, self.dtype)
        self.intermediate = Intermediate(self.options, self.dtype)
        self.output = Output(self.options, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        batch_norm: bool = False,
        tokens: int | None = None,
    ) -> jax.Array:
        """x [N, T, D] → [N, tokens, D]: the first so many, all of them by default."""
        x = x[:, :tokens] + self.attention(self.layernorm_before(x), keys, tokens)
        return x + self.output(self.intermediate(self.layernorm_after(x)), keys)


class Encoder(nn.Module):
    """Holds the layers."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`layer_0`, `layer_1` …"""
        self.layer = [
            Layer(self.options, self.dtype) for _ in range(self.options.num_hidden_layers)
        ]


class Trunk(nn.Module):
    """Holds everything but the head."""

    options: Options
    dtype: Any

    def setup(self) -> None:
        """`embeddings`, `encoder`, `layernorm`."""
        self.embeddings = Embeddings(self.options, self.dtype)
        self.encoder = Encoder(self.options, self.dtype)
        self.layernorm = layer_norm(self.options, jnp.float32)


class ViT(Chain):
    """Embeddings, encoder layers, normalised tokens, head."""

    options: Options

    def setup(self) -> None:
        """`vit` and `classifier`."""
        self.vit = Trunk(self.options, self.dtype)
        self.classifier = heads.layer(self.head, self.num_classes)

    def class_token(self, x: jax.Array) -> jax.Array:
        """x [N, T, D] → float32 [N, D], the class token after the final norm."""
        return self.vit.layernorm(x[:, 0])

    def mean_patch(self, x: jax.Array) -> jax.Array:
        """x [N, T, D] → float32 [N, D], the mean of the patches after the final norm."""
        return self.vit.layernorm(x[:, 1:]).mean(axis=1)

    def blocks(self, last: int | None = None) -> Sequence[Block]:
        """See `chain`; the top layer gives the class token alone where no other is read."""
        layers: list[Block] = [*self.vit.encoder.layer]
        norm = 1 + len(layers)
        patches = self.head.input in ("pooled", "cls+mean")
        if norm in range(norm + 2)[:last] and not patches:
            layers[-1] = functools.partial(layers[-1], tokens=1)
        return [
            self.vit.embeddings,
            *heads.tapped(layers, self.head.last_blocks),
            heads.seeing(
                self.mean_patch if self.head.input == "pooled" else self.class_token,
                self.mean_patch if self.head.input == "cls+mean" else None,
            ),
            heads.block(self.head, self.classifier),
        ]


def layer_norm(options: Options, dtype: Any) -> nn.Module:
    """LayerNorm with the config's epsilon; the exact variance, as 1e-12 leaves no room for less."""
    return nn.LayerNorm(epsilon=options.layer_norm_eps, dtype=dtype, use_fast_variance=False)


def module(
    config: Mapping[str, Any],
    num_classes: int | None,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
) -> ViT:
    """The network that config.json describes (checked before with `problems`)."""
    values = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    values |= {name: pair(values[name]) for name in ("image_size", "patch_size")}
    return ViT(Options(**values), num_classes, dtype, axis_name)


def chain(config: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    """`embeddings`, `layer_0` …, `norm`, `head`."""
    count = config.get("num_hidden_layers", DEFAULTS["num_hidden_layers"])
    return (
        BlockSpec("embeddings", ("vit/embeddings",)),
        *(BlockSpec(f"layer_{i}", (f"vit/encoder/layer_{i}",)) for i in range(count)),
        BlockSpec("norm", ("vit/layernorm",)),
        BlockSpec("head", ("classifier",)),
    )


def problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the config's fields, one line each."""
    fields = Fields(config, DEFAULTS)
    wide = fields.size("hidden_size")
    fields.size("num_hidden_layers", MAX_DEPTH)
    if fields.size("num_attention_heads") and wide:
        heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
        fields.expect("num_attention_heads", width % heads == 0, f"a divisor of {width}")
    fields.size("intermediate_size")
    fields.one_of("hidden_act", ACTIVATIONS)
    fields.number("hidden_dropout_prob", 0.0, 1.0)
    fields.number("attention_probs_dropout_prob", 0.0, 1.0)
    fields.number("layer_norm_eps", 0.0, 1.0)
    sized = fields.pair("image_size")
    if fields.pair("patch_size") and sized:
        image, patch = pair(fields.get("image_size")), pair(fields.get("patch_size"))
        fits = image[0] >= patch[0] and image[1] >= patch[1]
        fields.expect("patch_size", fits, f"at most image_size, {fields.get('image_size')}")
    fields.size("num_channels")
    fields.flag("qkv_bias")
    return fields.problems


def example_shape(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """[1, H, W, C] of the size that the checkpoint was trained at."""
    height, width = pair(config.get("image_size", DEFAULTS["image_size"]))
    return 1, height, width, config.get("num_channels", DEFAULTS["num_channels"])


FAMILY = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    prefix="vit",
    head="classifier",
    head_key="classifier",
    module=module,
    chain=chain,
    problems=problems,
    example_shape=example_shape,
    inputs=("cls", "pooled", "cls+mean"),
    kinds=(
        (r"/position_embeddings$", "position"),
        (r"layernorm", "norm"),
        (r"/attention/", "attention"),
        (r"/layer_\d+/(intermediate|output)/", "mlp"),
        (r"/projection/", "convolution"),
    ),
    # The pooler of the base model; what masked image modelling adds.
    ignored=("vit.pooler", "vit.embeddings.mask_token", "vit.decoder"),
    # What transformers ≥ 5 writes with save_original_format=False.
    renames=(
        (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)
