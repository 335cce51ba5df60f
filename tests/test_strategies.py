"""Each strategy on a bottleneck ResNet, a basic ResNet and a ViT: exactly what its paper says."""

import re

import pytest

from tl_jax import config_files, job, load_pretrained, param_tree, phases
from tl_jax.errors import UserError
from tl_jax.strategies import STRATEGIES


def conv_norm(path, window, inputs, outputs):
    """Sizes of a convolution without bias and of the BatchNorm behind it."""
    return {
        f"{path}/convolution/kernel": window * window * inputs * outputs,
        f"{path}/normalization/scale": outputs,
        f"{path}/normalization/bias": outputs,
    }


def bottleneck(path, inputs, outputs):
    inner = outputs // 4
    layers = conv_norm(f"{path}/layer_0", 1, inputs, inner)
    layers |= conv_norm(f"{path}/layer_1", 3, inner, inner)
    return layers | conv_norm(f"{path}/layer_2", 1, inner, outputs)


def basic(path, inputs, outputs):
    layers = conv_norm(f"{path}/layer_0", 3, inputs, outputs)
    return layers | conv_norm(f"{path}/layer_1", 3, outputs, outputs)


def shortcut(path, inputs, outputs):
    return conv_norm(f"{path}/shortcut", 1, inputs, outputs)


def dense(path, inputs, outputs):
    return {f"{path}/kernel": inputs * outputs, f"{path}/bias": outputs}


def layer_norm(path):
    return {f"{path}/scale": 16, f"{path}/bias": 16}


def vit_layer(path):
    attention, output = f"{path}/attention/attention", f"{path}/attention/output/dense"
    projections = {}
    for name in ("query", "key", "value"):
        projections |= dense(f"{attention}/{name}", 16, 16)
    return (
        layer_norm(f"{path}/layernorm_before")
        | projections
        | dense(output, 16, 16)
        | layer_norm(f"{path}/layernorm_after")
        | dense(f"{path}/intermediate/dense", 16, 24)
        | dense(f"{path}/output/dense", 24, 16)
    )


E = "resnet/encoder/"
V = "vit/encoder/"
# The chains of the three networks: each block with its parameters and their sizes.
BOTTLENECK = [
    conv_norm("resnet/embedder/embedder", 7, 3, 8),
    bottleneck(E + "stages_0/layers_0", 8, 16) | shortcut(E + "stages_0/layers_0", 8, 16),
    bottleneck(E + "stages_1/layers_0", 16, 24) | shortcut(E + "stages_1/layers_0", 16, 24),
    bottleneck(E + "stages_1/layers_1", 24, 24),
    bottleneck(E + "stages_2/layers_0", 24, 32) | shortcut(E + "stages_2/layers_0", 24, 32),
    {},
    dense("classifier_1", 32, 10),
]
BASIC = [
    conv_norm("resnet/embedder/embedder", 7, 3, 8),
    basic(E + "stages_0/layers_0", 8, 8),
    basic(E + "stages_0/layers_1", 8, 8),
    basic(E + "stages_1/layers_0", 8, 12) | shortcut(E + "stages_1/layers_0", 8, 12),
    {},
    dense("classifier_1", 12, 10),
]
VIT = [
    {
        "vit/embeddings/cls_token": 16,
        "vit/embeddings/position_embeddings": 17 * 16,
        "vit/embeddings/patch_embeddings/projection/kernel": 8 * 8 * 3 * 16,
        "vit/embeddings/patch_embeddings/projection/bias": 16,
    },
    vit_layer(V + "layer_0"),
    vit_layer(V + "layer_1"),
    layer_norm("vit/layernorm"),
    dense("classifier", 16, 10),
]
NETWORKS = {"resnet_bottleneck": BOTTLENECK, "resnet_basic": BASIC, "vit_plain": VIT}


def blocks(*indices):
    """What whole blocks hold, and the head."""
    return lambda chain: {p for i in {*indices, len(chain) - 1} for p in chain[i]}


def everything(chain):
    return {path for block in chain for path in block}


def matching(pattern):
    """What a regular expression finds, and the head."""
    return lambda chain: {p for p in everything(chain) if re.search(pattern, p)} | set(chain[-1])


def but_first(chain):
    return everything(chain) - set(chain[0])


def same(chain):
    return [1.0] * len(chain)


