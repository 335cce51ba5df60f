"""The canonical depth map: every parameter's place in the chain of blocks, and its kinds."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from tl_jax import lora, param_tree
from tl_jax.models import BlockSpec, Family
from tl_jax.recipes import KINDS, Network, Parameter

_FIRST_WORDS = ("adapter", "head", "position", "norm", "stem", "bias")  # rather than the others


def describe(
    family: Family,
    chain: Sequence[BlockSpec],
    params: param_tree.Tree,
    names: Mapping[str, str],
) -> Network:
    """Every parameter with its place in the chain and its kinds.

    Args:
      family: says which paths are of which kind.
      chain: the network's blocks, from the stem to the head.
      params: tree of arrays or of shapes with dtype, adapters included.
      names: path in the variables (`params/…`) → key in a classifier's file.
    """
    top = len(chain) - 3  # the chain ends: last block, final norm or pool, head
    parameters = []
    for path, leaf in param_tree.flatten(params).items():
        block = block_of(path, chain)
        parameters.append(
            Parameter(
                path=path,
                name=names.get(f"params/{path}", path.replace("/", ".")),
                shape=tuple(leaf.shape),
                dtype=str(np.dtype(leaf.dtype)),
                block=block,
                block_name=chain[block].name,
                depth=top - block,
                fraction=block / (len(chain) - 1),
                kinds=_kinds(path, block, len(chain), family),
            )
        )
    blocks = tuple(spec.name for spec in chain)
    return Network(family.model_type, blocks, tuple(parameters))


def _kinds(path: str, block: int, blocks: int, family: Family) -> tuple[str, ...]:
    if path.startswith(f"{lora.ROOT}/"):
        return ("adapter",)
    words = {word for pattern, word in family.kinds if re.search(pattern, path)}
    words |= {"head"} if block == blocks - 1 else {"stem"} if block == 0 else set()
    if path.rpartition("/")[-1] == "bias":
        words.add("bias")
    order = [*_FIRST_WORDS, *(kind for kind in KINDS if kind not in _FIRST_WORDS)]
    return tuple(sorted(words, key=order.index))


def block_of(path: str, chain: Sequence[BlockSpec]) -> int:
    """Index of the block that holds the parameter, adapter or statistic at `path`."""
    for index, block in enumerate(chain):
        if block.owns(path.removeprefix(f"{lora.ROOT}/")):
            return index
    raise ValueError(f"no block of the chain holds {path}")
