"""Freezing strategies: what trains and how fast, and the proof that the rest did not move.

A strategy is a short list of rules; the first that matches a parameter puts it into a group.
Everything else follows from the plan that this gives: what is differentiated, the optimizer's
labels, the BatchNorm policy, what a checkpoint stores, the printed table and the certificate.
"""

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax import param_tree
from tl_jax.config import STRATEGY_OPTIONS, Config, Freeze
from tl_jax.errors import UserError, nearest
from tl_jax.models import BlockSpec


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a strategy sees of one parameter.

    Attributes:
      path: in the tree, `resnet/embedder/embedder/convolution/kernel`.
      shape: of the array.
      dtype: of the array, by name.
      block: index in the chain of blocks.
      depth: blocks between it and the top of the trunk: 0 in the last residual block or encoder
        layer, 1 in the one below …; -1 in the final norm, -2 in the head.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that share one label: `frozen`, `head` or `trunk/…`.

    Attributes:
      name: the label.
      multiplier: of the learning rate; None where nothing trains.
    """

    name: str
    multiplier: float | None = 1.0


FROZEN = Group("frozen", None)
HEAD = Group("head")
TRUNK = Group("trunk")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters for which `matches` holds belong to `group`; `text` says so to a reader."""

    text: str
    matches: Callable[[Parameter], bool]
    group: Group


_NAMED = 5  # so many of a kind are named in an error, the others counted

_HEAD_TRAINS = Rule("the head", lambda parameter: parameter.depth == -2, HEAD)
_REST_TRAINS = Rule("the trunk", lambda parameter: True, TRUNK)
_REST_FROZEN = Rule("the rest", lambda parameter: True, FROZEN)


def linear_probe() -> tuple[Rule, ...]:
    """Only the head trains, on features of the frozen trunk (Alain & Bengio, arXiv:1610.01644)."""
    return (_HEAD_TRAINS, _REST_FROZEN)


def full() -> tuple[Rule, ...]:
    """Everything trains, the trunk from its pretrained weights."""
    return (_HEAD_TRAINS, _REST_TRAINS)


def top_k(*, k: int = 1) -> tuple[Rule, ...]:
    """The last k blocks, the final norm and the head train (Yosinski et al., arXiv:1411.1792)."""
    upper = Rule(f"the last {k} blocks and the final norm", lambda p: p.depth < k, TRUNK)
    below = Rule(f"what lies below the last {k} blocks", lambda p: p.depth >= k, FROZEN)
    return (_HEAD_TRAINS, upper, below)


def patterns(
    *, patterns: Sequence[Sequence] = ((r"^classifier", "train"), (r"", "frozen"))
) -> tuple[Rule, ...]:
    """Regular expressions, searched in the parameter's path; the first that matches decides.

    Args:
      patterns: pairs of an expression and "train", "frozen" or a multiplier of the learning rate.
    """
    return tuple(_pattern_rule(regex, value) for regex, value in patterns)


