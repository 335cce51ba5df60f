"""The proof of what stayed frozen: a fingerprint before training against the one after."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tl_jax import param_tree
from tl_jax.freezing import Plan


def fingerprint(plan: Plan, variables: Mapping[str, Any], *, steps: bool = False) -> str:
    """SHA-256 over every frozen parameter and statistic: path, dtype, shape and bytes of each.

    Args:
      plan: says what is frozen.
      variables: to be looked at.
      steps: whether they are compared over the steps of a phase alone, which leave statistics alone
        that are measured anew before or after them.
    """
    return _sha256(frozen_leaves(plan, variables, steps=steps))


def sha256(tree: Any) -> str:
    """SHA-256 over all leaves of a tree: place, dtype, shape and bytes of each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return _sha256({jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def _sha256(leaves: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for path, leaf in leaves.items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def frozen_leaves(
    plan: Plan, variables: Mapping[str, Any], *, steps: bool = False
) -> dict[str, Any]:
    """What the plan says must not move, by path with its collection in front."""
    _, params = plan.split_params(variables["params"])
    statistics = variables.get("batch_stats", {})
    if not (steps and plan.batch_norm == "reestimate"):
        _, statistics = plan.split_statistics(statistics)
    return param_tree.flatten({"params": params, "batch_stats": statistics})


def certify(
    plan: Plan, before: str, variables: Mapping[str, Any], *, steps: bool = False
) -> dict[str, Any]:
    """Proof that the frozen did not move: its fingerprint before training against the one after.

    Args:
      plan: says what is frozen.
      before: `fingerprint` of the variables that training started from.
      variables: after training.
      steps: as for `fingerprint`.
    """
    after = fingerprint(plan, variables, steps=steps)
    leaves = frozen_leaves(plan, variables, steps=steps)
    return {
        "ok": before == after,
        "leaves": len(leaves),
        "statistics": sum(path.startswith("batch_stats/") for path in leaves),
        "sha256_before": before,
        "sha256_after": after,
    }
