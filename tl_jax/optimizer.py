"""The plan's groups as one `optax.multi_transform` over the trainable parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from tl_jax import config as config_lib
from tl_jax import param_tree
from tl_jax.config import Config
from tl_jax.errors import UserError
from tl_jax.freezing import Plan


def make_schedule(config: Config, *, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then constant, or down to 0 at `total_steps`.

    Raises:
      UserError: the warm-up is longer than the training.
    """
    peak = config.optimizer.learning_rate
    warmup = config_lib.steps_of(
        config.optimizer.warmup, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    if warmup > total_steps:
        raise UserError(
            f"config.optimizer.warmup: {config.optimizer.warmup!r} is {warmup} steps, "
            f"the whole training {total_steps}"
        )
    rest = max(total_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.optimizer.schedule]
    if not warmup:
        return after
    # The first step already moves: its rate is peak / warmup, not 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: Config, plan: Plan, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The update rule for the tree of trainable parameters.

    Frozen parameters are not in that tree at all, so nothing here can move them or keep state for
    them. Clipping acts on the norm over the trainable part.
    """
    trained = {path: group for path, group in plan.groups.items() if plan.trains(path)}
    rules = {
        group.name: _rule(config, schedule, group.multiplier)
        for group in trained.values()
        if group.multiplier is not None
    }
    labels = param_tree.unflatten({path: group.name for path, group in trained.items()})
    update = optax.multi_transform(rules, labels)
    if config.train.gradient_clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.train.gradient_clip_norm), update)
    return update


def _rule(config: Config, schedule: optax.Schedule, multiplier: float):
    options = config.optimizer

    def rate(step):
        return multiplier * schedule(step)

    if options.name == "adamw":  # decay decoupled from the gradient (arXiv:1711.05101)
        return optax.adamw(rate, weight_decay=options.weight_decay, mask=_kernels)
    rule = (
        optax.adam(rate)
        if options.name == "adam"
        else optax.sgd(rate, momentum=options.momentum or None)
    )
    if not options.weight_decay:
        return rule
    return optax.chain(optax.add_decayed_weights(options.weight_decay, mask=_kernels), rule)


def decays(path: str) -> bool:
    """Weight decay acts on kernels; biases, norms and position embeddings are left alone."""
    return path.rsplit(param_tree.SEPARATOR, 1)[-1] == "kernel"


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].key == "kernel", params)


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
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(names)):  # in front of a parameter's path stands its group's name
            if (path := param_tree.SEPARATOR.join(names[start:])) in by_path:
                by_path[path] += param_tree.nbytes([leaf])
                break
    return param_tree.nbytes(leaf for _, leaf in leaves), by_path


def describe(config: Config, plan: Plan, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """The plan as `plan.json` holds it: every leaf with its group, rate, decay and state."""
    params = param_tree.unflatten(
        {p.path: jax.ShapeDtypeStruct(p.shape, np.dtype(p.dtype)) for p in plan.parameters}
    )
    total, by_path = state_bytes(optimizer, plan.split_params(params)[0])
    leaves = [
        {
            "path": p.path,
            "group": plan.groups[p.path].name,
            "block": plan.blocks[p.block],
            "shape": list(p.shape),
            "parameters": param_tree.size([p]),
            "learning_rate_multiplier": plan.groups[p.path].multiplier or 0.0,
            "weight_decay": config.optimizer.weight_decay
            if plan.trains(p.path) and decays(p.path)
            else 0.0,
            "optimizer_state_bytes": by_path.get(p.path, 0),
        }
        for p in plan.parameters
    ]
    return {
        "strategy": plan.strategy,
        "trunk": plan.trunk,
        "boundary": plan.boundary,
        "boundary_block": plan.blocks[plan.boundary],
        "blocks": list(plan.blocks),
        "batch_norm": plan.batch_norm,
        "moving_statistics": sorted(plan.statistics),
        "frozen_statistics": sorted(plan.frozen_statistics),
        "optimizer": config.optimizer.name,
        "learning_rate": config.optimizer.learning_rate,
        "optimizer_state_bytes": total,
        "leaves": leaves,
    }


def leaf_totals(leaves: list[Mapping[str, Any]]) -> dict[str, int]:
    """Number of parameters: total, trainable and frozen."""
    total = sum(leaf["parameters"] for leaf in leaves)
    frozen = sum(leaf["parameters"] for leaf in leaves if leaf["group"] == "frozen")
    return {"total": total, "trainable": total - frozen, "frozen": frozen}
