"""What the features are worth without training by steps: logistic regression, nearest neighbours.

Both see exactly what a linear probe's head sees, choose their one setting by validation, and say
what they reach on test.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tl_jax import evaluation, losses

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # λ of the objective, the strongest first
NEIGHBOURS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07  # of a neighbour's vote, as in DINO (arXiv:2104.14294)
_ITERATIONS, _TOLERANCE = 500, 1e-4
_ROWS = 1024  # of similarities at a time

Split = tuple[np.ndarray, np.ndarray]  # features [N, D], labels [N]


def run(names: Sequence[str], splits: Mapping[str, Split], num_classes: int) -> dict[str, Any]:
    """The baselines of these names.

    Args:
      names: "logistic_regression", "nearest_neighbours".
      splits: features float [N, D] and labels int [N] by role: "train", "validation", "test".
      num_classes: number of labels.

    Returns:
      For each its setting, its validation accuracy, and its test accuracy with a 95 % interval.
    """
    known: dict[str, Callable] = {
        "logistic_regression": logistic_regression,
        "nearest_neighbours": nearest_neighbours,
    }
    return {name: known[name](splits, num_classes) for name in names}


def logistic_regression(splits: Mapping[str, Split], num_classes: int) -> dict[str, Any]:
    """Multinomial logistic regression on standardised features, solved by L-BFGS.

    Minimises mean cross-entropy + λ/2 ‖W‖² over W [D, C] and a bias, for each λ of `PENALTIES` from
    the last one's solution, until the gradient's norm is below 1e-4.
    """
    mean = splits["train"][0].mean(0, dtype=np.float64).astype(np.float32)
    deviation = splits["train"][0].std(0, dtype=np.float64).astype(np.float32)
    scale = np.where(deviation > 0, deviation, 1)  # what never changes says nothing

    def standardised(role: str) -> tuple[jax.Array, jax.Array]:
        features, labels = splits[role]
        return jnp.asarray((features - mean) / scale, jnp.float32), jnp.asarray(labels)

    x, y = standardised("train")
    weights = {
        "kernel": jnp.zeros((x.shape[1], num_classes)),
        "bias": jnp.zeros(num_classes),
    }
    rows = []
    for penalty in PENALTIES:
        weights, norm, steps = _solve(weights, x, y, penalty)
        validation = _hits(weights, *standardised("validation"))
        rows.append(
            {
                "penalty": penalty,
                "validation_accuracy": float(np.mean(validation)),
                "gradient_norm": float(norm),
                "iterations": int(steps),
                "weights": weights,
            }
        )
    best = max(rows, key=lambda row: row["validation_accuracy"])
    hits = _hits(best["weights"], *standardised("test"))
    tried = [{k: v for k, v in row.items() if k != "weights"} for row in rows]
    return {"penalty": best["penalty"], **_judged(best, hits), "tried": tried}


@jax.jit
def _solve(weights: Any, x: jax.Array, y: jax.Array, penalty: float) -> tuple[Any, Any, Any]:
    """Weights at the minimum, the gradient's norm there, and the number of iterations."""

    def objective(weights):
        logits = jnp.dot(x, weights["kernel"], precision="highest") + weights["bias"]
        shrunk = penalty / 2 * jnp.sum(weights["kernel"] ** 2)
        return losses.cross_entropy(logits, y).mean() + shrunk

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def go_on(carry):
        _, _, norm, steps = carry
        return (norm > _TOLERANCE) & (steps < _ITERATIONS)

    def step(carry):
        weights, state, _, steps = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(
            grad, state, weights, value=value, grad=grad, value_fn=objective
        )
        weights = optax.apply_updates(weights, updates)
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return weights, state, norm, steps + 1

    start = (weights, solver.init(weights), jnp.array(jnp.inf), jnp.array(0))
    weights, _, norm, steps = jax.lax.while_loop(go_on, step, start)
    return weights, norm, steps


def _hits(weights: Any, x: jax.Array, y: jax.Array) -> np.ndarray:
    logits = jnp.dot(x, weights["kernel"], precision="highest") + weights["bias"]
    return np.asarray(logits.argmax(-1) == y)


def nearest_neighbours(splits: Mapping[str, Split], num_classes: int) -> dict[str, Any]:
    """A vote of the k most similar training images, by cosine.

    Each votes for its class with weight exp(similarity / 0.07), as in DINO's evaluation
    (arXiv:2104.14294); k of `NEIGHBOURS` is chosen by validation.
    """
    features, labels = splits["train"]
    train, owners = jnp.asarray(_unit(features)), jnp.asarray(labels)
    counts = tuple(k for k in NEIGHBOURS if k <= len(labels)) or (len(labels),)

    @jax.jit
    def predict(x):
        near, index = jax.lax.top_k(jnp.dot(x, train.T, precision="highest"), max(counts))
        votes = jnp.exp((near - near[:, :1]) / TEMPERATURE)[..., None]
        votes = jnp.cumsum(votes * jax.nn.one_hot(owners[index], num_classes), axis=1)
        return jnp.stack([votes[:, k - 1].argmax(-1) for k in counts], axis=1)

    def hits(role: str) -> np.ndarray:
        x, y = _unit(splits[role][0]), splits[role][1]
        parts = [predict(x[start : start + _ROWS]) for start in range(0, len(x), _ROWS)]
        return np.concatenate(parts) == y[:, None]

    validation = hits("validation").mean(0)
    best = int(validation.argmax())
    tried = [
        {"neighbours": k, "validation_accuracy": float(share)}
        for k, share in zip(counts, validation, strict=True)
    ]
    return {
        "neighbours": counts[best],
        **_judged(tried[best], hits("test")[:, best]),
        "tried": tried,
    }


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _judged(best: Mapping[str, Any], hits: np.ndarray) -> dict[str, Any]:
    low, high = evaluation.wilson_interval(int(hits.sum()), len(hits))
    return {
        "validation_accuracy": best["validation_accuracy"],
        "test_accuracy": float(hits.mean()),
        "test_accuracy_ci95": [low, high],
    }
