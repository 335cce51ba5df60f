"""Low-rank adapters beside the kernels of dense and convolution layers, without touching a model.

For a kernel W the layer computes x W + s (d(x) A) B with s = alpha / rank and d dropout (Hu et al.
2021, arXiv:2106.09685). For a convolution, A is a kernel of W's window, stride and padding with
`rank` outputs, and B a 1 × 1 convolution, so that both forms are linear in x and W + s A B is their
merged kernel. The adapters are parameters like others, under `lora/PATH OF THE LAYER/{a,b}`.
"""

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import param_tree
from tl_jax.errors import UserError
from tl_jax.models.layers import drop
from tl_jax.recipes import KINDS, Lora, Parameter, matcher

ROOT = "lora"
_LAYERS = (nn.Dense, nn.Conv)


def targets(settings: Lora, parameters: Sequence[Parameter]) -> list[Parameter]:
    """The kernels of the trunk that get adapters.

    Raises:
      UserError: a word or an expression that names none.
    """
    kernels = [p for p in parameters if p.path.endswith("/kernel") and p.kind != "head"]
    chosen: dict[str, Parameter] = {}
    for target in settings.targets:
        found = list(filter(matcher(target), kernels))
        if not found:
            kinds = [kind for kind in KINDS if any(kind in p.kinds for p in kernels)]
            raise UserError(
                f"config.freeze.targets: the network has no kernel of {target!r}; it has kernels "
                f"of {', '.join(kinds)}, the first of them {kernels[0].name}"
            )
        chosen |= {p.path: p for p in found}
    return list(chosen.values())


def init(settings: Lora, parameters: Sequence[Parameter], seed: int) -> dict[str, Any]:
    """The adapters as a tree for `params["lora"]`: float32, A normal with variance 1 / fan-in, B 0.

    The function of the network is unchanged at first, since A B = 0.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(ROOT.encode()))
    leaves: dict[str, Any] = {}
    for target in targets(settings, parameters):
        layer = target.path.removesuffix("/kernel")
        own = jax.random.fold_in(key, zlib.crc32(layer.encode()))
        *window, inputs, outputs = target.shape
        scale = float(np.prod([*window, inputs])) ** -0.5
        shape = (*window, inputs, settings.rank)
        leaves[f"{layer}/a"] = scale * jax.random.normal(own, shape, jnp.float32)
        leaves[f"{layer}/b"] = jnp.zeros((*[1] * len(window), settings.rank, outputs), jnp.float32)
    return param_tree.unflatten(leaves)


def applied(
    settings: Lora | None, params: Mapping[str, Any], keys: jax.Array | None = None
) -> contextlib.AbstractContextManager:
    """A context in which the layers of a module that is applied have their adapters.

    Args:
      settings: None for a network without adapters.
      params: with the adapters under `lora`; those that are missing are left out.
      keys: a typed PRNG key an example [N] for the dropout; None switches it off.
    """
    adapters = param_tree.flatten(params.get(ROOT, {}))
    if settings is None or not adapters:
        return contextlib.nullcontext()
    scale = settings.alpha / settings.rank

    def intercept(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        layer = param_tree.SEPARATOR.join(module.path)
        if context.method_name != "__call__" or f"{layer}/a" not in adapters:
            return output
        down, up = adapters[f"{layer}/a"], scale * adapters[f"{layer}/b"]
        down, up = down.astype(output.dtype), up.astype(output.dtype)
        x = args[0].astype(output.dtype)
        x = drop(x, keys, settings.dropout, f"{ROOT}/{layer}")
        if isinstance(module, nn.Dense):
            return output + (x @ down) @ up
        conv = nn.Conv(
            down.shape[-1],
            down.shape[:-2],
            strides=module.strides,
            padding=module.padding,
            use_bias=False,
            dtype=output.dtype,
            parent=None,
        )
        narrow = conv.apply({"params": {"kernel": down}}, x)
        return output + narrow @ up[0, 0]

    return nn.intercept_methods(intercept)


def merge(settings: Lora | None, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the plain network that computes the same: W + s A B for W, no adapters."""
    if settings is None or ROOT not in variables["params"]:
        return dict(variables)
    adapters = param_tree.flatten(variables["params"][ROOT])
    params = {k: v for k, v in param_tree.flatten(variables["params"]).items()}
    params = {k: v for k, v in params.items() if not k.startswith(f"{ROOT}/")}
    scale = settings.alpha / settings.rank
    for path, down in adapters.items():
        layer, _, name = path.rpartition(param_tree.SEPARATOR)
        if name == "a":
            up = adapters[f"{layer}/b"]
            kernel = params[f"{layer}/kernel"]
            product = jnp.matmul(down, up.reshape(up.shape[-2:]), precision="highest")
            params[f"{layer}/kernel"] = (kernel + scale * product).astype(kernel.dtype)
    return {**variables, "params": param_tree.unflatten(params)}
