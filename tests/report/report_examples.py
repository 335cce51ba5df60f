"""Results of sweeps from few words, deterministic, for the report's tests."""

import itertools
import zlib

import numpy as np
from plan_examples import network, plan

STRATEGIES = (
    "linear_probe",
    "full",
    "top_k",
    "lp_ft",
    "bitfit",
    "lora",
    "surgical",
    "from_scratch",
)
# Of each strategy: accuracy with 10 and 100 examples, parts of full's FLOPs and parameters, drift.
TRUTH = {
    "linear_probe": (0.70, 0.80, 0.05, 0.01, 0.0),
    "full": (0.64, 0.88, 1.0, 1.0, 0.2),
    "top_k": (0.70, 0.86, 0.4, 0.4, 0.1),
    "lp_ft": (0.72, 0.885, 0.9, 1.0, 0.12),
    "bitfit": (0.71, 0.84, 0.7, 0.02, 0.03),
    "lora": (0.72, 0.87, 0.72, 0.05, 0.06),
    "surgical": (0.69, 0.86, 0.9, 0.2, 0.1),
    "from_scratch": (0.35, 0.62, 1.0, 1.0, 0.9),
}
BLOCKS = ("stem", "stages_0/layers_0", "stages_0/layers_1", "stages_1/layers_0", "pool", "head")
KINDS = ("gaussian_noise", "blur", "brightness")

# What no name may do: end an element, run, link, be a formula, turn the direction of writing.
HOSTILE = (
    "</script><img src=x onerror=alert(1)>|`$x$`_[a](http://b)\n=1+1\u202e$$\\frac{1}{2}$$ \x00'\""
)


def random_of(*names):
    return np.random.default_rng(zlib.crc32("/".join(map(str, names)).encode()))


def wilson(share, n, z=1.96):
    centre, spread = share + z * z / 2 / n, z * (share * (1 - share) / n + (z / 2 / n) ** 2) ** 0.5
    return [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]


def figures(share, n):
    return {
        "accuracy": share,
        "accuracy_ci95": wilson(share, n),
        "loss": 1.2 - share,
        "loss_ci95": [1.15 - share, 1.25 - share],
        "examples": n,
    }


def summary(
    share, n=500, *, flops=1e9, parameters=20_000, seconds=10.0, leaves=40, ok=True, memory=None
):
    return {
        "model": {
            "source": "quickstart/trunk",
            "parameters": {
                "total": 400_000,
                "trainable": parameters,
                "frozen": 400_000 - parameters,
            },
        },
        "freeze": {
            "certificate": {
                "ok": ok,
                "leaves": leaves,
                "sha256_before": "a" * 64,
                "sha256_after": ("a" if ok else "b") * 64,
            }
        },
        "optimizer_state_bytes": 4 * parameters,
        "metrics": {"test": figures(share, n), "validation": figures(share, 297)},
        "steps": {"trained": 150, "best": 120},
        "cost": {
            "flops_per_step": flops,
            "flops_minimum": 0.98 * flops,
            "compile_seconds": 2.5,
            "cache_seconds": 0.5,
            "cache_validation_seconds": 0.125,
            "train_seconds": seconds,
            "total_seconds": seconds + 6,
            "peak_memory_bytes": memory,
        },
    }


def search(strategy, chosen, accuracy, at_edge=False):
    rates = (chosen / 27, chosen / 3, chosen) if at_edge else (chosen / 3, chosen)
    trials = [
        {"learning_rate": rate, "accuracy": accuracy - 0.03 * (rate != chosen), "loss": 0.5}
        for rate in (chosen / 9, *rates)
    ]
    trials.append({"learning_rate": 30 * chosen, "accuracy": None, "loss": None})
    if at_edge:
        trials.pop()
    return {"trials": trials, "at_edge": at_edge}


def measures(strategy, share, moved, random):
    last = len(BLOCKS) - 1
    drift = [
        {
            "block": block,
            "index": index,
            "depth": index / last,
            "weights": None if block == "pool" else moved * (0.3 + 0.7 * index / last),
            "cka": 1 - 0.6 * moved * index / last,
            "cosine": 1 - 0.8 * moved * index / last,
        }
        for index, block in enumerate(BLOCKS[:-1])
    ]
    shifts = [
        {"kind": kind, "severity": severity, **figures(round(max(0.1, worse), 4), 300)}
        for number, kind in enumerate(KINDS)
        for severity in (1, 3, 5)
        for worse in [
            share - severity * (0.02 + 0.02 * number) * (1 + moved) + random.normal(0, 0.01)
        ]
    ]
    gradients = None
    if strategy == "linear_probe":
        gradients = {
            head: [
                {
                    "block": block,
                    "index": index,
                    "depth": index / last,
                    "norms": [scale * (1 + 0.2 * index) * 0.97**step for step in range(5)],
                }
                for index, block in enumerate(BLOCKS)
                if block != "pool"
            ]
            for head, scale in (("random_head", 2.4), ("trained_head", 0.3))
        }
    return {
        "drift": drift,
        "clean": figures(share, 300),
        "shifts": shifts,
        "forgetting": {
            "source": "tfds:fashion_mnist",
            "before": figures(0.87, 1000),
            "after": figures(max(0.1, round(0.87 - 0.7 * moved, 3)), 1000),
        },
        "gradients": gradients,
    }


