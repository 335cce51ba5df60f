"""What the terminal shows of a plan."""

import io

import pytest
from plan_examples import leaf, network, plan
from rich.console import Console

from tl_jax import job, plan_display

TRUNK = ("stem", "layer_0", "layer_1")
PROBE = network({"head": "head"})
FULL = network(dict.fromkeys(TRUNK, "trunk") | {"head": "head"})


def shown(what, width=100):
    """The lines as a pipe gets them, without trailing spaces."""
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(what)
    return [line.rstrip() for line in file.getvalue().splitlines()]


# The table.


def test_one_phase():
    assert shown(plan_display.plan_table(plan(PROBE))) == [
        "Plan: sample, the trunk's weights pretrained",
        "",
        "group    parameters   rate   decay   state bytes   blocks",
        "─────────────────────────────────────────────────────────────────",
        "frozen      177,408      –       –             –   stem … layer_1",
        "head         20,490    0.1       0        81,960   head",
        "",
        "Gradients end at head (block 4 of 0 to 4).",
        "Optimizer sgd: 81,960 bytes of state.",
    ]


def test_each_phase_has_its_own_rate_and_boundary():
    second = {"learning_rate": 0.01, "optimizer": "adam", "name": "full"}
    assert shown(plan_display.plan_table(plan(PROBE, (FULL, second)))) == [
        "Plan: sample, the trunk's weights pretrained",
        "",
        "Phase 1 of 2, phase_0: 2 epochs (steps 1 to 200), sgd; gradients end at head",
        "group    parameters   rate   decay   state bytes   blocks",
        "─────────────────────────────────────────────────────────────────",
        "frozen      177,408      –       –             –   stem … layer_1",
        "head         20,490    0.1       0        81,960   head",
        "",
        "Phase 2 of 2, full: 2 epochs (steps 201 to 400), adam; gradients end at stem",
        "trunk       177,408   0.01       0       709,632   stem … layer_1",
        "head         20,490   0.01       0        81,960   head",
        "",
        "The optimizer keeps at most 791,592 bytes of state.",
    ]


def test_groups_by_block_or_number_are_one_row():
    names = ("stem", *(f"layer_{i}" for i in range(50)), "head")
    by_block = [
        leaf(n, "mlp", 10, f"trunk/{n}", 0.5 ** (50 - i), blocks=names)
        for i, n in enumerate(names[:-1])
    ]
    numbered = [leaf(n, "mlp", 10, f"trunk/{i}", blocks=names) for i, n in enumerate(names[:-1])]
    rows = shown(plan_display.plan_table(plan(by_block, numbered, blocks=names)))
    found = [line.split() for line in rows if line.startswith("trunk")]
    assert found == [
        ["trunk/…", "510", "8.88e-17–0.1", "0", "2,040", "stem", "…", "layer_49"],
        ["trunk/…", "510", "0.1", "0", "2,040", "stem", "…", "layer_49"],
    ]


def test_the_only_group_of_its_kind_keeps_its_number():
    groups = {"layer_1": ("trunk/1/layer_1", 0.5), "head": "head"}
    assert shown(plan_display.plan_table(plan(network(groups))))[5].startswith("trunk/1 ")


def test_names_of_groups_are_not_markup_and_narrow_windows_hold_all():
    group = "trunk/[a-z]+[/red]"
    wide = shown(plan_display.plan_table(plan(network({"layer_0": group, "head": "head"}))))
    assert any(line.startswith(group) for line in wide)
    for show in (plan_display.plan_table, plan_display.plan_tree):
        narrow = shown(show(plan(network({"layer_0": group}), MIXED)), width=44)
        assert max(map(len, narrow)) <= 44
        whole = "".join("".join(narrow).split())
        assert "84,000" in whole and "[a-z]+[/red]" in whole


MIXED = network({("layer_0", "norm"): "trunk", "head": "head"})


def test_scattered_blocks_are_named_as_they_lie():
    groups = {"stem": "trunk", "layer_1": "trunk"}
    lines = shown(plan_display.plan_table(plan(network(groups))))
    assert lines[4].endswith("layer_0, head") and lines[5].endswith("stem, layer_1")
    names = tuple(f"b{i}" for i in range(12))
    every_other = [
        leaf(n, "mlp", 10, ("frozen", "trunk")[i % 2], blocks=names) for i, n in enumerate(names)
    ]
    lines = shown(plan_display.plan_table(plan(every_other, blocks=names)))
    assert lines[5].endswith("6 blocks between b1 and b11")


