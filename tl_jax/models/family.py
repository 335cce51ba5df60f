"""What a model family declares: its module, its names, its chain of blocks, its config's rules."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from tl_jax.errors import UserError
from tl_jax.models.layers import Chain

# Bounds on numbers that come from a file someone else wrote: far beyond any real network.
MAX_SIZE = 1_000_000
MAX_DEPTH = 500


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One step of the chain: its name, and the parameter paths (inside "params") that it owns."""

    name: str
    prefixes: tuple[str, ...] = ()

    def owns(self, path: str) -> bool:
        """Whether `path` (inside "params" or "batch_stats") belongs to this block."""
        return any(path == prefix or path.startswith(prefix + "/") for prefix in self.prefixes)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network, by `model_type` in config.json.

    Attributes:
      model_type: the config's word for it.
      architecture: the transformers class of the classifier, `…ForImageClassification`.
      prefix: what the classifier's keys have in front of the base model's.
      head: parameter path of the head's module, e.g. `classifier_1`.
      head_key: the same in the file, e.g. `classifier.1`.
      inputs: what a head may see of a block, as `Head.input` says it; the classifier's own first.
      kinds: (pattern, word of `strategies.KINDS`) pairs for the paths of parameters; what a block
        or a leaf's name says already (stem, head, bias) is left out.
      ignored: keys (with everything under them) that a classifier has no use for.
      folds: name of a BatchNorm → of the convolution beside it whose output it takes.
      epsilon: of every BatchNorm.
      renames: (pattern, replacement) pairs that bring other spellings of a key to the usual one.
      module: `(config, num_classes | None, dtype, axis_name) -> Chain`; None builds no head.
      chain: `config -> blocks`, the head last.
      problems: `config -> what is wrong with it`, one line a field; empty if nothing is.
      example_shape: `config -> [1, H, W, C]`, a smallest sensible input.
    """

    model_type: str
    architecture: str
    prefix: str
    head: str
    head_key: str
    inputs: tuple[str, ...]
    module: Callable[..., Chain]
    chain: Callable[[Mapping[str, Any]], tuple[BlockSpec, ...]]
    problems: Callable[[Mapping[str, Any]], list[str]]
    example_shape: Callable[[Mapping[str, Any]], tuple[int, int, int, int]]
    kinds: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()
    folds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    epsilon: float = 1e-5
    renames: tuple[tuple[str, str], ...] = ()


class Fields:
    """Reads typed fields of an untrusted config and collects everything that is wrong with them."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.config = config
        self.defaults = defaults
        self.problems: list[str] = []

    def get(self, name: str) -> Any:
        """The value, or its default where the config has none."""
        return self.config.get(name, self.defaults[name])

    def expect(self, name: str, ok: bool, what: str) -> bool:
        """Notes a problem with the field unless `ok`; returns `ok`."""
        if not ok:
            self.problems.append(f"{name}: must be {what}, is {self.get(name)!r:.80}")
        return ok

    def size(self, name: str, most: int = MAX_SIZE) -> bool:
        """A whole number, 1 … most."""
        return self.expect(name, is_size(self.get(name), most), f"a whole number, 1 to {most}")

    def sizes(self, name: str, most: int = MAX_SIZE, least: int = 1) -> bool:
        """A list that is not empty, of whole numbers, least … most."""
        value = self.get(name)
        ok = isinstance(value, list | tuple) and 0 < len(value) <= MAX_DEPTH
        ok = ok and all(is_size(item, most) and item >= least for item in value)
        return self.expect(name, ok, f"a list of whole numbers, {least} to {most}")

    def pair(self, name: str) -> bool:
        """One size for both sides, or two."""
        value = self.get(name)
        if isinstance(value, list | tuple):
            ok = len(value) == 2 and all(is_size(item) for item in value)
        else:
            ok = is_size(value)
        return self.expect(name, ok, "a size in pixels or a list of two")

    def number(self, name: str, least: float, below: float) -> bool:
        """A finite number, least ≤ x < below."""
        value = self.get(name)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return self.expect(
            name, ok and least <= value < below, f"a number, at least {least} and less than {below}"
        )

    def flag(self, name: str) -> bool:
        """True or False."""
        return self.expect(name, isinstance(self.get(name), bool), "true or false")

    def one_of(self, name: str, known: Iterable[str]) -> bool:
        """One of the known words."""
        value = self.get(name)
        ok = isinstance(value, str) and value in known
        return self.expect(name, ok, "one of " + ", ".join(sorted(known)))


def is_size(value: Any, most: int = MAX_SIZE) -> bool:
    """Whether `value` is a whole number, 1 … most (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of one size for both or of two."""
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def check_images(images: Any, num_channels: int) -> None:
    """Images are float [N, H, W, num_channels].

    Raises:
      UserError: they are not.
    """
    if images.ndim != 4 or images.shape[-1] != num_channels:
        raise UserError(
            f"the network takes images [N, H, W, {num_channels}] (channels last), "
            f"got {list(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"the network takes preprocessed images, got {images.dtype}: preprocess first"
        )
