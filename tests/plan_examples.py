"""Plans (the content of `plan.json`) from few words, for what shows them."""

BLOCKS = ("stem", "layer_0", "layer_1", "pool", "head")
# Of each parameter: block, kind, how many numbers.
NETWORK = (
    ("stem", "convolution", 9_400),
    ("stem", "norm", 8),
    ("layer_0", "convolution", 80_000),
    ("layer_0", "norm", 4_000),
    ("layer_1", "convolution", 80_000),
    ("layer_1", "norm", 4_000),
    ("head", "head", 20_490),
)


def leaf(block, kind, parameters, group="frozen", multiplier=1.0, *, blocks=BLOCKS, **fields):
    trains = group != "frozen"
    return {
        "path": f"{block}/{kind}",
        "name": f"{block}.{kind}",
        "kind": kind,
        "kinds": [kind],
        "group": group,
        "block": block,
        "block_index": blocks.index(block),
        "depth_fraction": blocks.index(block) / max(len(blocks) - 1, 1),
        "parameters": parameters,
        "learning_rate_multiplier": multiplier if trains else 0.0,
        "weight_decay": 0.0,
        "pull_toward_start": 0.0,
        "optimizer_state_bytes": 4 * parameters if trains else 0,
    } | fields


def network(groups):
    """The leaves of NETWORK: `groups` is by block, or by block and kind; what it lacks is frozen.

    A value is a group's name, or that with its multiplier.
    """
    leaves = []
    for block, kind, parameters in NETWORK:
        group = groups.get((block, kind), groups.get(block, "frozen"))
        name, multiplier = (group, 1.0) if isinstance(group, str) else group
        leaves.append(leaf(block, kind, parameters, name, multiplier))
    return leaves


def plan(*phases, strategy="sample", blocks=BLOCKS, epochs=2, **fields):
    """A plan of phases, each a list of leaves, or that with fields of the phase."""
    described = []
    for number, phase in enumerate(phases):
        leaves, own = phase if isinstance(phase, tuple) else (phase, {})
        boundary = min((x["block_index"] for x in leaves if x["group"] != "frozen"), default=0)
        described.append(
            {
                "name": f"phase_{number}",
                "first_step": 100 * epochs * number + 1,
                "last_step": 100 * epochs * (number + 1),
                "epochs": float(epochs),
                "warmup_steps": 0,
                "gradient_clip_norm": 0.0,
                "boundary": boundary,
                "boundary_block": blocks[boundary] if blocks else "",
                "blocks": list(blocks),
                "batch_norm": "frozen",
                "moving_statistics": [],
                "frozen_statistics": [],
                "optimizer": "sgd",
                "learning_rate": 0.1,
                "schedule": "cosine",
                "optimizer_state_bytes": sum(x["optimizer_state_bytes"] for x in leaves),
                "leaves": leaves,
            }
            | own
        )
    leaves = []
    for rows in zip(*(phase["leaves"] for phase in described), strict=True):
        leaves.append(([row for row in rows if row["group"] != "frozen"] or rows)[-1])
    return {
        **{k: v for k, v in described[-1].items() if not k.endswith("_step")},
        "strategy": strategy,
        "trunk": "pretrained",
        "boundary": min(phase["boundary"] for phase in described),
        "boundary_block": described[-1]["boundary_block"],
        "optimizer_state_bytes": max(phase["optimizer_state_bytes"] for phase in described),
        "notes": [],
        "leaves": leaves,
        "epochs": epochs * len(described),
        "steps_per_epoch": 100,
        "batch_size": 64,
        "one_schedule": False,
        "adapters": None,
        "interpolate": [],
        "data": {
            "source": "tfds:sample",
            "classes": 10,
            "splits": {"train": {"split": "train[:90%]", "examples": 6_400}},
        },
        "phases": described,
    } | fields