ATTENTION = r"/attention/"
NORM = r"normalization|layernorm"
# Strategy and its options → by network: the trainable leaves, the boundary, the multiplier of each
# block, and the number of labels, each of which has one counter in Adam's state.
TABLE = [
    ("linear_probe", {}, {
        "resnet_bottleneck": (blocks(), 6, same, 1),
        "resnet_basic": (blocks(), 5, same, 1),
        "vit_plain": (blocks(), 4, same, 1),
    }),
    ("random_trunk", {}, {
        "resnet_bottleneck": (blocks(), 6, same, 1),
        "resnet_basic": (blocks(), 5, same, 1),
        "vit_plain": (blocks(), 4, same, 1),
    }),
    ("full", {}, {name: (everything, 0, same, 2) for name in NETWORKS}),
    ("from_scratch", {}, {name: (everything, 0, same, 2) for name in NETWORKS}),
    ("l2_sp", {}, {name: (everything, 0, same, 2) for name in NETWORKS}),
    ("top_k", {}, {
        "resnet_bottleneck": (blocks(4, 5), 4, same, 2),
        "resnet_basic": (blocks(3, 4), 3, same, 2),
        "vit_plain": (blocks(2, 3), 2, same, 2),
    }),
    ("top_k", {"k": 2}, {
        "resnet_bottleneck": (blocks(3, 4, 5), 3, same, 2),
        "resnet_basic": (blocks(2, 3, 4), 2, same, 2),
        "vit_plain": (blocks(1, 2, 3), 1, same, 2),
    }),
    ("patterns", {}, {
        "resnet_bottleneck": (blocks(), 6, same, 1),
        "resnet_basic": (blocks(), 5, same, 1),
        "vit_plain": (blocks(), 4, same, 1),
    }),
    ("patterns", {"patterns": [["classifier", 2.0], ["", "frozen"]]}, {
        "resnet_bottleneck": (blocks(), 6, lambda chain: [1.0] * 6 + [2.0], 1),
        "resnet_basic": (blocks(), 5, lambda chain: [1.0] * 5 + [2.0], 1),
        "vit_plain": (blocks(), 4, lambda chain: [1.0] * 4 + [2.0], 1),
    }),
    ("layer_decay", {}, {
        "resnet_bottleneck": (
            everything, 0, lambda _: [0.75**5, 0.75**4, 0.75**3, 0.75**2, 0.75, 1.0, 1.0], 6,
        ),
        "resnet_basic": (everything, 0, lambda _: [0.75**4, 0.75**3, 0.75**2, 0.75, 1.0, 1.0], 5),
        "vit_plain": (everything, 0, lambda _: [0.75**3, 0.75**2, 0.75, 1.0, 1.0], 5),
    }),
    ("top_k", {"layer_decay": 0.5}, {
        "resnet_bottleneck": (blocks(4, 5), 4, lambda _: [0, 0, 0, 0, 0.5, 1.0, 1.0], 2),
        "resnet_basic": (blocks(3, 4), 3, lambda _: [0, 0, 0, 0.5, 1.0, 1.0], 2),
        "vit_plain": (blocks(2, 3), 2, lambda _: [0, 0, 0.5, 1.0, 1.0], 3),
    }),
    ("discriminative", {}, {
        "resnet_bottleneck": (
            everything, 0, lambda _: [10 ** (-2 * (6 - i) / 6) for i in range(7)], 6,
        ),
        "resnet_basic": (everything, 0, lambda _: [10 ** (-2 * (5 - i) / 5) for i in range(6)], 5),
        "vit_plain": (everything, 0, lambda _: [0.01, 10**-1.5, 0.1, 10**-0.5, 1.0], 5),
    }),
    ("surgical", {}, {  # the lowest quarter of the depth
        "resnet_bottleneck": (blocks(0, 1), 0, same, 2),
        "resnet_basic": (blocks(0, 1), 0, same, 2),
        "vit_plain": (blocks(0, 1), 0, same, 2),
    }),
    ("surgical", {"first": 1, "last": 2}, {
        name: (blocks(1, 2), 1, same, 2) for name in NETWORKS
    }),
    ("surgical", {"first": "stages_1", "last": "stages_1"}, {
        "resnet_bottleneck": (blocks(2, 3), 2, same, 2),
        "resnet_basic": (blocks(3), 3, same, 2),
    }),
    ("surgical", {"first": 0.5, "last": 0.7}, {
        "resnet_bottleneck": (blocks(3, 4), 3, same, 2),
        "resnet_basic": (blocks(3), 3, same, 2),
        "vit_plain": (blocks(2), 2, same, 2),
    }),
    ("bitfit", {}, {name: (matching(r"/bias$"), 0, same, 2) for name in NETWORKS}),
    ("norm_only", {}, {
        "resnet_bottleneck": (matching(NORM), 0, same, 2),
        "resnet_basic": (matching(NORM), 0, same, 2),
        "vit_plain": (matching(NORM), 1, same, 2),
    }),
    ("attention_only", {}, {
        "resnet_bottleneck": (blocks(), 6, same, 1),
        "resnet_basic": (blocks(), 5, same, 1),
        "vit_plain": (matching(ATTENTION), 1, same, 2),
    }),
    ("freeze_embed", {}, {name: (but_first, 1, same, 2) for name in NETWORKS}),
]  # fmt: skip
CASES = [
    pytest.param(
        network, strategy, options, *row, id=f"{strategy}-{'-'.join(map(str, options))}-{network}"
    )
    for strategy, options, rows in TABLE
    for network, row in rows.items()
]