def test_pull_has_a_column_where_there_is_any():
    leaves = [
        leaf("stem", "convolution", 10, "trunk", weight_decay=0.01, pull_toward_start=0.5),
        leaf("stem", "norm", 10, "trunk"),
        leaf("head", "head", 10, "head"),
    ]
    lines = shown(plan_display.plan_table(plan(leaves)))
    assert lines[2].split()[:5] == ["group", "parameters", "rate", "decay", "pull"]
    assert lines[4].split()[:5] == ["trunk", "20", "0.1", "0.01", "0.5"]
    assert lines[5].split()[:5] == ["head", "10", "0.1", "0", "–"]
    assert "Weight decay acts on kernels only." in lines
    assert "Pull: decay toward the value that training started from." in lines
    assert "Weight decay acts on kernels only." not in shown(plan_display.plan_table(plan(PROBE)))


def test_batch_norm_and_notes():
    statistics = {"moving_statistics": ["a", "b"], "frozen_statistics": ["c"]}
    fields = {"notes": ["nothing [b] to fear"], **statistics}
    lines = shown(plan_display.plan_table(plan(PROBE, batch_norm="batch", **fields)))
    policy = "BatchNorm statistics (freeze.batch_norm={}): 2 {}, 1 stay frozen."
    assert policy.format("batch", "move with the batch") in lines
    assert lines[-1] == "Note: nothing [b] to fear"
    lines = shown(plan_display.plan_table(plan(PROBE, batch_norm="reestimate", **fields)))
    assert policy.format("reestimate", "are measured anew") in lines
    own = {"batch_norm": "batch", "moving_statistics": ["a"]}
    lines = shown(plan_display.plan_table(plan(PROBE, (FULL, own))))
    assert not any("1 BatchNorm" in line for line in lines[:7])
    assert "stem; 1 BatchNorm statistics move" in " ".join(lines)
    still = plan(PROBE, trunk="random", frozen_statistics=["c"])
    assert any("a weak control" in line for line in shown(plan_display.plan_table(still)))


# The tree.


def test_the_map_goes_from_groups_to_blocks_to_kinds():
    groups = {"layer_0": ("trunk", 0.5), "layer_1": ("trunk", 0.5), "head": "head"}
    lines = shown(plan_display.plan_tree(plan(network(groups))))
    assert lines[1:14] == [
        "5 blocks, 197,898 parameters; in brackets the fraction of depth, 0 in the stem and 1 in "
        "the head",
        "├── frozen: 9,408 parameters",
        "│   └── stem [0]: 9,408",
        "│       ├── convolution 9,400",
        "│       └── norm 8",
        "├── trunk: 168,000 parameters",
        "│   └── layer_0 … layer_1 (2 blocks) [0.25–0.5]: 168,000",
        "│       ├── convolution 160,000, rate × 0.5",
        "│       └── norm 8,000, rate × 0.5",
        "└── head: 20,490 parameters",
        "    └── head [1]: head 20,490, rate × 1",
        "",
        "data      tfds:sample, 10 classes",
    ]


def test_the_map_says_when_a_group_trains_and_how_fast_in_any_phase():
    slow = network(dict.fromkeys(TRUNK, ("trunk", 0.1)) | {"head": ("head", 0.2)})
    lines = shown(plan_display.plan_tree(plan(PROBE, MIXED, slow)))
    assert "├── trunk: 173,408 parameters, trains in phase 3" in lines
    assert "├── trunk: 4,000 parameters, trains in phases 2 to 3" in lines
    assert "│   └── layer_0 [0.25]: norm 4,000, rate × 0.1–1" in lines
    assert "└── head: 20,490 parameters, trains in all phases" in lines
    assert "    └── head [1]: head 20,490, rate × 0.2–1" in lines
    lines = shown(plan_display.plan_tree(plan(FULL, PROBE, FULL)))
    assert "├── trunk: 177,408 parameters, trains in phases 1, 3" in lines
    assert "├── frozen: 177,408 parameters, throughout" in shown(
        plan_display.plan_tree(plan(PROBE, PROBE))
    )


