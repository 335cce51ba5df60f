"""What the families share: activations by transformers' names, dropout, resampling, the chain."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Block = Callable[..., Any]


def _gelu(x: jax.Array) -> jax.Array:
    # As PyTorch computes it; JAX's own takes erfc, which costs more than all else around it.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _laplace(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


# transformers' ACT2FN without `prelu` and `xielu`, which hold parameters of their own.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Dropout(nn.Module):
    """Dropout as `drop` does it, by the path of this layer."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x [N, …], keys [N] typed PRNG keys or None (deterministic) → [N, …]."""
        return drop(x, keys, self.rate, "/".join(self.path))


def drop(x: jax.Array, keys: jax.Array | None, rate: float, layer: str) -> jax.Array:
    """Dropout whose mask belongs to the example, not to its place in the batch.

    The mask of example n is drawn from `fold_in(keys[n], crc32(layer))`, so that it is the same
    however the batch is split over devices (https://arxiv.org/abs/1207.0580 for dropout).

    Args:
      x: [N, …].
      keys: a typed PRNG key an example [N]; None switches it off.
      rate: share of the elements that become zero; the others are divided by 1 - rate.
      layer: name that no other layer has.
    """
    if keys is None or rate == 0.0:
        return x
    number = zlib.crc32(layer.encode())

    def mask(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), jnp.zeros_like(x))


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Rows that resample `size` values to `new_size`: float32 [new_size, size].

    What PyTorch's `interpolate(mode="bicubic", align_corners=False)` does along one side: Keys'
    kernel with a = -0.75, no antialiasing, neighbours beyond the border are the border's.
    """
    a = -0.75
    source = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    left = np.floor(source).astype(np.int64)
    matrix = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(source - left - offset)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        column = np.clip(left + offset, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), column), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes logits of the trunk's features; `tl_jax.models.heads` builds it.

    Attributes:
      kind: "linear", or "mlp" with one hidden layer and GELU.
      hidden: width of an MLP's hidden layer; None: as wide as its input.
      init: of a new head's output layer: "zeros", or "normal" with variance 1 / fan-in (LeCun).
      dropout: rate on what enters the head, in training.
      input: what it sees of a block's output: "cls", the class token; "pooled", the mean over
        positions or patches; "cls+mean", the class token and, of the last block, the mean over
        patches, too (as DINOv2's evaluation does); "default", the family's own.
      last_blocks: it sees that of so many of the trunk's last blocks, concatenated.
    """

    kind: str = "linear"
    hidden: int | None = None
    init: str = "zeros"
    dropout: float = 0.0
    input: str = "default"
    last_blocks: int = 1


class Chain(nn.Module):
    """A network as a chain of blocks, any contiguous range of which can be run.

    Attributes:
      options: what config.json says of the network, hashable.
      num_classes: outputs of the head; None builds none.
      dtype: what the trunk computes in; what the head sees and the head are float32.
      axis_name: mapped axis over which BatchNorm in training mode averages its statistics.
      precision: of float32 matrix products and convolutions, a name of
        `jax.default_matmul_precision`. Accelerators round their operands to 10 bits and fewer
        unless it is "float32"; "tensorfloat32" is faster on a GPU and errs by about 1e-3.
      head: what kind of head, and what it sees.
    """

    options: Any
    num_classes: int | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None
    precision: str = "float32"
    head: Head = Head()

    def blocks(self, last: int | None = None) -> Sequence[Block]:
        """The blocks in order, the head last; each takes `(x, keys=…, batch_norm=…)`.

        Args:
          last: end of the range that will run; what no block below it reads may be left out.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Any,
        first: int = 0,
        last: int | None = None,
        training: Sequence[int] = (),
        batch_norm: Sequence[int] = (),
        keys: jax.Array | None = None,
    ) -> Any:
        """Runs blocks[first:last].

        Args:
          x: what block `first` takes; images float [N, H, W, C] for the first one.
          first: start of the range, as in a Python slice.
          last: end of the range; None runs the head too, -1 gives what the head sees, [N, D].
          training: indices of the blocks whose dropout is active.
          batch_norm: indices of the blocks whose BatchNorm uses the batch's statistics and updates
            the running ones (apply with `mutable=["batch_stats"]`); all others use the stored ones.
          keys: one typed PRNG key an example, [N]; None switches every dropout off.

        Returns:
          What the last of these blocks gives: float32 logits [N, classes] after the head. Where
          the head sees several blocks, it is from the second of them on a tuple of their outputs.

        Raises:
          UserError: the images have another number of channels, or there is no head to run.
        """
        blocks = self.blocks(last)
        with jax.default_matmul_precision(self.precision):
            for index in range(len(blocks))[first:last]:
                x = blocks[index](
                    x, keys=keys if index in training else None, batch_norm=index in batch_norm
                )
        return x