@pytest.fixture(scope="module")
def pretrained(network):
    return {name: load_pretrained(network(name), 10) for name in NETWORKS}


def resolve(pretrained, strategy, seed=0, **options):
    config = config_files.resolve(
        {
            "model": {"pretrained": "a/b"},
            "data": {"source": "tfds:digits"},
            "optimizer": {"name": "adam"},
            "freeze": {"strategy": strategy, **options},
            "seed": seed,
        }
    )
    recipe, plans, adapted = job.resolve_plans(config, pretrained)
    stages = phases.stages_of(config, recipe, plans, steps_per_epoch=20)
    return recipe, stages, adapted


def description(stage):
    from tl_jax import optimizer

    return optimizer.describe(stage.config, stage.plan, stage.optimizer)


def trained(plan):
    return {path for path in plan.groups if plan.trains(path)}


def test_the_table_has_every_strategy_of_one_phase():
    several = {"lp_ft", "wise_ft", "gradual_unfreezing", "lora"}  # below
    assert {strategy for strategy, *_ in TABLE} == STRATEGIES.keys() - several


@pytest.mark.parametrize("name", NETWORKS)
def test_the_chains_above_are_the_networks(pretrained, name):
    leaves = param_tree.flatten(pretrained[name].variables["params"])
    assert {path: leaf.size for path, leaf in leaves.items()} == {
        path: size for block in NETWORKS[name] for path, size in block.items()
    }


@pytest.mark.parametrize(
    ("name", "strategy", "options", "leaves", "boundary", "multipliers", "labels"), CASES
)
def test_definition(pretrained, name, strategy, options, leaves, boundary, multipliers, labels):
    chain = NETWORKS[name]
    _, (stage,), _ = resolve(pretrained[name], strategy, **options)
    expected = leaves(chain)
    assert trained(stage.plan) == expected
    assert stage.plan.boundary == boundary
    rates = multipliers(chain)
    sizes = {path: size for block in chain for path, size in block.items()}
    found = description(stage)
    for leaf in found["leaves"]:
        rate = rates[leaf["block_index"]] if leaf["path"] in expected else 0.0
        assert leaf["learning_rate_multiplier"] == pytest.approx(rate), leaf["path"]
        moments = 8 * sizes[leaf["path"]] if leaf["path"] in expected else 0
        assert leaf["optimizer_state_bytes"] == moments, leaf["path"]
    total = sum(8 * sizes[path] for path in expected)
    assert found["optimizer_state_bytes"] == total + 4 * labels
    groups = {stage.plan.groups[path].name for path in expected}
    assert len(groups) == labels
    assert {g.name for p, g in stage.plan.groups.items() if p not in expected} <= {"frozen"}


@pytest.mark.parametrize("strategy", ["lp_ft", "wise_ft"])
@pytest.mark.parametrize("name", NETWORKS)
def test_linear_probe_then_full(pretrained, name, strategy):
    chain = NETWORKS[name]
    recipe, (probe, full), _ = resolve(pretrained[name], strategy)
    assert trained(probe.plan) == set(chain[-1])
    assert trained(full.plan) == everything(chain)
    assert (probe.plan.boundary, full.plan.boundary) == (len(chain) - 1, 0)
    assert (probe.first, probe.last, full.first, full.last) == (0, 100, 100, 200)
    assert full.config.learning_rate == pytest.approx(0.1 * probe.config.learning_rate)
    for stage, start in ((probe, 0), (full, 100)):  # a cosine each
        peak = stage.config.learning_rate
        assert float(stage.schedule(start)) == pytest.approx(peak)
        assert float(stage.schedule(start + 50)) == pytest.approx(peak / 2)
    sizes = {path: size for block in chain for path, size in block.items()}
    head = sum(sizes[path] for path in chain[-1])
    assert description(probe)["optimizer_state_bytes"] == 8 * head + 4
    assert description(full)["optimizer_state_bytes"] == 8 * sum(sizes.values()) + 8
    grid = recipe.interpolate
    assert grid == (tuple(i / 10 for i in range(11)) if strategy == "wise_ft" else ())


