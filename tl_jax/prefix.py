"""The frozen prefix as a function of the image, made ready to run.

Nothing in it trains, so that its form is free: each BatchNorm on its stored statistics is folded
into the convolution below it, W' = W γ / √(σ² + ε) and b' = β − μ γ / √(σ² + ε), adapters are
merged, kernels are held in the dtype that the network computes in, and layers have the form that
suits the processor (`layer_forms`). On a CPU an image gives the same bits wherever it stands in a
batch.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax import layer_forms, lora, param_tree
from tl_jax.freezing import Plan
from tl_jax.models.family import Family

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

    with layer_forms.suited(), nn.intercept_methods(intercept):
        return module.apply({"params": prefix["params"]}, images, last=plan.boundary)
