"""The phases of a run: their steps, schedules and optimizers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from tl_jax import optimizer
from tl_jax.config import Config, Optimizer
from tl_jax.errors import UserError
from tl_jax.freezing import Plan
from tl_jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Stage:
    """A phase of training with all that it needs.

    Attributes:
      plan: what trains.
      config: of the optimizer in this phase.
      schedule: learning rate by step, counted from the start of the run.
      optimizer: over the trainable parameters.
      clip_norm: norm at which the gradient is clipped; 0 where it is not.
      first: steps done when it starts.
      last: steps done when it ends.
    """

    plan: Plan
    config: Optimizer
    schedule: optimizer.Schedule
    optimizer: optax.GradientTransformationExtraArgs
    clip_norm: float
    first: int
    last: int


def stages_of(
    config: Config, recipe: Recipe, plans: Sequence[Plan], steps_per_epoch: int
) -> tuple[Stage, ...]:
    """The phases with their steps, schedules and optimizers.

    Raises:
      UserError: their lengths do not add up, or one has no step.
    """
    given: Sequence[Mapping[str, Any]] = config.freeze.phases or [{}] * len(plans)
    fields = [dict(phase) for phase in given]
    if len(fields) != len(plans):
        raise UserError(
            f"config.freeze.phases: has {len(fields)} entries; {config.freeze.strategy} has "
            f"{len(plans)} phases here: {', '.join(plan.phase for plan in plans)}"
        )
    if recipe.interpolate and fields[0].get("epochs") == 0:
        raise UserError(
            f"config.freeze.phases: {config.freeze.strategy} interpolates from a head that means "
            f"something: its first phase, {plans[0].phase}, which trains one, needs epochs"
        )
    spanned = sorted({"schedule", "warmup"} & {name for phase in fields for name in phase})
    if recipe.one_schedule and spanned:
        raise UserError(
            f"config.freeze.phases: one schedule spans all phases of {config.freeze.strategy}: "
            f"set config.optimizer.{spanned[0]} instead"
        )
    usual = [phase.epochs if config.freeze.phases is None else None for phase in recipe.phases]
    epochs = [phase.pop("epochs", e) for phase, e in zip(fields, usual, strict=True)]
    ends = _ends(config, epochs, plans, steps_per_epoch)
    total = ends[-1]
    stages = []
    for number, (plan, own, first, last) in enumerate(
        zip(plans, fields, [0, *ends], ends, strict=False)
    ):
        settings = dataclasses.replace(config.optimizer, **own)
        if "learning_rate" not in own:
            rate = settings.learning_rate * plan.rate
            settings = dataclasses.replace(settings, learning_rate=rate)
        start, length = (0, total) if recipe.one_schedule else (first, last - first)
        schedule = optimizer.make_schedule(
            settings,
            steps_per_epoch=steps_per_epoch,
            total_steps=length,
            start=start,
            where=f"config.freeze.phases[{number}]" if "warmup" in own else "config.optimizer",
        )
        clip_norm = config.train.gradient_clip_norm
        if clip_norm is None:
            clip_norm = 0.0 if plan.training_blocks == (len(plan.blocks) - 1,) else 1.0
        update = optimizer.make_optimizer(settings, plan, clip_norm)
        stages.append(Stage(plan, settings, schedule, update, clip_norm, first, last))
    return tuple(stages)


def _ends(
    config: Config, epochs: Sequence[float | None], plans: Sequence[Plan], steps_per_epoch: int
) -> list[int]:
    """Steps done at the end of each phase; phases without a length of their own share what is left.

    Raises:
      UserError: the lengths do not add up, or a phase has no step.
    """
    given = sum(length for length in epochs if length is not None)
    own = config.freeze.phases is None and given
    where = f"config.freeze ({config.freeze.strategy})" if own else "config.freeze.phases"
    open_ended = sum(length is None for length in epochs)
    left = config.train.epochs - given
    if left < -1e-6 or (abs(left) > 1e-6) == (not open_ended):
        lengths = " + ".join(f"{length:g}" for length in epochs if length is not None)
        if open_ended:
            raise UserError(
                f"{where}: phases with a length of their own take {lengths} = {given:g} epochs, "
                f"and others are left: config.train.epochs must be more than {given:g}, is "
                f"{config.train.epochs}"
            )
        raise UserError(
            f"{where}: {lengths} = {given:g} epochs, but config.train.epochs is "
            f"{config.train.epochs}: change one of them"
        )
    done, ends = 0.0, []
    for length in epochs:
        done += left / open_ended if length is None else length
        ends.append(round(done * steps_per_epoch))
    for plan, first, last in zip(plans, [0, *ends], ends, strict=False):
        if first == last:
            raise UserError(
                f"{where}: the phase {plan.phase!r} of {plan.strategy} has no step in "
                f"{config.train.epochs} epochs of {steps_per_epoch} steps: train longer, or give "
                "it epochs"
            )
    return ends
