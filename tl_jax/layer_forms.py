"""The layers of a network in the form that suits the processor: the same function, made otherwise.

The models know nothing of it: their layers are intercepted. FLOPs are counted of the plain network.

- Patches that do not overlap (a ViT's embedding) are one matrix product with the kernel.
- On a CPU 1 × 1 convolutions, and up to 3 × 3 of few positions, are matrix products over patches,
  which are faster there than XLA's convolutions.
- On a GPU a convolution with a stride over few channels (a ResNet's stem) is one without a stride
  over stride × stride blocks of pixels as channels, which fill its matrix units.
- On a GPU attention in half precision is cuDNN's, which keeps no scores in memory (FlashAttention,
  https://arxiv.org/abs/2205.14135), where nothing is differentiated: JAX refuses its gradient for
  odd numbers of tokens, which a class token makes.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp

_FEW = 14 * 14  # positions up to which patches pay on a CPU, measured at 64, 128 and 224 px
_SMALL = 3  # kernels' side up to which they do: those of 7 × 7 hold each pixel 12 times
_WIDE = 48  # output channels from which XLA's convolution on a CPU rounds all images alike
_NARROW = 4  # channels up to which blocks of pixels pay on a GPU


def suited(*, differentiated: bool = False) -> contextlib.AbstractContextManager:
    """A context in which layers are computed in the form that suits `jax.default_backend()`.

    Args:
      differentiated: whether gradients go through them. Where none do, an image comes out alike,
        bit for bit, at every place in a batch on a CPU: XLA's convolution there (Eigen's) rounds by
        place where it has few output channels, and is given more.
    """
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        return contextlib.nullcontext()

    def intercept(call, args, kwargs, context):
        layer, found = context.module, None
        if context.method_name == "__call__" and isinstance(layer, nn.Conv):
            found = _convolution(layer, *args, backend=backend, alike=not differentiated)
        elif context.method_name == "attend" and backend == "gpu" and not differentiated:
            found = _attention(layer, *args)
        return call(*args, **kwargs) if found is None else found

    return nn.intercept_methods(intercept)


def _convolution(layer: nn.Conv, x: jax.Array, *, backend: str, alike: bool) -> jax.Array | None:
    """What the layer gives; None where its own form suits."""
    dilated = layer.input_dilation not in (None, 1) or layer.kernel_dilation not in (None, 1)
    padding = 0 if layer.padding == "VALID" else layer.padding
    if layer.feature_group_count != 1 or dilated or not isinstance(padding, int):
        return None
    kernel = layer.variables["params"]["kernel"].astype(layer.dtype)
    strides = layer.strides if isinstance(layer.strides, tuple) else (layer.strides or 1,) * 2
    size = kernel.shape[:2]
    x = jnp.pad(x.astype(layer.dtype), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    positions = _positions(x, kernel, strides)
    if size == strides != (1, 1):
        found = over_patches(x, kernel, strides)
    elif backend == "gpu":
        if x.shape[-1] > _NARROW or strides == (1, 1):
            return None
        found = over_blocks(x, kernel, strides)
    elif size == (1, 1) or (positions[0] * positions[1] <= _FEW and max(size) <= _SMALL):
        found = over_patches(x, kernel, strides)
    elif alike and kernel.shape[-1] < _WIDE:
        more = _WIDE - kernel.shape[-1]
        found = _convolve(x, jnp.pad(kernel, ((0, 0),) * 3 + ((0, more),)), strides)[..., :-more]
    else:
        return None
    bias = layer.variables["params"]["bias"].astype(layer.dtype) if layer.use_bias else None
    return found if bias is None else found + bias


def over_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """A convolution as one product of all patches with the kernel.

    Args:
      x: padded, [N, H, W, C].
      kernel: [k, l, C, D].
      strides: down and across.

    Returns:
      [N, (H - k) // strides[0] + 1, (W - l) // strides[1] + 1, D].
    """
    (rows, columns, channels, features), (down, across) = kernel.shape, strides
    height, width = _positions(x, kernel, strides)
    if (rows, columns) == strides:
        x = x[:, : height * rows, : width * columns]
        x = x.reshape(-1, height, rows, width, columns, channels).swapaxes(2, 3)
        patches = x.reshape(-1, height, width, rows * columns * channels)
    else:
        below, right = (height - 1) * down + 1, (width - 1) * across + 1
        patches = jnp.concatenate(
            [
                x[:, i : i + below : down, j : j + right : across]
                for i in range(rows)
                for j in range(columns)
            ],
            axis=-1,
        )
    return patches @ kernel.reshape(-1, features)


def over_blocks(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """A convolution as one without a stride over blocks of pixels; see `over_patches`."""
    (down, across), (height, width) = strides, _positions(x, kernel, strides)
    grow = [(0, -size % stride) for size, stride in zip(kernel.shape[:2], strides, strict=True)]
    kernel = jnp.pad(kernel, (*grow, (0, 0), (0, 0)))
    rows, columns, channels, features = kernel.shape
    rows, columns = rows // down, columns // across
    sides = ((height + rows - 1) * down, (width + columns - 1) * across)
    more = [(0, max(0, side - had)) for side, had in zip(sides, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *more, (0, 0)))[:, : sides[0], : sides[1]]
    x = x.reshape(-1, sides[0] // down, down, sides[1] // across, across, channels)
    kernel = kernel.reshape(rows, down, columns, across, channels, features)
    x, kernel = x.swapaxes(2, 3), kernel.swapaxes(1, 2)
    return _convolve(
        x.reshape(*x.shape[:3], -1), kernel.reshape(rows, columns, -1, features), (1, 1)
    )


def _positions(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> tuple[int, int]:
    """How many places a kernel has on a padded image, down and across."""
    down, across = strides
    height, width = (x.shape[i + 1] - kernel.shape[i] for i in (0, 1))
    return height // down + 1, width // across + 1


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=numbers)


def _attention(
    layer: nn.Module, query: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array | None
) -> jax.Array | None:
    """Attention [N, T, heads, d] by cuDNN; None where it cannot be, or dropout is active."""
    dropped = keys is not None and layer.options.attention_probs_dropout_prob > 0
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape == key.shape and query.shape[-1] <= 128 and not query.shape[-1] % 8
    if dropped or not half or not fits or not _has_flash_attention():
        return None
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _has_flash_attention() -> bool:
    """Whether the GPU is NVIDIA's of compute capability 8.0 (Ampere) or later."""
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", "0")).partition(".")[0]
    return "cuda" in device.client.platform_version.lower() and int(capability) >= 8
