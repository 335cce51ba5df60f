"""Types and ranges of what a strategy returned: it may be a user's own."""

import math
from typing import Any

from tl_jax.recipes import FROZEN, Group, Lora, Phase, Recipe, Rule


def problems_of(recipe: Recipe) -> list[str]:
    """What a user's own strategy may have got wrong: types and ranges of all that it returned."""
    problems = []
    for phase in recipe.phases:
        if not isinstance(phase, Phase):
            problems.append(f"phases: {phase!r:.80} is no Phase")
        elif not all(isinstance(rule, Rule) for rule in phase.rules):
            problems.append(f"phase {phase.name!r}: its rules must be made by train(…), freeze(…)")
        elif not _is_number(phase.rate) or phase.rate <= 0:
            problems.append(f"phase {phase.name!r}: rate = {phase.rate!r} is no number above 0")
        else:
            groups = {rule.group for rule in phase.rules}
            problems += sorted(problem for group in groups for problem in _group_problems(group))
    if recipe.trunk not in ("pretrained", "random"):
        problems.append(f"trunk = {recipe.trunk!r} is neither 'pretrained' nor 'random'")
    decay, pair = recipe.layer_decay, recipe.discriminative
    if decay is not None and not (_is_number(decay) and 0 < decay <= 1):
        problems.append(f"layer_decay = {decay!r} is no number above 0 and at most 1")
    if pair is not None and not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(_is_number(p) and p > 0 for p in pair)
    ):
        problems.append(f"discriminative = {pair!r} is no pair of numbers above 0")
    problems += _lora_problems(recipe.adapters)
    if not all(_is_number(c) and 0 <= c <= 1 for c in recipe.interpolate):
        problems.append(f"interpolate = {recipe.interpolate!r}: coefficients are from 0 to 1")
    elif recipe.interpolate and (len(recipe.phases) < 2 or recipe.adapters is not None):
        problems.append("interpolate goes from the first phase's end to the last's, not adapters'")
    return problems


def _lora_problems(adapters: Lora | None) -> list[str]:
    if adapters is None:
        return []
    if not isinstance(adapters, Lora):
        return [f"adapters = {adapters!r:.80} are no Lora(…)"]
    problems = []
    if not isinstance(adapters.rank, int) or adapters.rank < 1:
        problems.append(f"Lora: rank = {adapters.rank!r} is no whole number from 1")
    if not _is_number(adapters.alpha) or adapters.alpha <= 0:
        problems.append(f"Lora: alpha = {adapters.alpha!r} is no number above 0")
    if not _is_number(adapters.dropout) or not 0 <= adapters.dropout < 1:
        problems.append(f"Lora: dropout = {adapters.dropout!r} is no number from 0 to below 1")
    targets = adapters.targets
    if not isinstance(targets, tuple | list) or not all(isinstance(t, str) for t in targets):
        problems.append(f"Lora: targets = {targets!r} is no tuple of words or expressions")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _group_problems(group: Group) -> list[str]:
    numbers = {
        "multiplier": group.multiplier,
        "weight_decay": group.weight_decay,
        "pull": group.pull,
    }
    problems = [
        f"group {group.name!r}: {name} = {value!r} is no number of at least 0"
        for name, value in numbers.items()
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf)
    ]
    if group.multiplier == 0:
        problems.append(f"group {group.name!r}: multiplier = 0 is frozen: use freeze(…)")
    if group.name == FROZEN.name and group.multiplier is not None:
        problems.append(f"group {group.name!r} trains: give it another name")
    return problems