def curves(share, random):
    found = []
    for epoch in range(1, 11):
        value = share * (1 - np.exp(-epoch / 3)) + random.normal(0, 0.004)
        step = {"step": 15 * epoch, "epoch": float(epoch)}
        found.append({**step, "split": "epoch", "loss": 1 - value, "accuracy": value})
        found.append({**step, "split": "validation", "loss": 1.1 - value, "accuracy": value - 0.01})
    return found


def some_plan(strategy):
    groups = {"head": "head"}
    if strategy not in ("linear_probe",):
        groups |= {"layer_1": "trunk"}
    if strategy in ("full", "from_scratch", "lp_ft"):
        groups |= {"layer_0": "trunk", "stem": "trunk"}
    return plan(network(groups), strategy=strategy)


def cell(values, *, compared="strategy", share=0.8, n=500, status="finished", **fields):
    """One cell; `share` of its hits are right."""
    name = ",".join(values.values())
    found = {
        "name": name,
        "status": status,
        "error": None,
        "values": dict(values),
        "workdir": f"cells/{name}",
        "command": f"python run.py --config=configs/sample.py --workdir='cells/{name}'",
        "learning_rate": 0.1,
        "search": None,
        "summary": summary(share, n) if status == "finished" else None,
        "plan": some_plan(values[compared]) if status == "finished" else None,
        "curves": [],
        "hits": None,
        "measures": None,
    }
    return found | fields


def sweep(cells, compared="strategy", **fields):
    """Results of given cells; the axes are what they have."""
    axes = {
        axis: list(dict.fromkeys(c["values"][axis] for c in cells)) for axis in cells[0]["values"]
    }
    return {
        "name": "sample",
        "axes": axes,
        "compared": compared,
        "command": "python run.py --mode=ablate --config=configs/sample.py",
        "environment": {"versions": {"jax": "0.10.2"}, "devices": {"platform": "cpu", "count": 1}},
        "cells": cells,
    } | fields


def hits(share, n, *names):
    """0 and 1 of n examples; easy examples are easy for all strategies and seeds."""
    difficulty = random_of("difficulty", n).normal(0, 1, n)
    own = random_of(*names).normal(0, 0.6, n)
    order = np.argsort(difficulty + own)
    found = np.zeros(n, int)
    found[order[: round(share * n)]] = 1
    return found.tolist()


def full_sweep(strategies=STRATEGIES, settings=("10", "100"), seeds=("0", "1", "2"), n=500):
    """Everything that a report can hold: a failed and a missing cell, a search at its edge."""
    cells = []
    for strategy, setting, seed in itertools.product(strategies, settings, seeds):
        truth = TRUTH[strategy if strategy in TRUTH else STRATEGIES[len(strategy) % 8]]
        random = random_of(strategy, setting, seed)
        values = {"strategy": strategy, "data.examples_per_class": setting, "seed": seed}
        wanted = truth[int(setting == "100")] + random.normal(0, 0.008)
        right = hits(wanted, n, strategy, setting, seed)
        share = float(np.mean(right))
        rate = {"linear_probe": 0.3, "bitfit": 0.03}.get(strategy, 0.01)
        cells.append(
            cell(
                values,
                share=share,
                n=n,
                learning_rate=rate,
                search=search(strategy, rate, truth[int(setting == "100")], strategy == "bitfit"),
                summary=summary(
                    share,
                    n,
                    flops=4e9 * truth[2],
                    parameters=int(4290 + 395_000 * truth[3]),
                    seconds=float(40 * truth[2] + random.normal(0, 0.3)),
                    leaves=0 if truth[3] == 1 else 40,
                    memory=int(3e8 + 2e8 * truth[3]),
                ),
                curves=curves(share, random),
                hits=right,
                measures=measures(strategy, share, truth[4], random),
            )
        )
    names = {"surgical,100,2": ("failed", "RunFailed: the loss is not finite at step 12")}
    names["surgical,10,1"] = ("missing", None)
    for one in cells:
        if one["name"] in names:
            one["status"], one["error"] = names[one["name"]]
            one |= dict.fromkeys(("summary", "plan", "hits", "measures"))
            one["curves"] = []
    return sweep(cells, name="ablation_sample")


def hostile_sweep():
    """Every text is hostile."""
    results = full_sweep(("linear_probe", HOSTILE), settings=("10", HOSTILE), n=50)
    for one in results["cells"]:
        one["error"] = HOSTILE if one["status"] == "failed" else None
        one["command"] = HOSTILE
        for row in (one["measures"] or {}).get("shifts", []):
            row["kind"] = HOSTILE
        for row in (one["measures"] or {}).get("drift", []):
            row["block"] = HOSTILE
    return results | {"name": HOSTILE, "command": HOSTILE, "environment": {HOSTILE: HOSTILE}}
