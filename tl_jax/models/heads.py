"""Heads: what they see of the trunk, what they compute, how they start, which are sound."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tl_jax import param_tree
from tl_jax.errors import UserError
from tl_jax.models.family import Family, Fields, is_size
from tl_jax.models.layers import ACTIVATIONS, Block, Head, drop

KINDS = ("linear", "mlp")
INITS = ("zeros", "normal")


class Mlp(nn.Module):
    """Two dense layers with GELU (the exact one) between them."""

    width: int | None
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, D] → [N, num_classes]; `hidden` has D outputs where no width is given."""
        x = nn.Dense(self.width or x.shape[-1], name="hidden")(x)
        return nn.Dense(self.num_classes, name="output")(ACTIVATIONS["gelu"](x))


def layer(head: Head, num_classes: int | None) -> nn.Module | None:
    """The module that holds the head's parameters; None for a network without a head."""
    if num_classes is None:
        return None
    return Mlp(head.hidden, num_classes) if head.kind == "mlp" else nn.Dense(num_classes)


def block(head: Head, module: nn.Module | None) -> Block:
    """The head as a block, in float32; without a module it can only say that there is none."""

    def run(x: jax.Array, keys: jax.Array | None = None, batch_norm: bool = False) -> jax.Array:
        if module is None:
            raise UserError(
                "this checkpoint has no classification head: ask for one with num_classes=N, "
                "or take what it would see with .features (last=-1)"
            )
        return module(drop(x.astype(jnp.float32), keys, head.dropout, "head"))

    return run


def tapped(blocks: Sequence[Block], last: int) -> list[Block]:
    """The trunk's blocks such that what follows them takes the outputs of the last so many.

    The first of these gives its output y₁ as ever, the next one (y₁, y₂), the top one (y₁, …, yₙ).
    """
    plain = len(blocks) - (last - 1)
    return [*blocks[:plain], *map(_passing_on, blocks[plain:])]


def _passing_on(block: Block) -> Block:
    def run(x: Any, keys: jax.Array | None = None, batch_norm: bool = False) -> Any:
        outputs = _outputs(x)
        return (*outputs, block(outputs[-1], keys=keys, batch_norm=batch_norm))

    return run


def seeing(see: Callable[[jax.Array], jax.Array], top: Callable | None = None) -> Block:
    """The block below the head: float32 [N, D], what it sees beside each other.

    Args:
      see: of each tapped output, the lowest first.
      top: what it sees besides of the last one.
    """

    def run(x: Any, keys: jax.Array | None = None, batch_norm: bool = False) -> jax.Array:
        outputs = _outputs(x)
        parts = [see(output) for output in outputs]
        return jnp.concatenate(parts if top is None else [*parts, top(outputs[-1])], axis=-1)

    return run


def _outputs(x: Any) -> tuple[jax.Array, ...]:
    return x if isinstance(x, tuple) else (x,)


def initial(head: Head, shapes: param_tree.Tree, seed: int) -> dict[str, Any]:
    """A new head's parameters, float32: of variance 1 / fan-in where they are normal, else zero.

    An MLP's hidden layer always is: between two layers of zeros no gradient would flow.

    Args:
      head: says how the output layer starts.
      shapes: tree of the head's parameters.
      seed: of the normal ones; each has a key of its own.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"head"))
    leaves = {}
    for path, leaf in param_tree.flatten(shapes).items():
        if path.endswith("kernel") and (head.init == "normal" or path.startswith("hidden/")):
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            normal = jax.random.normal(own, leaf.shape, jnp.float32)
            leaves[path] = leaf.shape[0] ** -0.5 * normal
        else:
            leaves[path] = jnp.zeros(leaf.shape, jnp.float32)
    return param_tree.unflatten(leaves)


def seen(head: Head, family: Family) -> str:
    """What the head sees of a block, by the word for it."""
    return family.inputs[0] if head.input == "default" else head.input


def is_standard(head: Head, family: Family) -> bool:
    """Whether transformers' classifier has this head; how it starts and trains does not matter."""
    usual = seen(head, family) == family.inputs[0]
    return head.kind == "linear" and usual and head.last_blocks == 1


def checked(
    values: Mapping[str, Any], family: Family, config: Mapping[str, Any], name: str
) -> Head:
    """The head with these fields, which may come from a file that someone else wrote.

    Args:
      values: fields of `Head`; those left out have their defaults.
      family: of the network below it.
      config: the network's config.json.
      name: of the whole, for messages.

    Raises:
      UserError: fields are wrong, or do not go with the network (it names all of them).
    """
    fields = Fields(values, dataclasses.asdict(Head()))
    unknown = values.keys() - fields.defaults.keys()
    fields.problems += [f"{field!r:.80}: no such field" for field in sorted(unknown)]
    fields.one_of("kind", KINDS)
    width = fields.get("hidden")
    ok = width is None or (is_size(width) and fields.get("kind") == "mlp")
    fields.expect("hidden", ok, "None, or in an mlp a whole number from 1")
    fields.one_of("init", INITS)
    fields.number("dropout", 0.0, 1.0)
    known = ("default", *family.inputs)
    lacking = "" if "cls" in known else f" (a {family.model_type} has no class token)"
    ok = isinstance(fields.get("input"), str) and fields.get("input") in known
    fields.expect("input", ok, f"one of {', '.join(known)}{lacking}")
    # The chain has a stem below these blocks; final norm or pool, and the head above them.
    fields.size("last_blocks", len(family.chain(config)) - 3)
    if fields.problems:
        lines = "".join(f"\n  {problem}" for problem in fields.problems)
        raise UserError(f"{name} cannot be used:{lines}")
    return Head(**values)
