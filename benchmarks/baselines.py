"""What a linear probe should reach: scikit-learn's logistic regression on the run's own features.

    python benchmarks/baselines.py --config configs/resnet_fashion.py [--config.FIELD=VALUE …]

Takes the same data, splits, preprocessing and network as the run, and fits standardised features
of the pretrained trunk, of the same trunk with random weights, and the raw pixels. The penalty is
chosen on the validation split. Needs scikit-learn (`pip install -e ".[dev]"`).
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tl_jax import config_files, evaluation, input_pipeline, job

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def extract(run, variables, split):
    """Features [N, D], raw pixels [N, P] and labels [N] of one split."""
    preprocessing, module = run.device_preprocessing, run.pretrained.module

    @jax.jit
    def features(images):
        return module.apply(variables, preprocessing.device(images), last=-1)

    found = []
    for batch in input_pipeline.evaluation_batches(
        run.rows(split), batch_size=run.config.data.batch_size
    ):
        real = batch["mask"] > 0
        pixels = batch["image"].reshape(len(real), -1).astype(np.float32) / 255
        found.append(
            (np.asarray(features(batch["image"]))[real], pixels[real], batch["label"][real])
        )
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def logistic_regression(train, validation, test):
    """Test accuracy with its interval, and the inverse penalty C that validation chose."""
    scaler = StandardScaler().fit(train[0])
    (x, y), (xv, yv), (xt, yt) = [(scaler.transform(x), y) for x, y in (train, validation, test)]
    models = {
        penalty: LogisticRegression(C=penalty, max_iter=300).fit(x, y) for penalty in PENALTIES
    }
    best = max(models, key=lambda penalty: models[penalty].score(xv, yv))
    hits = models[best].predict(xt) == yt
    low, high = evaluation.wilson_interval(int(hits.sum()), len(hits))
    return {"accuracy": float(hits.mean()), "accuracy_ci95": [low, high], "C": best}


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--save", help="writes the features there, .npz")
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    run = job.prepare(config_files.resolve(config_files.load_config(flags.config), overrides))
    trunks = {
        "pretrained trunk": run.pretrained.variables,
        "random trunk": job.with_random_trunk(run.pretrained, run.config.seed),
    }
    kept = {}
    for name, variables in trunks.items():
        start = time.perf_counter()
        splits = {split: extract(run, variables, split) for split in run.examples}
        print(f"{name}: features in {time.perf_counter() - start:.0f} s", flush=True)
        kept |= {f"{name}/{split}": parts[0] for split, parts in splits.items()}
        kept |= {f"label/{split}": parts[2] for split, parts in splits.items()}
        order = ("train", "validation", "test")
        if name == "pretrained trunk":
            pixels = logistic_regression(*[(splits[s][1], splits[s][2]) for s in order])
            print(json.dumps({"features": "raw pixels", **pixels}), flush=True)
        if flags.save:
            np.savez(pathlib.Path(flags.save), **kept)
        found = logistic_regression(*[(splits[s][0], splits[s][2]) for s in order])
        print(json.dumps({"features": name, **found}), flush=True)


if __name__ == "__main__":
    main()
