"""A strategy's recipe on one network → a plan for each phase.

Everything follows from the plan: what is differentiated, the optimizer's labels, the BatchNorm
policy, what a checkpoint stores, the printed table and the certificate.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tl_jax import param_tree, recipe_checks
from tl_jax.config import Freeze
from tl_jax.errors import UserError
from tl_jax.recipes import (
    FROZEN,
    HEAD,
    Group,
    Lora,
    Network,
    Parameter,
    Phase,
    Recipe,
    Rule,
)
from tl_jax.strategies import STRATEGIES

_NAMED = 5  # so many of a kind are named in an error, the others counted


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved labelling of one phase: the single truth about what trains in it.

    Attributes:
      strategy: its name.
      phase: the phase's name.
      trunk: "pretrained" or "random": the weights that the trunk starts from.
      parameters: every parameter, in the order of the paths.
      groups: the group of each, by path.
      boundary: index of the first block with a trainable parameter.
      blocks: names of the chain's blocks.
      batch_norm: as `config.Freeze` says.
      statistics: paths of the statistics that move (empty when batch_norm is "frozen").
      frozen_statistics: paths of the others.
      adapters: what stands beside the trunk's kernels.
      entries: for each parameter that trains, the phase since which it has.
      rate: multiplies the configuration's learning rate.
      notes: what a reader of the plan should know.
    """

    strategy: str
    phase: str
    trunk: str
    parameters: tuple[Parameter, ...]
    groups: Mapping[str, Group]
    boundary: int
    blocks: tuple[str, ...]
    batch_norm: str
    statistics: frozenset[str]
    frozen_statistics: frozenset[str]
    adapters: Lora | None
    entries: Mapping[str, int]
    rate: float = 1.0
    notes: tuple[str, ...] = ()

    def trains(self, path: str) -> bool:
        """Whether the parameter at this path is differentiated and updated."""
        return self.groups[path].multiplier is not None

    @property
    def training_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that hold a trainable parameter; every other is deterministic."""
        return tuple(sorted({p.block for p in self.parameters if self.trains(p.path)}))

    @property
    def batch_norm_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that normalise by the statistics of the batch."""
        if self.batch_norm == "stats_only":
            return tuple(range(len(self.blocks)))
        return self.training_blocks if self.batch_norm == "batch" else ()

    def split_params(self, params: param_tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trainable and frozen parameters, as two trees."""
        return param_tree.split(params, self.trains)

    def split_statistics(self, stats: param_tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Moving and frozen statistics, as two trees."""
        return param_tree.split(stats, self.statistics.__contains__)


def recipe(freeze: Freeze, network: Network) -> Recipe:
    """What the configured strategy comes to on this network.

    Raises:
      UserError: its options do not fit the network.
    """
    where = f"config.freeze ({freeze.strategy})"
    try:
        found = STRATEGIES[freeze.strategy](network, **freeze.options)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        raise UserError(f"{where} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, Recipe) or not found.phases:
        raise UserError(f"{where}: the strategy must return a Recipe of at least one Phase")
    if problems := recipe_checks.problems_of(found):
        raise UserError(f"{where}:\n  " + "\n  ".join(problems))
    return found


def resolve(
    freeze: Freeze, recipe: Recipe, network: Network, statistics: Mapping[str, int]
) -> tuple[Plan, ...]:
    """The plan of each phase.

    Args:
      freeze: what goes with any strategy.
      recipe: what the strategy comes to.
      network: with the recipe's adapters.
      statistics: paths of the running statistics, with the index of each one's block.

    Raises:
      UserError: a parameter that no rule covers, a rule that matches no parameter, nothing that
        trains, or a BatchNorm policy that does not go with the strategy.
    """
    labels, notes = [], []
    for phase in recipe.phases:
        try:
            groups, found = _label(freeze.strategy, phase, network)
        except UserError:
            raise
        except Exception as error:  # of a function in a user's own rule
            raise UserError(
                f"config.freeze ({freeze.strategy}): a rule of the phase {phase.name!r} fails: "
                f"{type(error).__name__}: {error}"
            ) from error
        notes += [note for note in found if note not in notes]
        labels.append(_with_depth(groups, network, freeze, recipe))
    problem = _batch_norm_problem(freeze, labels, network, statistics)
    if problem:
        raise UserError(f"config.freeze.batch_norm: {freeze.batch_norm!r}: {problem}")
    if freeze.batch_norm == "stats_only":
        notes.append("batch_norm=stats_only: the statistics, and so the trunk's function, change")
    if freeze.batch_norm == "reestimate":
        notes.append(
            f"batch_norm=reestimate: a pass over the training data {freeze.reestimate} training "
            "measures the statistics anew, which changes the trunk's function"
        )
    plans: list[Plan] = []
    for number, (phase, groups) in enumerate(zip(recipe.phases, labels, strict=True)):
        before = plans[-1].entries if plans else {}
        trains = [path for path, group in groups.items() if group.multiplier is not None]
        training = {p.block for p in network.parameters if p.path in set(trains)}
        moving = {
            path
            for path, block in statistics.items()
            if freeze.batch_norm in ("stats_only", "reestimate")
            or (freeze.batch_norm == "batch" and block in training)
        }
        plans.append(
            Plan(
                strategy=freeze.strategy,
                phase=phase.name,
                trunk=recipe.trunk,
                parameters=network.parameters,
                groups=groups,
                boundary=min(training),
                blocks=network.blocks,
                batch_norm=freeze.batch_norm,
                statistics=frozenset(moving),
                frozen_statistics=frozenset(statistics.keys() - moving),
                adapters=recipe.adapters,
                entries={path: before.get(path, number) for path in trains},
                rate=phase.rate,
                notes=tuple(notes),
            )
        )
    return tuple(plans)


def _label(strategy: str, phase: Phase, network: Network) -> tuple[dict[str, Group], list[str]]:
    """The group of each parameter, and notes on rules that match none."""
    groups: dict[str, Group] = {}
    uncovered = []
    for parameter in network.parameters:
        group = next((rule.group for rule in phase.rules if rule.matches(parameter)), None)
        if group is None and phase.total:
            uncovered.append(parameter.name)
        group = FROZEN if group is None or group.multiplier is None else group
        groups[parameter.path] = _in_head(group) if "head" in parameter.kinds else group
    wrong = [f"no pattern covers {name}" for name in uncovered[:_NAMED]]
    if len(uncovered) > _NAMED:
        wrong.append(f"… and {len(uncovered) - _NAMED} more parameters that no pattern covers")
    idle = [rule for rule in phase.rules if not any(map(rule.matches, network.parameters))]
    wrong += [f"nothing matches {_named(rule)}" for rule in idle if not rule.absent]
    if not uncovered and all(group.multiplier is None for group in groups.values()):
        wrong.append("no parameter trains")
    named: dict[str, Group] = {}
    for group in dict.fromkeys(groups.values()):
        if named.setdefault(group.name, group) != group:
            wrong.append(f"two groups are called {group.name!r}: give each a name of its own")
    if wrong:
        raise UserError(
            f"config.freeze ({strategy}):\n  "
            + "\n  ".join(wrong)
            + f"\nThe chain's blocks are {', '.join(network.blocks)}; a parameter's name is like "
            f"{network.parameters[-1].name}, its path {network.parameters[-1].path}."
        )
    return groups, [f"{rule.text}: {rule.absent}".removeprefix(": ") for rule in idle]


def _named(rule: Rule) -> str:
    return f"{rule.text} ({rule.group.name})"


def _in_head(group: Group) -> Group:
    """The same group, called after the head: a label has one multiplier."""
    if group.multiplier is None or group.name.startswith("head"):
        return group
    if dataclasses.replace(group, name=HEAD.name) == HEAD:
        return HEAD
    return dataclasses.replace(group, name=group.name.replace("trunk", "head", 1))


def _with_depth(
    groups: dict[str, Group], network: Network, freeze: Freeze, recipe: Recipe
) -> dict[str, Group]:
    """The groups with the learning rate's fall with depth, a group a block."""
    decay, pair = freeze.layer_decay, freeze.discriminative
    if (decay and recipe.discriminative) or (pair and recipe.layer_decay):
        raise UserError(
            f"config.freeze: the strategy {freeze.strategy} says itself how the rate falls with "
            "depth: leave the other way out"
        )
    if decay is None and pair is None:
        decay, pair = recipe.layer_decay, recipe.discriminative
    if decay is None and pair is None:
        return groups
    scaled = {}
    for parameter in network.parameters:
        group = groups[parameter.path]
        if group.multiplier is not None:
            if decay is not None:  # 0 blocks below the top: the head and the final norm
                factor = decay ** max(parameter.depth + 1, 0)
            else:
                lowest, highest = pair  # type: ignore[misc]
                factor = lowest ** (1 - parameter.fraction) * highest**parameter.fraction
            name = group.name if parameter.depth == -2 else f"{group.name}/{parameter.block_name}"
            multiplier = group.multiplier * factor
            group = dataclasses.replace(group, name=name, multiplier=multiplier)
        scaled[parameter.path] = group
    return scaled


def _batch_norm_problem(
    freeze: Freeze,
    labels: Sequence[Mapping[str, Group]],
    network: Network,
    statistics: Mapping[str, int],
) -> str | None:
    """Why the BatchNorm policy does not go with the strategy."""
    if freeze.batch_norm == "frozen":
        return None
    if not statistics:
        return "the network has no BatchNorm; leave it at 'frozen'"
    if freeze.batch_norm == "stats_only":
        last = len(network.blocks) - 1
        trained = [
            p.name
            for p in network.parameters
            if p.block < last and any(groups[p.path].multiplier is not None for groups in labels)
        ]
        if trained:
            return (
                f"is for a trunk of frozen weights, and {freeze.strategy} trains {len(trained)} of "
                f"its parameters, {trained[0]} the first; 'batch' is for blocks that train"
            )
    if freeze.batch_norm == "batch":
        blocks = set(statistics.values())
        if not any(
            p.block in blocks and groups[p.path].multiplier is not None
            for groups in labels
            for p in network.parameters
        ):
            return (
                f"is for blocks that train, and {freeze.strategy} trains none that has BatchNorm; "
                "'stats_only' and 'reestimate' are for a frozen trunk"
            )
    return None


def union(plans: Sequence[Plan]) -> Plan:
    """What trains in any phase, with the group of the last in which it does.

    What the union freezes is frozen from the first step to the last.
    """
    last = plans[-1]
    groups = dict(plans[0].groups)
    for plan in plans[1:]:
        groups |= {path: group for path, group in plan.groups.items() if plan.trains(path)}
    moving = frozenset[str]().union(*(plan.statistics for plan in plans))
    return dataclasses.replace(
        last,
        groups=groups,
        boundary=min(plan.boundary for plan in plans),
        statistics=moving,
        frozen_statistics=last.frozen_statistics - moving,
        entries={},
    )
