"""How far training moved a network, block by block: its weights, and what they make of images.

Two networks with the same blocks are compared: the one that training started from and the trained
one. They share all activations below the first block in which they differ.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import depth_map, layer_forms, param_tree
from tl_jax.pretrained import Pretrained

# Values of an image's activations that are compared one by one; where there are more, means over
# neighbouring positions are. A ViT-B at 224 px has 151,000, the first stages of a ResNet-50 200,000
# and 803,000; the Gram matrix of 256 images then takes 0.5 GB in float64 and seconds.
MOST_VALUES = 1 << 18
_COLUMNS = 1 << 14  # of the activations that are in float64 at a time


def measure(
    network: Pretrained,
    start: Mapping[str, Any],
    end: Mapping[str, Any],
    images: Sequence[jax.Array],
) -> list[dict[str, Any]]:
    """A row for each block but the head.

    Args:
      network: whose blocks run.
      start: its variables before training, without adapters.
      end: its variables after training, adapters merged.
      images: batches of probe images, preprocessed, float32 [b, H, W, C]; may be empty.

    Returns:
      Dicts of block, index, depth (0 in the stem, 1 in the head); weights: ‖w − w⁰‖ / ‖w⁰‖ over the
      block's parameters, None where it has none or all were zero; and over the images, None without
      images or where an activation does not depend on the image: cka, see `linear_cka`, and cosine,
      see `cosine`.
    """
    moved = _by_block(network, start, end)
    names, rows = network.blocks, []
    before = after = list(images)
    together = True
    for index, name in enumerate(names[:-1]):
        weights, differs = moved[index]
        row = {"block": name, "index": index, "depth": index / (len(names) - 1), "weights": weights}
        before = _advance(network, start, before, index)
        together = together and not differs
        after = before if together else _advance(network, end, after, index)
        row |= {"cka": None, "cosine": None}
        if images:
            x = _flat(before)
            y = x if together else _flat(after)
            row |= {"cka": linear_cka(x, y), "cosine": cosine(x, y)}
        rows.append(row)
    return rows


def linear_cka(x: np.ndarray, y: np.ndarray) -> float | None:
    """Linear centred kernel alignment (arXiv:1905.00414) of activations of the same images.

    With centred columns ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), which is tr(K L) / (‖K‖_F ‖L‖_F) for the
    Gram matrices K = X Xᵀ and L = Y Yᵀ. It is 1 where Y is X turned and scaled. With few images it
    is biased upward: compare only figures of as many.

    Args:
      x: float [n, p].
      y: float [n, q].

    Returns:
      The figure, computed in float64; None where all rows of x or y are equal.
    """
    first = gram(x)
    second = first if y is x else gram(y)
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    return min(float((first * second).sum() / norm), 1.0) if norm > 0 else None


def gram(x: np.ndarray) -> np.ndarray:
    """X Xᵀ of x [n, p] with centred columns, float64 [n, n]."""
    found = np.zeros((len(x), len(x)))
    for start in range(0, x.shape[1], _COLUMNS):
        part = x[:, start : start + _COLUMNS].astype(np.float64)
        part -= part.mean(0)
        found += part @ part.T
    return found


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    """Mean over the rows of x and y [n, p] of x·y / (‖x‖ ‖y‖), those with a zero norm left out."""
    dot, xx, yy = (_row_sums(a, b) for a, b in ((x, y), (x, x), (y, y)))
    norms = np.sqrt(xx) * np.sqrt(yy)
    real = norms > 0
    return float((dot[real] / norms[real]).mean()) if real.any() else None


def _row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Σ x y over the columns of [n, p], float64 [n]."""
    found = np.zeros(len(x))
    for start in range(0, x.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        found += np.einsum("ij,ij->i", x[:, part], y[:, part], dtype=np.float64)
    return found


def _by_block(
    network: Pretrained, start: Mapping[str, Any], end: Mapping[str, Any]
) -> list[tuple[float | None, bool]]:
    """Of each block: how far its weights moved, and whether anything in it did."""
    chain = network.chain
    sums = np.zeros((2, len(chain)))  # of squares, float64: the differences', the start's
    owns, differs = [False] * len(chain), [False] * len(chain)
    for kind in ("params", "batch_stats"):
        upper = param_tree.flatten(end.get(kind, {}))
        for path, leaf in param_tree.flatten(start.get(kind, {})).items():
            block = depth_map.block_of(path, chain)
            old, new = np.asarray(leaf), np.asarray(upper[path])
            differs[block] |= not np.array_equal(old, new)
            if kind == "params":
                owns[block] = True
                old, new = old.astype(np.float64), new.astype(np.float64)
                sums[:, block] += ((new - old) ** 2).sum(), (old**2).sum()
    return [
        (float(np.sqrt(d / s)) if owned and s > 0 else None, differ)
        for d, s, owned, differ in zip(*sums, owns, differs, strict=True)
    ]


def _advance(
    network: Pretrained, variables: Mapping[str, Any], batches: Sequence[Any], index: int
) -> list[Any]:
    """What block `index` makes of what enters it, batch by batch; it stays on the device."""
    chain = network.chain

    def own(tree):
        return param_tree.split(tree, lambda path: depth_map.block_of(path, chain) == index)[0]

    used = {kind: own(tree) for kind, tree in variables.items()}
    run = _compiled(network.module, index)
    return [run(used, batch) for batch in batches]


@functools.lru_cache(maxsize=4096)
def _compiled(module: Any, index: int) -> Callable:
    def run(variables, x):
        with layer_forms.suited():
            return module.apply(variables, x, first=index, last=index + 1)

    return jax.jit(run)


def _flat(batches: Sequence[Any]) -> np.ndarray:
    """The activations of all images, [n, values of an image], float32.

    Where several blocks' outputs are passed on, the last is the block's own.
    """
    own = [batch[-1] if isinstance(batch, tuple) else batch for batch in batches]
    return np.concatenate([np.asarray(_averaged(x)).reshape(len(x), -1) for x in own])


@jax.jit
def _averaged(x: jax.Array) -> jax.Array:
    """x [b, positions …, channels], of so many values at most: else means over neighbours."""
    x, window = x.astype(jnp.float32), 1
    sides = x.shape[1:-1]
    while sides and np.prod([-(-side // window) for side in sides]) * x.shape[-1] > MOST_VALUES:
        window += 1
    if window == 1:
        return x
    sums, counts = (
        jax.lax.reduce_window(
            part,
            0.0,
            jax.lax.add,
            (1, *[window] * len(sides), 1),
            (1, *[window] * len(sides), 1),
            [(0, 0), *[(0, -side % window) for side in sides], (0, 0)],
        )
        for part in (x, jnp.ones_like(x))
    )
    return sums / counts