def _pattern_rule(regex: str, value: str | float) -> Rule:
    group = FROZEN
    if value != "frozen":
        group = Group(f"trunk/{regex}", 1.0 if value == "train" else float(value))
    return Rule(repr(regex), lambda parameter: bool(re.search(regex, parameter.path)), group)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A labelling, and the weights that the trunk starts from."""

    rules: Callable[..., tuple[Rule, ...]]
    trunk: str = "pretrained"  # or "random"


STRATEGIES: dict[str, Strategy] = {
    "linear_probe": Strategy(linear_probe),
    "full": Strategy(full),
    "top_k": Strategy(top_k),
    "patterns": Strategy(patterns),
    # The controls: what a transfer figure means is its distance from these.
    "random_trunk": Strategy(linear_probe, trunk="random"),
    "from_scratch": Strategy(full, trunk="random"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved labelling: the single truth about what trains.

    Attributes:
      strategy: its name.
      trunk: "pretrained" or "random": the weights that the trunk starts from.
      parameters: every parameter, in the order of the paths.
      groups: the group of each, by path.
      boundary: index of the first block with a trainable parameter.
      blocks: names of the chain's blocks.
      batch_norm: "frozen": every statistic stays as it is stored. "batch": blocks with a trainable
        parameter normalise by the batch and update their running statistics.
      statistics: paths of the moving statistics (empty when batch_norm is "frozen").
      frozen_statistics: paths of the others.
    """

    strategy: str
    trunk: str
    parameters: tuple[Parameter, ...]
    groups: Mapping[str, Group]
    boundary: int
    blocks: tuple[str, ...]
    batch_norm: str
    statistics: frozenset[str]
    frozen_statistics: frozenset[str]

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
        return self.training_blocks if self.batch_norm == "batch" else ()

    def split_params(self, params: param_tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trainable and frozen parameters, as two trees."""
        return param_tree.split(params, self.trains)

    def split_statistics(self, stats: param_tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Moving and frozen statistics, as two trees."""
        return param_tree.split(stats, self.statistics.__contains__)


def problems(config: Config) -> list[str]:
    """What is wrong with `config.freeze`, a line each; nothing needs to be loaded for it."""
    freeze = config.freeze
    if freeze.strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        hint = nearest(freeze.strategy, STRATEGIES)
        return [f"config.freeze.strategy: {freeze.strategy!r} is none of {known}{hint}"]
    takes = inspect.signature(STRATEGIES[freeze.strategy].rules).parameters
    found = [
        f"config.freeze.{name}: the strategy {freeze.strategy} takes no such option"
        + (f"; it takes {', '.join(takes)}" if takes else "")
        for name in _options(freeze)
        if name not in takes
    ]
    for pair in freeze.patterns or ():
        found += _pattern_problems(pair)
    return found


def _pattern_problems(pair: Any) -> list[str]:
    where = "config.freeze.patterns"
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
        return [f'{where}: {pair!r} is no pair of an expression and "train", "frozen" or a number']
    regex, value = pair
    found = []
    try:
        re.compile(regex)
    except re.error as error:
        found.append(f"{where}: {regex!r} is no regular expression: {error}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < np.inf
    if value not in ("train", "frozen") and not number:
        found.append(f'{where}: {value!r} is none of "train", "frozen", a number above 0')
    return found


def _options(freeze: Freeze) -> dict[str, Any]:
    """The strategy's options that the configuration sets."""
    options = {name: getattr(freeze, name) for name in STRATEGY_OPTIONS}
    return {name: value for name, value in options.items() if value is not None}


def resolve(freeze: Freeze, chain: Sequence[BlockSpec], variables: Mapping[str, Any]) -> Plan:
    """The plan that a strategy gives for one network.

    Args:
      freeze: the strategy and its options.
      chain: the network's blocks, from the stem to the head.
      variables: `{"params": …, "batch_stats": …}` of arrays or of shapes with dtype.

    Raises:
      UserError: a parameter that no rule covers, a rule that matches no parameter, or nothing
        that trains.
    """
    strategy = STRATEGIES[freeze.strategy]
    rules = strategy.rules(**_options(freeze))
    parameters = describe(chain, variables["params"])
    groups, uncovered = {}, []
    for parameter in parameters:
        group = next((rule.group for rule in rules if rule.matches(parameter)), None)
        if group is None:
            uncovered.append(parameter.path)
        else:
            groups[parameter.path] = _in_head(group) if parameter.depth == -2 else group
    wrong = [f"no pattern covers {path}" for path in uncovered[:_NAMED]]
    if len(uncovered) > _NAMED:
        wrong.append(f"… and {len(uncovered) - _NAMED} more parameters that no pattern covers")
    wrong += [
        f"nothing matches {rule.text} ({rule.group.name})"
        for rule in rules
        if not any(map(rule.matches, parameters))
    ]
    if not uncovered and all(group.multiplier is None for group in groups.values()):
        wrong.append("no parameter trains")
    if wrong:
        names = ", ".join(block.name for block in chain)
        raise UserError(
            f"config.freeze ({freeze.strategy}):\n  "
            + "\n  ".join(wrong)
            + f"\nThe chain's blocks are {names}; a parameter's path is like {parameters[-1].path}."
        )
    training = {p.block for p in parameters if groups[p.path].multiplier is not None}
    statistics = param_tree.flatten(variables.get("batch_stats", {})).keys()
    moving = {
        path
        for path in statistics
        if freeze.batch_norm == "batch" and block_of(path, chain) in training
    }
    return Plan(
        strategy=freeze.strategy,
        trunk=strategy.trunk,
        parameters=parameters,
        groups=groups,
        boundary=min(training),
        blocks=tuple(block.name for block in chain),
        batch_norm=freeze.batch_norm,
        statistics=frozenset(moving),
        frozen_statistics=frozenset(statistics - moving),
    )


def _in_head(group: Group) -> Group:
    """The same group, called after the head: a label has one multiplier."""
    if group.multiplier in (None, 1.0):
        return HEAD if group.multiplier else FROZEN
    return Group(group.name.replace("trunk", "head", 1), group.multiplier)


def describe(chain: Sequence[BlockSpec], params: param_tree.Tree) -> tuple[Parameter, ...]:
    """Every parameter with its place in the chain."""
    top = len(chain) - 3  # the chain ends: last block, final norm or pool, head
    return tuple(
        Parameter(path, tuple(leaf.shape), str(np.dtype(leaf.dtype)), block, top - block)
        for path, leaf in param_tree.flatten(params).items()
        for block in [block_of(path, chain)]
    )


def block_of(path: str, chain: Sequence[BlockSpec]) -> int:
    """Index of the block that holds the parameter or statistic at `path`."""
    for index, block in enumerate(chain):
        if any(path == prefix or path.startswith(f"{prefix}/") for prefix in block.prefixes):
            return index
    raise ValueError(f"no block of the chain holds {path}")


def fingerprint(plan: Plan, variables: Mapping[str, Any]) -> str:
    """SHA-256 over every frozen parameter and statistic: path, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for path, leaf in frozen_leaves(plan, variables).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def frozen_leaves(plan: Plan, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan says must not move, by path with its collection in front."""
    _, params = plan.split_params(variables["params"])
    _, statistics = plan.split_statistics(variables.get("batch_stats", {}))
    return param_tree.flatten({"params": params, "batch_stats": statistics})


def certificate(plan: Plan, before: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Proof that the frozen did not move: its fingerprint before training against the one after.

    Args:
      plan: says what is frozen.
      before: `fingerprint` of the variables that training started from.
      variables: after training.
    """
    after = fingerprint(plan, variables)
    leaves = len(frozen_leaves(plan, variables))
    return {"ok": before == after, "leaves": leaves, "sha256_before": before, "sha256_after": after}
