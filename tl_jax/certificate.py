"""The proof of what stayed frozen: a fingerprint before training against the one after."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax import param_tree
from tl_jax.freezing import Plan


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


def certify(plan: Plan, before: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Proof that the frozen did not move: its fingerprint before training against the one after.

    Args:
      plan: says what is frozen.
      before: `fingerprint` of the variables that training started from.
      variables: after training.
    """
    after = fingerprint(plan, variables)
    leaves = len(frozen_leaves(plan, variables))
    return {"ok": before == after, "leaves": leaves, "sha256_before": before, "sha256_after": after}
