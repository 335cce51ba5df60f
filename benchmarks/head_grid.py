"""Time of a linear probe against the number of heads that are searched, cache included.

    python benchmarks/head_grid.py --config CONFIG [--heads 1 10 100] [--config.FIELD=VALUE …]

Each run computes the features anew (config.cache=device), searches a grid of so many learning
rates, and trains the head that validation chose. Prints a table and JSON lines.
"""

import argparse
import json
import tempfile
import time

import numpy as np

from tl_jax import config_files, trainer


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 10, 100])
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    rows = []
    for heads in flags.heads:
        rates = tuple(float(f"{rate:.4g}") for rate in np.geomspace(1e-3, 3.0, heads))
        fixed = {"cache": "device", "control": "None", "probe.grid.learning_rate": repr(rates)}
        config = config_files.resolve(
            config_files.load_config(flags.config), [*overrides, *fixed.items()]
        )
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            summary = trainer.train(config, folder)
            seconds = time.perf_counter() - start
        rows.append(
            {
                "heads": heads,
                "seconds": seconds,
                "learning_rate": summary["probe"]["chosen"]["learning_rate"],
                "test_accuracy": summary["metrics"]["test"]["accuracy"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    print("| heads | seconds | × one head | learning rate chosen | test accuracy |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['heads']} | {row['seconds']:.1f} | {row['seconds'] / rows[0]['seconds']:.2f} "
            f"| {row['learning_rate']:g} | {row['test_accuracy']:.4f} |"
        )


if __name__ == "__main__":
    main()
