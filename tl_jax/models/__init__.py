"""The model families, by `model_type` in config.json."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tl_jax.errors import UserError
from tl_jax.models import resnet, vit
from tl_jax.models.family import BlockSpec, Family
from tl_jax.models.layers import Chain, Head

__all__ = [
    "FAMILIES",
    "BlockSpec",
    "Chain",
    "Family",
    "Head",
    "family_of",
    "initial",
    "variable_shapes",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (resnet.FAMILY, vit.FAMILY)}


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json whose every field is fit to build it.

    Args:
      config: content of config.json.
      source: folder or Hub id, for messages.

    Raises:
      UserError: the family is not supported, or fields are wrong (it names all of them).
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"{source}: model_type {model_type!r:.80} in config.json is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if problems := family.problems(config):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{source}: config.json cannot be used:{lines}")
    return family


def variable_shapes(module: Chain, input_shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The module's variables as `jax.ShapeDtypeStruct`s; nothing is computed.

    Args:
      module: with or without a head.
      input_shape: [N, H, W, C] of some images; see `Family.example_shape`.
    """
    images = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    return initial.eval_shape(module, jax.random.key(0), images)


@functools.partial(jax.jit, static_argnums=0)
def initial(module: Chain, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """The module's variables before any training; of the images only their shape matters."""
    last = -1 if module.num_classes is None else None
    return dict(module.init(key, images, last=last))
