"""The plan's groups as one `optax.multi_transform` over the trainable parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from tl_jax import config as config_lib
from tl_jax import lora, param_tree
from tl_jax.config import Optimizer
from tl_jax.errors import UserError
from tl_jax.freezing import Plan
from tl_jax.recipes import Group

# Steps of the run done so far, one or many → the learning rate of the next one, float32.
Schedule = Callable[[Any], np.ndarray]


def make_schedule(
    options: Optimizer,
    *,
    steps_per_epoch: int,
    total_steps: int,
    start: int = 0,
    where: str = "config.optimizer",
) -> Schedule:
    """Learning rate by step of the run: a linear warm-up, then constant, or down to 0.

    It is computed on the host, and a number to the compiled step.

    Args:
      options: shape, peak and warm-up.
      steps_per_epoch: for a warm-up in epochs.
      total_steps: after which it ends.
      start: steps of the run after which it begins.
      where: the options stand, for messages.

    Raises:
      UserError: the warm-up is longer than the training.
    """
    warmup = config_lib.steps_of(
        options.warmup, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    if warmup > total_steps:
        raise UserError(
            f"{where}.warmup: {options.warmup!r} is {warmup} steps, "
            f"the whole {'training' if where == 'config.optimizer' else 'phase'} {total_steps}"
        )
    shapes: dict[str, Callable] = {
        "constant": np.ones_like,
        "cosine": lambda done: (1 + np.cos(np.pi * done)) / 2,
        "linear": lambda done: 1 - done,
    }

    def schedule(step: Any) -> np.ndarray:
        step = np.asarray(step, np.float64) - start
        done = np.clip((step - warmup) / max(total_steps - warmup, 1), 0, 1)
        # The first step of a warm-up already moves: its rate is peak / warmup, not 0.
        share = np.where(step < warmup, (step + 1) / max(warmup, 1), shapes[options.schedule](done))
        return (options.learning_rate * share).astype(np.float32)

    return schedule


def make_optimizer(
    options: Optimizer, plan: Plan, clip_norm: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The update rule for the tree of trainable parameters.

    Its `update` takes two arguments more: `rate`, the step's learning rate, and `start`, the tree
    of values that training started from (used where a group is pulled toward them).
    Frozen parameters are not in those trees at all, so nothing here can move them or keep state for
    them. Clipping (at `clip_norm`, 0 for none) acts on the norm over the trainable part.
    """
    tree = labels(plan)
    rules = {tree[path]: _rule(options, plan.groups[path]) for path in tree}
    update = optax.multi_transform(rules, param_tree.unflatten(tree))
    if clip_norm:
        update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
    return optax.with_extra_args_support(update)


def labels(plan: Plan) -> dict[str, str]:
    """The optimizer's label of each trainable parameter, by path.

    It is the group's name, and the phase in which the parameter began to train where that was not
    the first: those that began together share a step counter (Adam's bias correction).
    """
    return {
        path: plan.groups[path].name + (f" since phase {entry}" if entry else "")
        for path, entry in plan.entries.items()
    }