def test_biases_of_norms_are_called_so():
    bias = {"kinds": ["norm", "bias"], "path": "stem/norm/bias"}
    leaves = [leaf("stem", "norm", 8, "trunk", **bias), leaf("stem", "norm", 8)]
    lines = shown(plan_display.plan_tree(plan(leaves)))
    assert "│   └── stem [0]: norm 8" in lines
    assert "    └── stem [0]: norm biases 8, rate × 1" in lines


def test_a_deep_network_stays_readable():
    names = ("stem", *(f"layer_{i}" for i in range(150)), "head")
    leaves = [
        leaf(n, kind, 10 if kind == "mlp" else 2, group, blocks=names)
        for n in names
        for kind, group in (("mlp", "frozen"), ("adapter", "adapter"))
    ]
    assert len(shown(plan_display.plan_tree(plan(leaves, blocks=names)))) < 15


# What would run.


@pytest.mark.parametrize(
    ("phase", "fields", "expected"),
    [
        ({}, {}, ["schedule  sgd, learning rate 0.1 to 0 (cosine), no warm-up"]),
        (
            {"schedule": "constant", "warmup_steps": 1, "optimizer": "adamw"},
            {"interpolate": [0.0, 0.5]},
            [
                "schedule    adamw, learning rate 0.1 (constant), warm-up of 1 step",
                "afterwards  weights between phase 1 (0) and phase 1 (1) are evaluated at 0, 0.5",
            ],
        ),
        (
            {"schedule": "linear", "warmup_steps": 1_500},
            {"adapters": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["mlp"]}},
            [
                "schedule  sgd, learning rate 0.1 to 0 (linear), warm-up of 1,500 steps",
                "adapters  rank 4, alpha 8, dropout 0.1, at mlp",
            ],
        ),
    ],
)
def test_schedule_and_what_goes_with_it(phase, fields, expected):
    lines = shown(plan_display.plan_tree(plan((PROBE, phase), **fields)))
    assert lines[-len(expected) :] == expected


def test_data_and_length():
    lines = shown(plan_display.plan_tree(plan(PROBE)))
    assert lines[-4:-1] == [
        "data      tfds:sample, 10 classes",
        "train     6,400 examples (train[:90%])",
        "training  2 epochs × 100 steps of 64 examples = 200 steps",
    ]


def test_schedules_of_phases():
    two = (PROBE, (FULL, {"learning_rate": 0.01}))
    assert shown(plan_display.plan_tree(plan(*two)))[-2:] == [
        "phase 1   sgd, learning rate 0.1 to 0 (cosine), no warm-up",
        "phase 2   sgd, learning rate 0.01 to 0 (cosine), no warm-up",
    ]
    assert shown(plan_display.plan_tree(plan(PROBE, FULL, one_schedule=True)))[-1] == (
        "schedule  sgd, learning rate 0.1 to 0 (cosine), no warm-up, over all phases"
    )
    assert shown(plan_display.plan_tree(plan(*two, one_schedule=True)))[-1] == (
        "phase 2   sgd, learning rate 0.01 to 0 (cosine), no warm-up, over all phases"
    )


# The plan of a real job.


def test_a_job_describes_what_would_run(digits_config):
    fields = {"freeze.strategy": "wise_ft", "optimizer.warmup": "50%"}
    found = job.prepare(digits_config("resnet_bottleneck", **fields)).describe_plan()
    first, second = found["phases"]
    assert (first["name"], first["first_step"], first["last_step"]) == ("linear_probe", 1, 3)
    assert (second["name"], second["first_step"], second["last_step"]) == ("full", 4, 6)
    assert (first["epochs"], second["epochs"], found["epochs"]) == (1.0, 1.0, 2)
    assert (first["warmup_steps"], found["steps_per_epoch"], found["batch_size"]) == (2, 3, 64)
    assert "name" not in found and found["interpolate"][0] == 0.0 and not found["one_schedule"]
    assert found["data"]["splits"] == {
        "train": {"split": "train[:192]", "examples": 192},
        "validation": {"split": "train[192:300]", "examples": 108},
        "test": {"split": "test[:130]", "examples": 130},
    }
    lines = shown(plan_display.plan_table(found)) + shown(plan_display.plan_tree(found))
    assert "validation  108 examples (train[192:300])" in lines
    assert any(line.startswith("Phase 2 of 2, full: 1 epoch (steps 4 to 6)") for line in lines)
