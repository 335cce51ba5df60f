"""The frozen prefix as a function of the image, made ready to run.

Nothing in it trains, so that its form is free: each BatchNorm on its stored statistics is folded
into the convolution below it, W' = W γ / √(σ² + ε) and b' = β − μ γ / √(σ² + ε), adapters are
merged, and kernels are held in the dtype that the network computes in. On a CPU 1 × 1 convolutions,
and larger ones of few positions, are matrix products over patches, which are faster there than
XLA's convolutions, and what is made of an image has the same bits at every place in a batch. The
models know nothing of that: their layers are intercepted.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax import lora, param_tree
from tl_jax.freezing import Plan
from tl_jax.models.family import Family

_FEW = 14 * 14  # positions up to which patches pay, measured at 64, 128 and 224 px
_WIDE = 48  # output channels from which XLA's convolution rounds an image alike at every place
_SHIFT = "shift"  # collection of the folded BatchNorms' b', by the layer's path


def can_be_ready(plan: Plan) -> bool:
    """Whether there is a prefix whose statistics stay where they are."""
    return plan.boundary > 0 and not any(b < plan.boundary for b in plan.batch_norm_blocks)


def ready(
    module: nn.Module, family: Family, plan: Plan, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables of the prefix, for `apply`.

    Args:
      module: the network.
      family: says which layers a BatchNorm follows at once.
      plan: says where the prefix ends.
      variables: of the network, all below the boundary.
    """
    merged = lora.merge(plan.adapters, variables)
    below = {p.path for p in plan.parameters if p.block < plan.boundary}
    params = param_tree.flatten(merged["params"])
    params = {path: leaf for path, leaf in params.items() if path in below}
    statistics = param_tree.flatten(merged.get("batch_stats", {}))
    shifts = {}
    for path in list(params):
        layer, _, name = path.rpartition(param_tree.SEPARATOR)
        parent, _, own = layer.rpartition(param_tree.SEPARATOR)
        if name != "scale" or f"{layer}/var" not in statistics:
            continue
        convolution = f"{parent}/{family.folds[own]}"
        factor = params.pop(path) * jax.lax.rsqrt(statistics[f"{layer}/var"] + family.epsilon)
        params[f"{convolution}/kernel"] = params[f"{convolution}/kernel"] * factor
        shifts[layer] = params.pop(f"{layer}/bias") - statistics[f"{layer}/mean"] * factor
    dtype = module.dtype
    for path in params:
        layer = path.rpartition(param_tree.SEPARATOR)[0]
        if f"{layer}/kernel" in params:  # such layers compute in the network's dtype, norms do not
            params[path] = params[path].astype(dtype)
    shifts = {path: leaf.astype(dtype) for path, leaf in shifts.items()}
    return {"params": param_tree.unflatten(params), _SHIFT: shifts}


def apply(module: nn.Module, plan: Plan, prefix: Mapping[str, Any], images: jax.Array) -> Any:
    """What the boundary's block takes.

    Args:
      module: the network.
      plan: says where the prefix ends.
      prefix: as `ready` gave it.
      images: preprocessed, float [N, H, W, channels].
    """
    shifts = prefix[_SHIFT]

    def intercept(call, args, kwargs, context):
        path = param_tree.SEPARATOR.join(context.module.path)
        if context.method_name == "__call__" and path in shifts:
            return jnp.add(args[0], shifts[path])
        return call(*args, **kwargs)

    with products(alike=True), nn.intercept_methods(intercept):
        return module.apply({"params": prefix["params"]}, images, last=plan.boundary)


def products(*, alike: bool = False) -> contextlib.AbstractContextManager:
    """On a CPU, a context in which convolutions of few positions are matrix products.

    Args:
      alike: whether each image must come out alike, bit for bit, at every place in a batch.
    """
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()

    def intercept(call, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv):
            found = _on_cpu(context.module, *args, alike=alike)
            return call(*args, **kwargs) if found is None else found
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def _on_cpu(layer: nn.Conv, x: jax.Array, *, alike: bool) -> jax.Array | None:
    """What the layer gives, in the form that suits a CPU; None where that is its own."""
    dilated = layer.input_dilation not in (None, 1) or layer.kernel_dilation not in (None, 1)
    padding = 0 if layer.padding == "VALID" else layer.padding
    if layer.feature_group_count != 1 or dilated or not isinstance(padding, int):
        return None
    x, kernel = x.astype(layer.dtype), layer.variables["params"]["kernel"].astype(layer.dtype)
    strides = layer.strides if isinstance(layer.strides, tuple) else (layer.strides or 1,) * 2
    x = jnp.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    rows, columns, _, width = kernel.shape
    height = (x.shape[1] - rows) // strides[0] + 1
    if height * ((x.shape[2] - columns) // strides[1] + 1) <= _FEW or rows == columns == 1:
        found = _over_patches(x, kernel, strides)
    elif alike and width < _WIDE:
        kernel = jnp.pad(kernel, ((0, 0),) * 3 + ((0, _WIDE - width),))
        found = jax.lax.conv_general_dilated(
            x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[..., :width]
    else:
        return None
    return (
        found + layer.variables["params"]["bias"].astype(layer.dtype) if layer.use_bias else found
    )


def _over_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """A convolution as one product of all patches [N, h, w, k k C] with its kernel [k, k, C, D]."""
    (rows, columns, channels, width), (down, across) = kernel.shape, strides
    height, breadth = (x.shape[1] - rows) // down + 1, (x.shape[2] - columns) // across + 1
    if (rows, columns) == strides:  # patches that do not overlap
        x = x[:, : height * rows, : breadth * columns]
        x = x.reshape(-1, height, rows, breadth, columns, channels).swapaxes(2, 3)
        patches = x.reshape(-1, height, breadth, rows * columns * channels)
    else:
        patches = jnp.concatenate(
            [
                x[
                    :,
                    i : i + (height - 1) * down + 1 : down,
                    j : j + (breadth - 1) * across + 1 : across,
                ]
                for i in range(rows)
                for j in range(columns)
            ],
            axis=-1,
        )
    return patches @ kernel.reshape(-1, width)
