"""Logistic regression and nearest neighbours against their definitions."""

import numpy as np
import pytest

from tl_jax import feature_baselines

CLASSES = 4


def split(seed, count):
    """Overlapping clouds, one feature constant, one of a very different scale."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 6))
    labels = rng.integers(0, CLASSES, count)
    features = centres[labels] + rng.normal(size=(count, 6))
    features[:, 2] *= 1000
    features[:, 4] = 7
    return features.astype(np.float32), labels.astype(np.int32)


SPLITS = {"train": split(1, 300), "validation": split(2, 150), "test": split(3, 200)}


def gradient(weights, bias, x, y, penalty):
    logits = x @ weights + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y) + penalty * weights, p.mean(0)


def test_logistic_regression_is_solved_to_its_end():
    """The gradient of the objective, in float64, is zero where it stops."""
    found = feature_baselines.logistic_regression(SPLITS, CLASSES)
    assert [row["penalty"] for row in found["tried"]] == list(feature_baselines.PENALTIES)
    best = max(row["validation_accuracy"] for row in found["tried"])
    assert found["validation_accuracy"] == best
    x, y = SPLITS["train"]
    x = x.astype(np.float64)
    scale = np.where(x.std(0) > 1e-9, x.std(0), 1)
    x = (x - x.mean(0)) / scale
    weights = {"kernel": np.zeros((6, CLASSES), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    for penalty in (1e-1, 1e-3):
        solved, norm, steps = feature_baselines._solve(weights, x.astype(np.float32), y, penalty)
        kernel, bias = (np.asarray(solved[name], np.float64) for name in ("kernel", "bias"))
        parts = gradient(kernel, bias, x, y, penalty)
        assert max(np.abs(part).max() for part in parts) < 2e-4
        assert norm < 1e-4 and steps < 100
        assert np.abs(kernel[4]).max() < 1e-6, "what never changes says nothing"


def by_hand(train, owners, x, k):
    """The vote for one image, written out."""
    cosine = train @ x / (np.linalg.norm(train, axis=1) * np.linalg.norm(x))
    near = np.argsort(-cosine, kind="stable")[:k]
    votes = np.zeros(CLASSES)
    for i in near:
        votes[owners[i]] += np.exp(cosine[i] / 0.07)
    return votes.argmax()


def test_nearest_neighbours_vote_by_similarity():
    found = feature_baselines.nearest_neighbours(SPLITS, CLASSES)
    k = found["neighbours"]
    assert [row["neighbours"] for row in found["tried"]] == list(feature_baselines.NEIGHBOURS)
    train, owners = (SPLITS["train"][0].astype(np.float64), SPLITS["train"][1])
    for role, accuracy in (("validation", "validation_accuracy"), ("test", "test_accuracy")):
        x, y = SPLITS[role]
        hits = [
            by_hand(train, owners, row.astype(np.float64), k) == t
            for row, t in zip(x, y, strict=True)
        ]
        assert found[accuracy] == pytest.approx(np.mean(hits), abs=1.5 / len(y))
    few = {**SPLITS, "train": (SPLITS["train"][0][:3], SPLITS["train"][1][:3])}
    assert feature_baselines.nearest_neighbours(few, CLASSES)["neighbours"] == 3
