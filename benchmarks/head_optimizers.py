"""Which optimizer reaches what a linear head can reach, on features that are saved already.

    python benchmarks/baselines.py --config CONFIG --save FEATURES.npz
    python benchmarks/head_optimizers.py FEATURES.npz --epochs 10 --batch-size 256 sgd:0.1 adam:0.01

Trains a zero-initialised linear head with a cosine schedule for each NAME:RATE[:DECAY]; prints a
table and one JSON line each. Accuracies are of the last epoch and, on test, also of the epoch that
validation chooses, as a run of `run.py` would.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_optimizer(name, rate, decay, steps):
    """`decay` is coupled (L2) but for adamw, as in the configuration."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=decay)
    rule = {"sgd": optax.sgd(schedule, momentum=0.9), "adam": optax.adam(schedule)}[name]
    return optax.chain(optax.add_decayed_weights(decay), rule)


def train_head(splits, optimizer, epochs, batch_size, seed):
    """Accuracy on validation and test after each epoch, float [epochs, 2]."""
    x, y = splits["train"]
    batches = len(x) // batch_size
    head = {
        "kernel": jnp.zeros((x.shape[1], int(y.max()) + 1)),
        "bias": jnp.zeros(int(y.max()) + 1),
    }
    state = optimizer.init(head)

    def logits(head, x):
        return x @ head["kernel"] + head["bias"]

    def step(carry, rows):
        head, state = carry

        def loss(head):
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(head, x[rows]), y[rows]
            ).mean()

        updates, state = optimizer.update(jax.grad(loss)(head), state, head)
        return (optax.apply_updates(head, updates), state), None

    @jax.jit
    def epoch(head, state, key):
        order = jax.random.permutation(key, len(x))[: batches * batch_size]
        return jax.lax.scan(step, (head, state), order.reshape(batches, batch_size))[0]

    found = []
    for number in range(epochs):
        key = jax.random.fold_in(jax.random.key(seed), number)
        head, state = epoch(head, state, key)
        found.append(
            [
                float((logits(head, x).argmax(-1) == y).mean())
                for x, y in (splits["validation"], splits["test"])
            ]
        )
    return np.array(found)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("features", help="as benchmarks/baselines.py --save writes them")
    parser.add_argument("optimizers", nargs="+", metavar="NAME:RATE[:DECAY]")
    parser.add_argument("--trunk", default="pretrained trunk")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    saved = np.load(flags.features)
    splits = {
        split: (jnp.asarray(saved[f"{flags.trunk}/{split}"]), jnp.asarray(saved[f"label/{split}"]))
        for split in ("train", "validation", "test")
    }
    steps = len(splits["train"][0]) // flags.batch_size * flags.epochs
    print("| optimizer | validation, last | test, last | test, best by validation |")
    print("|---|---|---|---|")
    rows = []
    for text in flags.optimizers:
        name, rate, decay = (*text.split(":"), "0")[:3]
        optimizer = make_optimizer(name, float(rate), float(decay), steps)
        history = train_head(splits, optimizer, flags.epochs, flags.batch_size, flags.seed)
        best = history[history[:, 0].argmax(), 1]
        rows.append({"optimizer": text, "validation": history[-1, 0], "test": history[-1, 1]})
        rows[-1] |= {"test_of_best": best, "seed": flags.seed}
        print(f"| {text} | {history[-1, 0]:.4f} | {history[-1, 1]:.4f} | {best:.4f} |", flush=True)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
