"""Forward passes per second, and how far the features are from PyTorch's, for each precision.

    python benchmarks/forward.py FOLDER [--image-size 224] [--batch-size 256] \
        [--golden golden.npz] [--precisions float32 …] [--torch]

FOLDER is a checkpoint in the Hub's format; `--golden` holds PyTorch's answers to fixed inputs
(`pixel_values` NCHW, and `pooled` or `features`). Prints one JSON line a precision. The time is the
median over 10 calls after the first, the images on the device already. `evaluation` is the network
as its final evaluation runs, on a CPU by products; `ready` has its BatchNorm folded, too, as a
frozen prefix runs; `--torch` times PyTorch's trunk, channels last, in float32 on the same
processor, in turn with ours.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

import tl_jax
from tl_jax import depth_map, freezing, layer_forms, param_tree, prefix
from tl_jax.config import Freeze

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
    parser.add_argument("--precisions", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--torch", action="store_true")
    flags = parser.parse_args()
    for name, setting in ((name, SETTINGS[name]) for name in flags.precisions):
        network = tl_jax.load_pretrained(flags.folder, 10, image_size=flags.image_size, **setting)
        variables = jax.device_put(network.variables)
        shape = (flags.batch_size, flags.image_size, flags.image_size)
        channels = network.preprocessing.channels
        images = jax.random.normal(jax.random.key(0), (*shape, channels))

        @jax.jit
        def features(variables, images, network=network):
            return network.module.apply(variables, images, last=-1)

        @jax.jit
        def evaluated(variables, images, network=network):
            with layer_forms.suited():
                return network.module.apply(variables, images, last=-1)

        took = seconds(features, variables, images)
        took_evaluated = seconds(evaluated, variables, images)
        below, ready = prefix_of(network)
        took_ready = seconds(ready, below, images)
        row = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "precision": name}
        row |= {"image_size": flags.image_size, "batch_size": flags.batch_size}
        row["images_per_second"] = flags.batch_size / took
        row["evaluation_images_per_second"] = flags.batch_size / took_evaluated
        row["ready_images_per_second"] = flags.batch_size / took_ready
        if flags.torch:
            row["torch_images_per_second"] = flags.batch_size / pytorch(network, images)
        if flags.golden:
            row["largest_difference"] = difference(flags.folder, setting, np.load(flags.golden))
        print(json.dumps(row), flush=True)


def prefix_of(network):
    """The trunk as a frozen prefix: its variables, and the compiled function."""
    names = network.conversion.keys
    params = network.variables["params"]
    found = depth_map.describe(network.family, network.chain, params, names)
    running = {
        path: depth_map.block_of(path, network.chain)
        for path in param_tree.flatten(network.variables.get("batch_stats", {}))
    }
    freeze = Freeze()
    (plan,) = freezing.resolve(freeze, freezing.recipe(freeze, found), found, running)
    below = prefix.ready(network.module, network.family, plan, network.variables)
    return below, jax.jit(lambda below, x: prefix.apply(network.module, plan, below, x))


def pytorch(network, images):
    """Seconds of a pass of PyTorch's trunk."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(
        network.checkpoint.folder, dtype=torch.float32
    ).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    sized = {"interpolate_pos_encoding": True} if network.family.model_type == "vit" else {}

    def run():
        with torch.no_grad():
            model(x, **sized)

    run()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def difference(folder, setting, golden):
    """Largest difference of the features from PyTorch's, relative to their scale."""
    ours = tl_jax.load_pretrained(folder, image_size=golden["pixel_values"].shape[-1], **setting)
    found = np.asarray(ours.features(golden["pixel_values"].transpose(0, 2, 3, 1)))
    wanted = golden["pooled" if "pooled" in golden else "features"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main()
