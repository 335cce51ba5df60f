"""Time to a linear probe of E epochs: with and without the cache, by PyTorch, by scikit-learn.

    python benchmarks/time_to_probe.py --config CONFIG [--epochs 1 10 30 100] \
        [--methods forward cached uncached torch scikit-learn] [--config.FIELD=VALUE …]

The same network, images, resolution, batch size and machine in one run; compilation and the
reading of files are left out, and reported apart. `torch` is the usual loop: transformers' model
with a frozen trunk (`requires_grad=False`, eval mode, the trunk under `no_grad`), channels last,
its images preprocessed, and on the GPU where there is one, before the clock starts; under autocast
where `model.dtype` is bfloat16. `scikit-learn` fits a logistic regression on features that were
extracted by ours. Needs torch, transformers and scikit-learn. Prints a table and JSON lines.
"""

import argparse
import json
import tempfile
import time

import jax
import numpy as np

from tl_jax import config_files, input_pipeline, job, prefix, stages, trainer

METHODS = ("forward", "cached", "uncached", "torch", "scikit-learn")


def configuration(flags, overrides, **fields):
    """The run's configuration: a linear probe with the training split alone."""
    fixed = {"freeze.strategy": "linear_probe", "data.splits.validation": "None"}
    fixed |= {"data.splits.test": "None", "control": "None", **fields}
    text = [*overrides, *((name, str(value)) for name, value in fixed.items())]
    return config_files.resolve(config_files.load_config(flags.config), text)


def pixels(run):
    """All training images preprocessed, float32 [N, H, W, C], and their labels."""
    batches = input_pipeline.evaluation_batches(
        run.rows("train"), batch_size=run.config.data.batch_size
    )
    preprocess = jax.jit(run.preprocess)
    found = [(np.asarray(preprocess(b)), b["label"], b["mask"] > 0) for b in batches]
    images = np.concatenate([x[real] for x, _, real in found])
    return images, np.concatenate([y[real] for _, y, real in found])


def forward(run, images):
    """Seconds of one pass of the trunk over the images, and the features."""
    module, stage = run.pretrained.module, run.stages[0]
    below = stages.prefix_of(run, stage)(run.pretrained.variables)
    features = jax.jit(lambda below, x: prefix.apply(module, stage.plan, below, x))
    size = run.config.data.batch_size
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    parts = jax.device_put(parts)
    jax.block_until_ready([features(below, part) for part in {len(p): p for p in parts}.values()])
    start = time.perf_counter()
    found = [np.asarray(features(below, part)) for part in parts]
    return time.perf_counter() - start, np.concatenate(found)


def ours(config):
    """Seconds of cache and training, and of compilation, and the last epoch's loss."""
    with tempfile.TemporaryDirectory() as folder:
        summary = trainer.train(config, folder)
        with open(f"{folder}/metrics.jsonl") as file:
            epochs = [json.loads(line) for line in file if '"split": "epoch"' in line]
    cost = summary["cost"]
    return {
        "seconds": cost["train_seconds"] + cost["cache_seconds"],
        "compile_seconds": cost["compile_seconds"],
        "total_seconds": cost["total_seconds"],
        "loss": epochs[-1]["loss"],
    }


def pytorch(run, images, labels, epochs):
    """Seconds of the usual loop."""
    import torch
    import transformers

    config = run.config
    model = transformers.AutoModelForImageClassification.from_pretrained(
        run.pretrained.checkpoint.folder,
        num_labels=len(run.class_names),
        ignore_mismatched_sizes=True,
    )
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", config.model.dtype
    model = model.to(device, memory_format=torch.channels_last)
    trunk, head = model.base_model.eval().requires_grad_(False), model.classifier
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # the images' memory is NHWC
    y = torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.SGD(
        head.parameters(), config.optimizer.learning_rate, momentum=config.optimizer.momentum
    )
    size, steps = config.data.batch_size, len(x) // config.data.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    vit = run.pretrained.family.model_type == "vit"
    sized = {"interpolate_pos_encoding": True} if vit else {}

    def step(rows):
        with torch.no_grad(), torch.autocast(device, getattr(torch, dtype), dtype != "float32"):
            out = trunk(x[rows], **sized)
            features = out.last_hidden_state[:, 0] if vit else out.pooler_output
        loss = torch.nn.functional.cross_entropy(head(features.float()), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss

    float(step(torch.arange(size)))  # warms its caches up
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for number in range(steps):
            loss = step(order[number * size : (number + 1) * size])
    loss = float(loss)  # waits for a GPU
    return {"seconds": time.perf_counter() - start, "loss": loss}


def scikit_learn(features, labels):
    """Seconds of a fit on features that are there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    start = time.perf_counter()
    LogisticRegression(C=0.01, max_iter=300).fit(StandardScaler().fit_transform(features), labels)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 10, 30, 100])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    run = job.prepare(configuration(flags, overrides))
    images, labels = pixels(run)
    rows = []

    def add(method, epochs, **figures):
        rows.append({"method": method, "epochs": epochs, "images": len(images), **figures})
        print(json.dumps(rows[-1]), flush=True)

    once, features = forward(run, images)
    add("forward", None, seconds=once)
    if "scikit-learn" in flags.methods:
        add("scikit-learn", None, seconds=once + scikit_learn(features, labels))
    for epochs in flags.epochs:
        for method, kind in (("cached", "device"), ("uncached", "off")):
            if method in flags.methods:
                config = configuration(flags, overrides, **{"train.epochs": epochs, "cache": kind})
                add(method, epochs, **ours(config))
        if "torch" in flags.methods:
            add("torch", epochs, **pytorch(run, images, labels, epochs))
    print("| method | epochs | seconds | × one forward pass |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['epochs'] or ''} | {row['seconds']:.2f} | "
            f"{row['seconds'] / once:.2f} |"
        )


if __name__ == "__main__":
    main()
