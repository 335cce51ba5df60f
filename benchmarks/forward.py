"""Forward passes per second, and how far the features are from PyTorch's, for each precision.

    python benchmarks/forward.py FOLDER [--image-size 224] [--batch-size 256] [--golden golden.npz]

FOLDER is a checkpoint in the Hub's format; `--golden` holds PyTorch's answers to fixed inputs
(`pixel_values` NCHW, and `pooled` or `features`). Prints one JSON line a precision. The time is the
median over 10 calls after the first, the images on the device already.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

import tl_jax

SETTINGS = {
    "float32": {"dtype": "float32", "precision": "float32"},
    "tensorfloat32": {"dtype": "float32", "precision": "tensorfloat32"},  # differs on GPUs only
    "bfloat16": {"dtype": "bfloat16"},
}


def seconds(function, *args, calls=10):
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--golden")
    flags = parser.parse_args()
    for name, setting in SETTINGS.items():
        network = tl_jax.load_pretrained(flags.folder, image_size=flags.image_size, **setting)
        variables = jax.device_put(network.variables)
        shape = (flags.batch_size, flags.image_size, flags.image_size)
        channels = network.preprocessing.channels
        images = jax.random.normal(jax.random.key(0), (*shape, channels))

        @jax.jit
        def features(variables, images, network=network):
            return network.module.apply(variables, images, last=-1)

        took = seconds(features, variables, images)
        row = {"device": jax.devices()[0].device_kind, "precision": name}
        row |= {"image_size": flags.image_size, "batch_size": flags.batch_size}
        row["images_per_second"] = flags.batch_size / took
        if flags.golden:
            row["largest_difference"] = difference(flags.folder, setting, np.load(flags.golden))
        print(json.dumps(row), flush=True)


def difference(folder, setting, golden):
    """Largest difference of the features from PyTorch's, relative to their scale."""
    ours = tl_jax.load_pretrained(folder, image_size=golden["pixel_values"].shape[-1], **setting)
    found = np.asarray(ours.features(golden["pixel_values"].transpose(0, 2, 3, 1)))
    wanted = golden["pooled" if "pooled" in golden else "features"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main()
