"""The freezing strategies, each a short definition over the canonical depth map."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from tl_jax.recipes import (
    ADAPTER,
    FROZEN,
    HEAD,
    STRATEGIES,
    TRUNK,
    Group,
    Lora,
    Network,
    Parameter,
    Phase,
    Recipe,
    Rule,
    freeze,
    matcher,
    strategy,
    train,
)

__all__ = ["STRATEGIES"]


def _pattern_problems(pairs: Iterable[Any]) -> list[str]:
    found = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            found.append(f'{pair!r} is no pair of an expression and "train", "frozen" or a number')
            continue
        regex, value = pair
        found += _regex_problems([regex])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value not in ("train", "frozen") and not (number and 0 < value < math.inf):
            found.append(f'{value!r} is none of "train", "frozen", a number above 0')
    return found


def _regex_problems(words: Iterable[Any]) -> list[str]:
    found = []
    for word in words:
        try:
            re.compile(word)
        except (re.error, TypeError) as error:
            found.append(f"{word!r} is no regular expression: {error}")
    return found


def _coefficient_problems(values: tuple) -> list[str]:
    numbers = all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    return [] if values and numbers else [f"{values!r} is no list of numbers from 0 to 1"]


_REST = train(lambda parameter: True, text="the trunk")
_NONE_LEFT = "this network has none: only the head trains, as in a linear probe"

Count = Annotated[int, {"at_least": 1}]
Positive = Annotated[float, {"above": 0.0}]
NotNegative = Annotated[float, {"at_least": 0.0}]
Rate = Annotated[float, {"at_least": 0.0, "below": 1.0}]


@strategy
def linear_probe(network: Network) -> Recipe:
    """Only the head trains, on features of the frozen trunk (Alain & Bengio, arXiv:1610.01644)."""
    return Recipe([Phase("linear_probe", [train("head", HEAD)])])


@strategy
def full(network: Network) -> Recipe:
    """Everything trains, the trunk from its pretrained weights."""
    return Recipe([Phase("full", [train("head", HEAD), _REST])])


@strategy
def top_k(network: Network, *, k: Count = 1) -> Recipe:
    """The last k blocks, the final norm and the head train (Yosinski et al., arXiv:1411.1792)."""
    most = max(p.depth for p in network.parameters)
    if k > most:
        raise ValueError(f"k = {k}: below the head there are {most + 1} blocks; full trains all")
    upper = train(lambda p: p.depth < k, text=f"the last {k} blocks and the final norm")
    below = freeze(lambda p: p.depth >= k, text=f"what lies below the last {k} blocks")
    return Recipe([Phase("top_k", [train("head", HEAD), upper, below])])


@strategy
def patterns(
    network: Network,
    *,
    patterns: Annotated[tuple, {"check": _pattern_problems}] = (
        (r"^classifier", "train"),
        (r"", "frozen"),
    ),
) -> Recipe:
    """Regular expressions over names; the first that is found in a parameter's decides.

    Args:
      network: any.
      patterns: pairs of an expression and "train", "frozen" or a multiplier of the learning rate;
        between them they must cover every parameter.
    """
    rules = []
    for regex, value in patterns:
        multiplier = 1.0 if value == "train" else value
        group = FROZEN if value == "frozen" else Group(f"trunk/{regex}", float(multiplier))
        rules.append(Rule(repr(regex), matcher(regex or "^"), group))
    return Recipe([Phase("patterns", rules, total=True)])


@strategy
def lp_ft(network: Network, *, rate: Positive = 0.1) -> Recipe:
    """A linear probe, then everything from that head, `rate` times as fast (arXiv:2202.10054).

    Kumar et al. 2022: full fine-tuning from a random head distorts pretrained features; from the
    head that the probe found it hardly does.
    """
    probe = Phase("linear_probe", [train("head", HEAD)])
    return Recipe([probe, Phase("full", [train("head", HEAD), _REST], rate=rate)])


@strategy
def gradual_unfreezing(
    network: Network, *, groups: Count = 4, every: Annotated[float | None, {"above": 0.0}] = None
) -> Recipe:
    """One group of blocks more in each phase, from the top (ULMFiT, arXiv:1801.06146).

    The trunk's blocks are cut into `groups` runs whose lengths differ by one at most, the top one
    with the final norm; the first phase trains the head alone. One schedule spans all phases, and
    the optimizer's moments survive a change of phase.

    Args:
      network: any.
      groups: of blocks.
      every: epochs after which the next group begins to train, the last phase taking what is left;
        None divides the training evenly (and `freeze.phases` sets each phase's epochs).
    """
    depths = sorted({p.depth for p in network.parameters if p.depth >= 0})
    groups = min(groups, len(depths))
    edges = [len(depths) * number // groups for number in range(groups + 1)]
    rules = [train("head", HEAD)]
    phases = [Phase("head", list(rules), epochs=every)]
    for number, (low, high) in enumerate(itertools.pairwise(edges), start=1):
        above = depths[low] if low else -1
        below = depths[high - 1]
        text = f"group {number} of {groups} from the top"
        rules.append(train(_between(above, below), Group(f"trunk/{number}"), text=text))
        epochs = every if number < groups else None
        phases.append(Phase(f"top {number} of {groups}", list(rules), epochs=epochs))
    return Recipe(phases, one_schedule=True)


def _between(above: int, below: int) -> Callable[[Parameter], bool]:
    return lambda parameter: above <= parameter.depth <= below


@strategy
def discriminative(network: Network) -> Recipe:
    """Everything trains, the rate rising geometrically from the stem to the head (ULMFiT).

    A block at fraction f of depth learns at lowest^(1-f) highest^f times the learning rate;
    `freeze.discriminative` sets (lowest, highest), here (0.01, 1), with any strategy.
    """
    return dataclasses.replace(full(network), discriminative=(0.01, 1.0))


@strategy
def layer_decay(network: Network) -> Recipe:
    """Everything trains, each block slower than the one above it (BEiT, arXiv:2106.08254).

    The rate is multiplied by decay^n, n = 0 in the head and the final norm, 1 in the last block, …,
    most in the stem, as BEiT counts (timm has the final norm at n = 1). `freeze.layer_decay` sets
    it, here 0.75, with any strategy.
    """
    return dataclasses.replace(full(network), layer_decay=0.75)


@strategy
def surgical(
    network: Network, *, first: int | float | str = 0.0, last: int | float | str = 0.25
) -> Recipe:
    """One contiguous range of blocks trains, and the head (Lee et al. 2022, arXiv:2210.11466).

    Args:
      network: any.
      first: the range's lowest block: a block's index (0 is the stem), the fraction of depth from
        which on blocks belong to it (0.0 is the stem, 1.0 the head), or the name of a block or of
        several (`layer_3`, `stages_1`).
      last: its highest block, likewise.
    """
    low, high = _position(network, first)[0], _position(network, last)[-1]
    if low > high:
        raise ValueError(f"from first = {first!r} up to last = {last!r} there is no block")
    text = f"blocks {network.blocks[low]} to {network.blocks[high]}"
    chosen = train(lambda p: low <= p.block <= high, text=text)
    return Recipe([Phase("surgical", [train("head", HEAD), chosen])])


def _position(network: Network, where: int | float | str) -> list[int]:
    """Indices of the blocks that a name, an index or a fraction stands for, at least one."""
    names, top = network.blocks, len(network.blocks) - 1
    if isinstance(where, str):
        found = [i for i, b in enumerate(names) if b == where or b.startswith(f"{where}/")]
    elif isinstance(where, float):
        reached = [i for i in range(top + 1) if i / top <= where + 1e-9]
        from_there = [i for i in range(top + 1) if i / top >= where - 1e-9]
        found = [from_there[0], reached[-1]] if 0 <= where <= 1 else []
    else:
        found = [where] if 0 <= where <= top else []
    if not found:
        raise ValueError(
            f"{where!r} is no block: give an index from 0 to {top}, a fraction from 0.0 to 1.0, "
            f"or a name among {', '.join(names)}"
        )
    return found


@strategy
def bitfit(network: Network) -> Recipe:
    """All biases train, and the head (Ben Zaken et al. 2021, arXiv:2106.10199)."""
    norms_only = all("norm" in p.kinds or "head" in p.kinds for p in _of_kind(network, "bias"))
    note = "no layer has a bias but the norms': those train" if norms_only else ""
    return Recipe([Phase("bitfit", [train("head", HEAD), train("bias"), *_note(note)])])


@strategy
def norm_only(network: Network) -> Recipe:
    """Scale and shift of every norm train, and the head (Frankle et al. 2020, arXiv:2003.00152)."""
    return Recipe([Phase("norm_only", [train("head", HEAD), train("norm", absent=_NONE_LEFT)])])


@strategy
def attention_only(network: Network) -> Recipe:
    """The attention layers train, and the head (Touvron et al. 2022, arXiv:2203.09795)."""
    rules = [train("head", HEAD), train("attention", absent=_NONE_LEFT)]
    return Recipe([Phase("attention_only", rules)])


@strategy
def freeze_embed(network: Network) -> Recipe:
    """Everything trains but the stem or patch embedding (Kumar et al. 2024, arXiv:2211.09359)."""
    return Recipe([Phase("freeze_embed", [freeze("stem"), train("head", HEAD), _REST])])


@strategy
def lora(
    network: Network,
    *,
    rank: Count = 8,
    alpha: Positive = 8.0,
    dropout: Rate = 0.0,
    targets: Annotated[tuple | None, {"check": _regex_problems}] = None,
) -> Recipe:
    """Low-rank adapters train, and the head (Hu et al. 2021, arXiv:2106.09685).

    A target's kernel W acts as W + (alpha / rank) A B; A is drawn at random, B starts at zero.

    Args:
      network: any.
      rank: columns of A, rows of B.
      alpha: scale of the update.
      dropout: of what enters the adapters.
      targets: words of `KINDS` or regular expressions over names of kernels; None takes the
        attention's kernels, or in a network without attention those of all convolutions.
    """
    if targets is None:
        targets = ("attention",) if _of_kind(network, "attention") else ("convolution",)
    return Recipe(
        [Phase("lora", [train("head", HEAD), train("adapter", ADAPTER)])],
        adapters=Lora(rank, alpha, dropout, tuple(targets)),
    )


@strategy
def l2_sp(
    network: Network, *, alpha: NotNegative = 0.1, beta: NotNegative = 0.01, decoupled: bool = False
) -> Recipe:
    """Everything trains, held toward its start (Li et al. 2018, arXiv:1802.01483).

    The objective has α/2 ‖w − w⁰‖² more over the trunk and β/2 ‖w‖² over the head; with
    `decoupled` each step shrinks w − w⁰ by the rate times α beside the gradient, as AdamW does.
    The configuration's own weight decay is left out, and gradients are clipped before the penalty
    is added, as before weight decay.
    """
    head = dataclasses.replace(HEAD, weight_decay=beta, decoupled=decoupled)
    trunk = dataclasses.replace(TRUNK, weight_decay=0.0, pull=alpha, decoupled=decoupled)
    rules = [train("head", head), train(lambda p: True, trunk, text="the trunk")]
    note = "l2_sp: config.optimizer.weight_decay is left out; alpha and beta stand in its place"
    return Recipe([Phase("l2_sp", [*rules, *_note(note)])])


@strategy
def wise_ft(
    network: Network,
    *,
    rate: Positive = 0.1,
    coefficients: Annotated[tuple, {"check": _coefficient_problems}] = tuple(
        step / 10 for step in range(11)
    ),
) -> Recipe:
    """LP-FT, then the weights between probe and end (Wortsman et al. 2021, arXiv:2109.01903).

    θ(c) = (1 − c) θ_probe + c θ_end for each coefficient; validation chooses.
    """
    return dataclasses.replace(
        lp_ft(network, rate=rate), interpolate=tuple(float(c) for c in coefficients)
    )


@strategy
def random_trunk(network: Network) -> Recipe:
    """A control: the head trains on a frozen trunk of random weights."""
    return dataclasses.replace(linear_probe(network), trunk="random")


@strategy
def from_scratch(network: Network) -> Recipe:
    """A control: the same network from random weights, all of which train."""
    return dataclasses.replace(full(network), trunk="random")


def _note(text: str) -> list[Rule]:
    """A rule that matches nothing and leaves a note in the plan."""
    return [Rule("", lambda parameter: False, FROZEN, absent=text)] if text else []


def _of_kind(network: Network, kind: str) -> list[Parameter]:
    return [parameter for parameter in network.parameters if kind in parameter.kinds]