def carry_over(state: Any, before: Plan, fresh: Any, plan: Plan) -> Any:
    """The optimizer's state at a change of phase.

    Args:
      state: at the end of the phase of the plan `before`.
      before: that phase's plan.
      fresh: of the next phase, as `init` gives it.
      plan: the next phase's plan.

    Returns:
      `fresh` with the moments of the parameters that trained before, and with their groups'
      counters; what is new, or has another optimizer now, stays fresh.
    """
    old_labels, new_labels = labels(before), labels(plan)
    donor: dict[str, str] = {}  # a label here → one there with the same counter
    for path, label in new_labels.items():
        if path in old_labels:
            donor.setdefault(label, old_labels[path])
    old = {_names(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}

    def take(keys: Any, leaf: Any) -> Any:
        names = _names(keys)
        place = next((i for i, name in enumerate(names) if name in new_labels.values()), None)
        if place is None:
            return leaf
        path = next((p for p in _tails(names[place + 1 :]) if p in new_labels), None)
        label = donor.get(names[place]) if path is None else old_labels.get(path)
        if label is None:
            return leaf
        found = old.get((*names[:place], label, *names[place + 1 :]))
        return leaf if found is None or found.shape != leaf.shape else found

    return jax.tree_util.tree_map_with_path(take, fresh)


def _names(keys: Sequence[Any]) -> tuple[str, ...]:
    """Names on the way to a leaf of a state; places in a chain of transforms are none."""
    return tuple(
        str(getattr(key, "key", getattr(key, "name", key)))
        for key in keys
        if not isinstance(key, jax.tree_util.SequenceKey)
    )


def _tails(names: Sequence[str]) -> list[str]:
    """The paths that the names may end with; in front stand fields of the optimizer's state."""
    return [param_tree.SEPARATOR.join(names[start:]) for start in range(len(names))]


def _rule(options: Optimizer, group: Group):
    decay = options.weight_decay if group.weight_decay is None else group.weight_decay
    own = group.weight_decay is not None  # a strategy's decay is of every parameter in the group
    pulls = []
    if isinstance(decay, jax.core.Tracer) or decay:  # of many heads at once it is an array
        pulls.append(optax.add_decayed_weights(decay, mask=None if own else _kernels))
    if group.pull:
        pulls.append(_pull_toward_start(group.pull))
    direction = optax.scale_by_adam()
    if options.name == "sgd":
        direction = optax.trace(options.momentum) if options.momentum else optax.identity()
    # Decay decoupled from the gradient: arXiv:1711.05101.
    parts = [direction, *pulls] if _is_decoupled(options, group) else [*pulls, direction]
    return optax.chain(*parts, scale_by_rate(group.multiplier))


def _is_decoupled(options: Optimizer, group: Group) -> bool:
    """Whether decay acts beside the gradient: AdamW's does, a strategy's own if it says so."""
    return group.decoupled or (options.name == "adamw" and group.weight_decay is None)


def scale_by_rate(multiplier: float | None) -> optax.GradientTransformationExtraArgs:
    """Updates times minus `rate`, which is given: it keeps no counter of its own."""
    assert multiplier is not None, "frozen groups have no rule"

    def update(updates, state, params=None, *, rate, **_):
        own = multiplier * rate
        return jax.tree.map(lambda u: (-own * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _pull_toward_start(strength: float):
    """Adds strength × (w − w⁰): the gradient of strength / 2 ‖w − w⁰‖²."""

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    def update(updates, state, params=None, *, start, **_):
        def pull(u, w, w0):
            return u if is_masked(u) else u + strength * (w - w0)

        return jax.tree.map(pull, updates, params, start, is_leaf=is_masked), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decays(path: str) -> bool:
    """Weight decay acts on kernels and adapters; biases, norms and embeddings are left alone."""
    first, last = path.split(param_tree.SEPARATOR)[0], path.rsplit(param_tree.SEPARATOR, 1)[-1]
    return last == "kernel" or first == lora.ROOT


def _kernels(params: Any) -> Any:
    def decayed(keys, _):
        return decays(param_tree.SEPARATOR.join(key.key for key in keys))

    return jax.tree_util.tree_map_with_path(decayed, params)


def state_bytes(optimizer: optax.GradientTransformation, trainable: Any) -> tuple[int, dict]:
    """Bytes of the optimizer's state.

    Args:
      optimizer: as `make_optimizer` gives it.
      trainable: tree of arrays or shapes with dtype.

    Returns:
      All of them (counters included), and those of each parameter by path.
    """
    state = jax.eval_shape(optimizer.init, trainable)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    by_path = dict.fromkeys(param_tree.flatten(trainable), 0)
    for keys, leaf in leaves:
        if path := next((p for p in _tails(_names(keys)) if p in by_path), None):
            by_path[path] += param_tree.nbytes([leaf])
    return param_tree.nbytes(leaf for _, leaf in leaves), by_path


def describe(
    options: Optimizer, plan: Plan, optimizer: optax.GradientTransformation
) -> dict[str, Any]:
    """A phase's plan as JSON: every leaf with its place, group, rate, decay and state."""
    params = param_tree.unflatten(
        {p.path: jax.ShapeDtypeStruct(p.shape, np.dtype(p.dtype)) for p in plan.parameters}
    )
    total, by_path = state_bytes(optimizer, plan.split_params(params)[0])
    leaves = []
    for p in plan.parameters:
        group = plan.groups[p.path]
        decay = options.weight_decay if decays(p.path) else 0.0
        if group.weight_decay is not None:
            decay = group.weight_decay
        leaves.append(
            {
                "path": p.path,
                "name": p.name,
                "kind": p.kind,
                "kinds": list(p.kinds),
                "group": group.name,
                "block": plan.blocks[p.block],
                "block_index": p.block,
                "depth_fraction": p.fraction,
                "shape": list(p.shape),
                "parameters": param_tree.size([p]),
                "learning_rate_multiplier": group.multiplier or 0.0,
                "weight_decay": decay if plan.trains(p.path) else 0.0,
                "pull_toward_start": group.pull,
                "decoupled": _is_decoupled(options, group),
                "optimizer_state_bytes": by_path.get(p.path, 0),
            }
        )
    return {
        "strategy": plan.strategy,
        "trunk": plan.trunk,
        "boundary": plan.boundary,
        "boundary_block": plan.blocks[plan.boundary],
        "blocks": list(plan.blocks),
        "batch_norm": plan.batch_norm,
        "moving_statistics": sorted(plan.statistics),
        "frozen_statistics": sorted(plan.frozen_statistics),
        "optimizer": options.name,
        "learning_rate": options.learning_rate,
        "schedule": options.schedule,
        "warmup": options.warmup,
        "optimizer_state_bytes": total,
        "notes": list(plan.notes),
        "leaves": leaves,
    }


def describe_all(union: Plan, phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All phases together: each leaf as in the last phase in which it trains.

    Args:
      union: of the phases' plans.
      phases: as `describe` gives them.
    """
    leaves = []
    for rows in zip(*(phase["leaves"] for phase in phases), strict=True):
        training = [row for row in rows if row["group"] != "frozen"]
        leaves.append(training[-1] if training else rows[-1])
    return {
        **phases[-1],
        "boundary": union.boundary,
        "boundary_block": union.blocks[union.boundary],
        "moving_statistics": sorted(union.statistics),
        "frozen_statistics": sorted(union.frozen_statistics),
        "optimizer_state_bytes": max(phase["optimizer_state_bytes"] for phase in phases),
        "leaves": leaves,
    }


def leaf_totals(leaves: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of parameters: total, trainable and frozen."""
    total = sum(leaf["parameters"] for leaf in leaves)
    frozen = sum(leaf["parameters"] for leaf in leaves if leaf["group"] == "frozen")
    return {"total": total, "trainable": total - frozen, "frozen": frozen}
