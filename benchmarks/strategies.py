"""Every strategy with nothing but its name given, on one configuration: what it costs and reaches.

    python benchmarks/strategies.py --config CONFIG [--strategies a b …] [--workdir DIR] \
        [--config.FIELD=VALUE …]

Runs each as `run.py` would, one after the other, and prints a table and one JSON line each. A run
whose work directory is finished is not run again.
"""

import argparse
import json
import pathlib

from tl_jax import config_files, strategies, trainer


def row(name, summary):
    """What the table says of one run."""
    metrics, cost = summary["metrics"].get("test", {}), summary["cost"]
    return {
        "strategy": name,
        "test_accuracy": metrics.get("accuracy"),
        "accuracy_ci95": metrics.get("accuracy_ci95"),
        "trainable": summary["model"]["parameters"]["trainable"],
        "boundary": summary["freeze"]["boundary_block"],
        "optimizer_state_bytes": summary["optimizer_state_bytes"],
        "flops_over_minimum": cost["flops_per_step"] / cost["flops_minimum"],
        "flops_per_step": cost["flops_per_step"],
        "train_seconds": cost["train_seconds"],
        "certificate": summary["freeze"]["certificate"]["ok"],
        **(
            {"coefficient": summary["interpolation"]["coefficient"]}
            if "interpolation" in summary
            else {}
        ),
    }


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--strategies", nargs="+", default=list(strategies.STRATEGIES))
    parser.add_argument("--workdir", help="default: runs/strategies_CONFIG")
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    fields = config_files.load_config(flags.config)
    workdir = pathlib.Path(flags.workdir or f"runs/strategies_{pathlib.Path(flags.config).stem}")
    rows = []
    for name in flags.strategies:
        chosen = [*overrides, ("freeze.strategy", name), ("control", "None")]
        config = config_files.resolve(fields, chosen)
        rows.append(row(name, trainer.train(config, workdir / name)))
    print("| strategy | test accuracy | trainable | FLOPs a step / least | training |")
    print("|---|---|---|---|---|")
    for r in rows:
        low, high = r["accuracy_ci95"]
        print(
            f"| `{r['strategy']}` | {r['test_accuracy']:.4f} [{low:.4f}, {high:.4f}] | "
            f"{r['trainable']:,} | {r['flops_over_minimum']:.3f} | {r['train_seconds']:.1f} s |"
        )
    for r in rows:
        print(json.dumps(r))


if __name__ == "__main__":
    main()
