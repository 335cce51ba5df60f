"""Checkpoint tensors ↔ variables: one layout rule by kind of layer, total both ways.

A tensor goes by three names, all kept in one table: its key in the file at hand
(`encoder.stages.0.layers.1.layer.0.convolution.weight`), its key in the file of transformers'
PyTorch classifier (with `resnet.` in front), and its path in the variables
(`params/resnet/encoder/stages_0/layers_1/layer_0/convolution/kernel`). Going back reads the table.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import param_tree
from tl_jax.errors import UserError
from tl_jax.hub import Checkpoint
from tl_jax.models.family import Family

# Kernels by rank: OIHW and [out, in] ↔ HWIO and [in, out]. Other leaves lie alike in both.
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
WEIGHT_NAMES = ("kernel", "scale", "embedding")  # what a PyTorch `weight` is called here
STATISTICS = {"running_mean": "mean", "running_var": "var"}
TORCH_NAMES = {name: "weight" for name in WEIGHT_NAMES} | {
    ours: theirs for theirs, ours in STATISTICS.items()
}
COUNTER = "num_batches_tracked"
ALIGNMENT = 64  # bytes
NAMED = 5  # tensors that an error names at most


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of every tensor of a file.

    Attributes:
      keys: path in the variables → key in a classifier's file, for every leaf.
      sources: path in the variables → key in this file; nothing for a new head.
      counters: key of a `num_batches_tracked` in a classifier's file → key in this file, or None
        where it has none.
      ignored: keys in this file that a classifier has no use for or that a new head replaces.
    """

    keys: Mapping[str, str]
    sources: Mapping[str, str]
    counters: Mapping[str, str | None]
    ignored: tuple[str, ...]


def classifier_key(key: str, layout: str, family: Family) -> str:
    """The key a tensor of the file has in the file of transformers' PyTorch classifier."""
    if layout == "flax":
        *names, leaf = re.sub("^(params|batch_stats)/", "", key).split("/")
        key = ".".join([*names, TORCH_NAMES.get(leaf, leaf)])
    if not (_under(key, family.prefix) or _under(key, family.head_key)):
        key = f"{family.prefix}.{key}"
    for pattern, replacement in family.renames:
        key = re.sub(pattern, replacement, key)
    return key


def file_key_to_path(key: str) -> str:
    """`vit.encoder.layer.0.output.dense.bias` → `vit/encoder/layer_0/output/dense/bias`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", key).replace(".", "/")


def has_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the file holds a classification head."""
    return any(
        _under(classifier_key(key, checkpoint.layout, family), family.head_key)
        for key in checkpoint.tensors
    )


def load(
    checkpoint: Checkpoint,
    family: Family,
    template: param_tree.Tree,
    param_dtype: Any = jnp.float32,
    new_head: bool = False,
) -> tuple[dict[str, Any], Conversion]:
    """Fills the template from the file, tensor by tensor straight to the device.

    Args:
      checkpoint: where the tensors are.
      family: what the tensors are called.
      template: variables as shapes, from `jax.eval_shape` of the module's init.
      param_dtype: dtype of the parameters; running statistics are always float32.
      new_head: the head is float32 zeros, whatever the file holds of one.

    Returns:
      The variables, and the table of what became of every tensor.

    Raises:
      UserError: tensors are missing, unexpected, there twice, or of a wrong shape or kind; it lists
        all of them. Or some are not finite, in the file or in the dtype they are read to.
    """
    shapes = param_tree.flatten(template)
    conversion, problems = _match(checkpoint, family, shapes, new_head)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"{checkpoint.source}: the tensors in {checkpoint.folder} are not those of the "
            f"{family.architecture} that its config.json describes:{lines}"
        )
    leaves, broken = {}, []
    for path, shape in shapes.items():
        if path in conversion.sources:
            key = conversion.sources[path]
            dtype = np.float32 if path.startswith("batch_stats/") else param_dtype
            leaf = _leaf(checkpoint, key, path, dtype)
            if not np.isfinite(leaf).all():
                broken.append(f"{key} (as {leaf.dtype})")
            elif path.startswith("batch_stats/") and path.endswith("/var") and (leaf < 0).any():
                broken.append(f"{key} (negative variances)")
            leaves[path] = jax.device_put(leaf)
        else:
            leaves[path] = jnp.zeros(shape.shape, jnp.float32)
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UserError(
            f"{checkpoint.source}: tensors in {checkpoint.folder} hold NaN, infinite or impossible "
            "numbers: "
            f"{', '.join(sorted(broken)[:NAMED])}{more}. Use weights that are sound."
        )
    return param_tree.unflatten(leaves), conversion