GRADUAL = {  # which blocks train from each phase on, and the boundary in each
    "resnet_bottleneck": ([[6], [4, 5], [3], [2], [0, 1]], [6, 4, 3, 2, 0]),
    "resnet_basic": ([[5], [3, 4], [2], [1], [0]], [5, 3, 2, 1, 0]),
    "vit_plain": ([[4], [2, 3], [1], [0]], [4, 2, 1, 0]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradual_unfreezing(pretrained, name):
    chain, (added, boundaries) = NETWORKS[name], GRADUAL[name]
    _, stages, _ = resolve(pretrained[name], "gradual_unfreezing")
    assert [stage.plan.boundary for stage in stages] == boundaries
    expected = set()
    for number, stage in enumerate(stages):
        new = {path for index in added[number] for path in chain[index]}
        expected |= new
        assert trained(stage.plan) == expected
        assert {path for path, entry in stage.plan.entries.items() if entry == number} == new
        assert all(stage.plan.groups[path].multiplier == 1.0 for path in expected)
    peak = stages[0].config.learning_rate  # one cosine over all phases
    assert float(stages[-1].schedule(100)) == pytest.approx(peak / 2)


LORA = {  # by network: targets, with inputs (times window) and outputs
    "vit_plain": [
        (f"{V}layer_{i}/attention/{name}", 16, 16, 1)
        for i in (0, 1)
        for name in ("attention/query", "attention/key", "attention/value", "output/dense")
    ],
    "resnet_basic": [
        ("resnet/embedder/embedder/convolution", 3 * 49, 8, 0),
        (E + "stages_0/layers_0/layer_0/convolution", 8 * 9, 8, 0),
        (E + "stages_0/layers_0/layer_1/convolution", 8 * 9, 8, 0),
        (E + "stages_0/layers_1/layer_0/convolution", 8 * 9, 8, 0),
        (E + "stages_0/layers_1/layer_1/convolution", 8 * 9, 8, 0),
        (E + "stages_1/layers_0/layer_0/convolution", 8 * 9, 12, 0),
        (E + "stages_1/layers_0/layer_1/convolution", 12 * 9, 12, 0),
        (E + "stages_1/layers_0/shortcut/convolution", 8, 12, 0),
    ],
}


@pytest.mark.parametrize("name", LORA)
def test_lora(pretrained, name):
    _, (stage,), adapted = resolve(pretrained[name], "lora", rank=2)
    sizes = {}
    for layer, inputs, outputs, _ in LORA[name]:
        sizes |= {f"lora/{layer}/a": inputs * 2, f"lora/{layer}/b": 2 * outputs}
    head = set(NETWORKS[name][-1])
    assert trained(stage.plan) == sizes.keys() | head
    leaves = param_tree.flatten(adapted.variables["params"])
    assert {path: leaves[path].size for path in sizes} == sizes
    assert stage.plan.boundary == LORA[name][0][-1]
    kinds = {leaf["path"]: leaf["kind"] for leaf in description(stage)["leaves"]}
    assert {kinds[path] for path in sizes} == {"adapter"}
    total = 8 * sum(sizes.values()) + 8 * sum(NETWORKS[name][-1].values())
    assert description(stage)["optimizer_state_bytes"] == total + 8


def test_lora_takes_targets_by_kind_and_by_name(pretrained):
    def layers(name, targets):
        _, (stage,), _ = resolve(pretrained[name], "lora", targets=targets)
        return {p.removesuffix("/a") for p in trained(stage.plan) if p.endswith("/a")}

    expected = {f"lora/{V}layer_{i}/{n}/dense" for i in (0, 1) for n in ("intermediate", "output")}
    assert layers("vit_plain", ["mlp"]) == expected
    assert layers("vit_plain", [r"layer\.1.*query"]) == {
        f"lora/{V}layer_1/attention/attention/query"
    }
    assert len(layers("resnet_bottleneck", ["stages.2"])) == 4
    with pytest.raises(
        UserError, match=r"no kernel of 'attention'; it has kernels of .*convolution"
    ):
        layers("resnet_basic", ["attention"])


KINDS = {
    "resnet_basic": {
        "resnet/embedder/embedder/convolution/kernel": ("stem", "convolution"),
        "resnet/embedder/embedder/normalization/bias": ("norm", "stem", "bias"),
        E + "stages_0/layers_0/layer_0/convolution/kernel": ("convolution",),
        E + "stages_0/layers_0/layer_0/normalization/scale": ("norm",),
        "classifier_1/bias": ("head", "bias"),
    },
    "vit_plain": {
        "vit/embeddings/cls_token": ("stem",),
        "vit/embeddings/position_embeddings": ("position", "stem"),
        "vit/embeddings/patch_embeddings/projection/kernel": ("stem", "convolution"),
        V + "layer_0/attention/attention/query/kernel": ("attention",),
        V + "layer_0/attention/output/dense/bias": ("bias", "attention"),
        V + "layer_0/intermediate/dense/kernel": ("mlp",),
        V + "layer_0/output/dense/bias": ("bias", "mlp"),
        V + "layer_0/layernorm_before/scale": ("norm",),
        "vit/layernorm/bias": ("norm", "bias"),
        "classifier/kernel": ("head",),
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(pretrained, name):
    _, (stage,), _ = resolve(pretrained[name], "full")
    found = {p.path: p.kinds for p in stage.plan.parameters}
    assert {path: found[path] for path in KINDS[name]} == KINDS[name]
    top = len(NETWORKS[name]) - 1
    for parameter in stage.plan.parameters:
        index = next(i for i, b in enumerate(NETWORKS[name]) if parameter.path in b)
        assert (parameter.block, parameter.fraction) == (index, index / top)


@pytest.mark.parametrize(
    ("name", "strategy", "options", "part"),
    [
        ("vit_plain", "surgical", {"first": "layer_9"}, "'layer_9' is no block"),
        (
            "vit_plain",
            "surgical",
            {"first": 3, "last": 1},
            "up to last = 1 there is no block",
        ),
        ("vit_plain", "surgical", {"last": 1.5}, "a fraction from 0.0 to 1.0"),
        ("vit_plain", "full", {"batch_norm": "batch"}, "the network has no BatchNorm"),
        ("vit_plain", "full", {"batch_norm": "reestimate"}, "the network has no BatchNorm"),
        ("resnet_basic", "linear_probe", {"batch_norm": "batch"}, "trains none that has BatchNorm"),
        ("resnet_basic", "top_k", {"batch_norm": "stats_only"}, "is for a trunk of frozen weights"),
        ("vit_plain", "lp_ft", {"phases": [{}]}, "has 1 entries; lp_ft has 2 phases"),
        ("vit_plain", "lp_ft", {"phases": [{"epochs": 3}, {"epochs": 4}]}, "3 + 4 = 7 epochs, but"),
        ("vit_plain", "lp_ft", {"phases": [{"epochs": 11}, {}]}, "11 = 11 epochs"),
        (
            "vit_plain",
            "wise_ft",
            {"phases": [{"epochs": 0}, {}]},
            "from a head that means something",
        ),
        ("vit_plain", "discriminative", {"layer_decay": 0.5}, "says itself how the rate falls"),
        ("vit_plain", "gradual_unfreezing", {"phases": [{"warmup": 2}, *[{}] * 3]}, "one schedule"),
        ("vit_plain", "lp_ft", {"phases": [{}, {"warmup": 300}]}, "phases[1].warmup: 300 is 300"),
    ],
)
def test_what_does_not_fit(pretrained, name, strategy, options, part):
    with pytest.raises(UserError, match=re.escape(part)):
        resolve(pretrained[name], strategy, **options)


def test_notes(pretrained):
    def notes(name, strategy, **options):
        return " ".join(resolve(pretrained[name], strategy, **options)[1][0].plan.notes)

    assert "attention: this network has none" in notes("resnet_basic", "attention_only")
    assert notes("vit_plain", "attention_only") == ""
    assert "no layer has a bias but the norms'" in notes("resnet_basic", "bitfit")
    assert notes("vit_plain", "bitfit") == ""
    assert "the trunk's function, change" in notes(
        "resnet_basic", "linear_probe", batch_norm="stats_only"
    )


def test_phases_have_their_own_length_schedule_and_optimizer(pretrained):
    phases = [
        {"epochs": 2.5, "learning_rate": 0.5, "schedule": "constant"},
        {"name": "sgd", "learning_rate": 0.01, "warmup": "1 epoch"},
    ]
    _, (probe, full), _ = resolve(pretrained["vit_plain"], "lp_ft", phases=phases)
    assert (probe.last, full.last) == (50, 200)
    assert float(probe.schedule(49)) == 0.5
    assert full.config.name == "sgd" and full.config.learning_rate == 0.01
    assert float(full.schedule(50)) == pytest.approx(0.01 / 20)
    assert float(full.schedule(69)) == pytest.approx(0.01)
