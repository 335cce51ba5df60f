"""What strategies are made of: the depth map that they look at, rules, groups, phases, recipes.

A strategy is a function of a `Network` and of its own options (keyword-only, annotated, each with
a default) that answers with a `Recipe`: phases of training, each a list of rules of which the first
that matches a parameter puts it into a group. What no rule matches stays frozen. `@strategy` puts
it under its name for `config.freeze.strategy`; a config file may define more (docs/strategies.md).
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from tl_jax.config import Freeze

KINDS = (
    "stem",
    "attention",
    "mlp",
    "convolution",
    "norm",
    "bias",
    "position",
    "head",
    "adapter",
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter's place in the canonical depth map.

    Attributes:
      path: in the tree, `resnet/embedder/embedder/convolution/kernel`.
      name: in the checkpoint's file, `resnet.embedder.embedder.convolution.weight`.
      shape: of the array.
      dtype: of the array, by name.
      block: index in the chain of blocks.
      block_name: its name, `stem`, `stages_0/layers_1`, `layer_3`, `norm`, `head` …
      depth: blocks between it and the top of the trunk: 0 in the last residual block or encoder
        layer, 1 in the one below …; -1 in the final norm, -2 in the head.
      fraction: of depth: 0 in the stem, 1 in the head, in equal steps between.
      kinds: all words of `KINDS` that hold, what it is first of all in front.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    block_name: str
    depth: int
    fraction: float
    kinds: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The word for what it is first of all."""
        return self.kinds[0]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a strategy may look at.

    Attributes:
      family: `model_type` of the config.json, "resnet" or "vit".
      blocks: names of the chain's blocks, from the stem to the head.
      parameters: every parameter, in the order of the paths.
    """

    family: str
    blocks: tuple[str, ...]
    parameters: tuple[Parameter, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that share one label.

    Attributes:
      name: the label: `frozen`, `head`, `adapter`, `trunk` or `trunk/…`.
      multiplier: of the learning rate; None where nothing trains.
      weight_decay: in the place of the optimizer's; None leaves that.
      pull: strength of the decay toward the value that training started from.
      decoupled: whether both act beside the gradient, as in AdamW, rather than within it.
    """

    name: str
    multiplier: float | None = 1.0
    weight_decay: float | None = None
    pull: float = 0.0
    decoupled: bool = False


FROZEN = Group("frozen", None)
HEAD = Group("head")
TRUNK = Group("trunk")
ADAPTER = Group("adapter")

Select = str | Callable[[Parameter], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters for which `matches` holds belong to `group`.

    Attributes:
      text: says to a reader which ones these are.
      matches: whether a parameter is one of them.
      group: theirs.
      absent: what the plan notes where there is none; "" makes that an error.
    """

    text: str
    matches: Callable[[Parameter], bool]
    group: Group
    absent: str = ""


def train(what: Select, group: Group = TRUNK, *, text: str = "", absent: str = "") -> Rule:
    """What trains: a word of `KINDS`, a regular expression over names, or a function."""
    return Rule(text or str(what), matcher(what), group, absent)


def freeze(what: Select, *, text: str = "", absent: str = "") -> Rule:
    """What stays frozen: a word of `KINDS`, a regular expression over names, or a function."""
    return Rule(text or str(what), matcher(what), FROZEN, absent)


def matcher(what: Select) -> Callable[[Parameter], bool]:
    """A kind, a regular expression over names, or a function, as a function of a parameter."""
    if not isinstance(what, str):
        return what
    if what in KINDS:
        return lambda parameter: what in parameter.kinds
    pattern = re.compile(what)
    return lambda p: bool(pattern.search(p.path) or pattern.search(p.name))


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with one labelling.

    Attributes:
      name: for plan and log.
      rules: the first that matches a parameter decides; what none matches stays frozen.
      rate: multiplies the configuration's learning rate.
      total: whether a parameter that no rule matches is an error.
      epochs: its length, where `freeze.phases` says nothing; None: its share of what is left.
    """

    name: str
    rules: Sequence[Rule]
    rate: float = 1.0
    total: bool = False
    epochs: float | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside kernels; see `tl_jax.lora`.

    Attributes:
      rank: of the update.
      alpha: the update is scaled by alpha / rank.
      dropout: of what enters the adapters.
      targets: words of `KINDS` or regular expressions over names of kernels.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a strategy comes to.

    Attributes:
      phases: in order.
      trunk: "pretrained" or "random": the weights that the trunk starts from.
      one_schedule: whether the learning rate's schedule spans the phases; else each has its own.
      layer_decay: of the learning rate with depth, where the configuration says nothing.
      discriminative: lowest and highest multiplier, where the configuration says nothing.
      adapters: what is put beside the trunk's kernels.
      interpolate: coefficients between the end of the first phase (0) and of the last (1).
    """

    phases: Sequence[Phase]
    trunk: str = "pretrained"
    one_schedule: bool = False
    layer_decay: float | None = None
    discriminative: tuple[float, float] | None = None
    adapters: Lora | None = None
    interpolate: tuple[float, ...] = ()


STRATEGIES: dict[str, Callable[..., Recipe]] = {}


def strategy(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Registers a strategy under the function's name.

    Raises:
      ValueError: the name is taken by another module's, or a parameter after the network is not
        keyword-only, or it has no annotation or no default.
    """
    name = function.__name__
    known = STRATEGIES.get(name)
    if known is not None and known.__module__.startswith("tl_jax."):
        raise ValueError(f"there is a strategy {name!r} already: call it something else")
    hints = typing.get_type_hints(function)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name not in hints:
            raise ValueError(
                f"{name}: the option {parameter.name!r} must be keyword-only and typed"
            )
        if parameter.name in _TAKEN:
            raise ValueError(f"{name}: freeze.{parameter.name} goes with every strategy already")
        if not set(_plain_types(hints[parameter.name])) <= _OPTION_TYPES:
            raise ValueError(
                f"{name}: the option {parameter.name!r} must be an int, float, str, bool, tuple or "
                "None, or a union of these"
            )
        if parameter.default is parameter.empty:
            raise ValueError(f"{name}: the option {parameter.name!r} needs a default")
    STRATEGIES[name] = function
    return function


def is_own(name: str) -> bool:
    """Whether a strategy is a user's, whose function may change between starts."""
    return not STRATEGIES[name].__module__.startswith("tl_jax.")


_TAKEN = {field.name for field in dataclasses.fields(Freeze)}
_OPTION_TYPES = {int, float, str, bool, tuple, type(None)}


def _plain_types(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def options_of(name: str) -> dict[str, tuple[Any, Mapping[str, Any], Any]]:
    """Annotation, limits and default of each option that a strategy takes."""
    function = STRATEGIES[name]
    found: dict[str, tuple[Any, Mapping[str, Any], Any]] = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint, limits = hints[parameter.name], {}
        if typing.get_origin(hint) is Annotated:
            hint, limits = typing.get_args(hint)[:2]
        found[parameter.name] = (hint, limits, parameter.default)
    return found