def unload(
    variables: param_tree.Tree, conversion: Conversion, checkpoint: Checkpoint, family: Family
) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch classifier's file, in its layout (OIHW and [out, in] kernels).

    A leaf that still is bit for bit what loading gave comes back as the source has it, dtype
    included. Changed leaves and the head are float32.

    Raises:
      ValueError: the variables have other leaves than were loaded; it lists them.
    """
    leaves = param_tree.flatten(variables)
    if different := leaves.keys() ^ conversion.keys.keys():
        raise ValueError(f"leaves that only one of model and table has: {sorted(different)}")
    tensors = {}
    for path, key in conversion.keys.items():
        leaf = np.asarray(leaves[path])
        source = conversion.sources.get(path)
        if source is not None and not path.startswith(f"params/{family.head}/"):
            loaded = _leaf(checkpoint, source, path, leaf.dtype)
            if loaded.shape == leaf.shape and loaded.tobytes() == leaf.tobytes():
                array = checkpoint.tensors[source].read()
                flax = checkpoint.layout == "flax"
                tensors[key] = array.transpose(_axes(path, array.ndim, TO_TORCH)) if flax else array
                continue
        tensors[key] = leaf.astype(np.float32).transpose(_axes(path, leaf.ndim, TO_TORCH))
    for key, source in conversion.counters.items():
        # transformers reports a counter that is missing, though it plays no part in the output.
        counter = np.zeros((), np.int64) if source is None else checkpoint.tensors[source].read()
        tensors[key] = counter
    return tensors


def _match(
    checkpoint: Checkpoint, family: Family, shapes: Mapping[str, Any], new_head: bool
) -> tuple[Conversion, list[str]]:
    """The table for a file, and what stands against using it."""
    keys: dict[str, str] = {}
    sources: dict[str, str] = {}
    counters: dict[str, str | None] = {}
    ignored, problems = [], []
    for key, reader in sorted(checkpoint.tensors.items()):
        name = classifier_key(key, checkpoint.layout, family)
        path = _leaf_path(name, shapes)
        old_head = new_head and _under(name, family.head_key)
        if old_head or any(_under(name, other) for other in family.ignored):
            ignored.append(key)
        elif name.endswith("." + COUNTER) and path.replace(COUNTER, "mean") in shapes:
            counters[name] = key
        elif path not in shapes:
            problems.append(f"unexpected: {key} {list(reader.shape)}")
        elif path in sources:
            problems.append(f"there twice: {sources[path]} and {key}")
        else:
            keys[path], sources[path] = name, key
            axes = _axes(path, len(shapes[path].shape), TO_TORCH)
            shape = shapes[path].shape
            if checkpoint.layout == "torch":
                shape = tuple(shape[axis] for axis in axes)
            if shape != reader.shape:
                problems.append(
                    f"wrong shape: {key} is {list(reader.shape)} in the file, "
                    f"{list(shape)} by config.json"
                )
            elif not jnp.issubdtype(reader.dtype, jnp.floating):
                problems.append(f"wrong kind: {key} is {reader.dtype}, not floating point")
    head = f"params/{family.head}/"
    for path in shapes.keys() - sources.keys():
        if new_head and path.startswith(head):
            *names, leaf = path.removeprefix(head).split("/")
            keys[path] = ".".join([family.head_key, *names, TORCH_NAMES.get(leaf, leaf)])
        else:
            problems.append(f"missing: {path.partition('/')[2]}")
    for path, name in keys.items():
        if path.startswith("batch_stats/") and path.endswith("/mean"):
            counters.setdefault(f"{name.rpartition('.')[0]}.{COUNTER}", None)
    return Conversion(keys, sources, counters, tuple(ignored)), sorted(problems)


def _leaf_path(name: str, shapes: Mapping[str, Any]) -> str:
    """Path in the variables of a key in the classifier's file; the kind of layer names `weight`."""
    module, _, leaf = file_key_to_path(name).rpartition("/")
    if leaf in STATISTICS:
        return f"batch_stats/{module}/{STATISTICS[leaf]}"
    if leaf == COUNTER:
        return f"batch_stats/{module}/{leaf}"
    if leaf == "weight":
        candidates = (f"params/{module}/{kind}" for kind in WEIGHT_NAMES)
        return next((path for path in candidates if path in shapes), f"params/{module}/weight")
    return f"params/{module}/{leaf}"


def _axes(path: str, rank: int, table: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Order of the axes for a leaf of this rank; only kernels change theirs."""
    same = tuple(range(rank))
    return table.get(rank, same) if path.endswith("/kernel") else same


def _leaf(checkpoint: Checkpoint, key: str, path: str, dtype: Any) -> np.ndarray:
    """A tensor of the file as the tree wants it: a copy of its own, C-contiguous."""
    array = checkpoint.tensors[key].read()
    if checkpoint.layout == "torch":
        array = array.transpose(_axes(path, array.ndim, FROM_TORCH))
    # Never a view of the file, which may change. Aligned as XLA wants it: then a CPU device takes
    # the buffer as it is instead of holding a second copy.
    size = array.size * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    leaf = buffer[start : start + size].view(dtype).reshape(array.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # `load` looks at what came of it
        leaf[...] = array
    return leaf


def _under(key: str, name: str) -> bool:
    return key == name or key.startswith(name + ".")
