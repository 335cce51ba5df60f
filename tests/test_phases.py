"""What each strategy moves, what passes from phase to phase, and what each step costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax import costs, job, load_pretrained, lora, losses, optimizer, parallel, param_tree
from tl_jax import phases as phases_lib
from tl_jax import stages as stages_lib
from tl_jax import train_step as steps
from tl_jax.models.layers import Head
from tl_jax.recipes import HEAD, Phase, Recipe, train
from tl_jax.strategies import STRATEGIES

NETWORKS = ("resnet_basic", "vit_plain")
HARD = {  # everything on that could move more than it should
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.1,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 0.01,
    "train.gradient_clip_norm": 1.0,
    "train.label_smoothing": 0.1,
    "model.dtype": "bfloat16",
}


def batch(seed, count=16):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32),
        "index": np.arange(count, dtype=np.int32),
    }


class Phases:
    """The phases of a configuration, three steps each, without data."""

    def __init__(self, config):
        loaded = load_pretrained(
            config.model.pretrained,
            10,
            head=Head(init=config.head.init),
            dtype=jnp.dtype(config.model.dtype),
        )
        recipe, plans, self.pretrained = job.resolve_plans(config, loaded)
        self.stages = phases_lib.stages_of(config, recipe, plans, steps_per_epoch=3 * len(plans))
        self.config, self.recipe = config, recipe
        self.start = self.pretrained.variables

    def step(self, stage, axis_name=None, preprocess=None, micro_batches=1):
        module = self.pretrained.module.clone(axis_name=axis_name)
        train_step = steps.make_train_step(
            steps.make_loss(module, stage.plan, self.config.train.label_smoothing),
            stage.optimizer,
            preprocess
            or (lambda batch, keys: self.pretrained.preprocessing.device(batch["image"])),
            micro_batches=micro_batches,
            axis_name=axis_name,
        )
        rates = stage.schedule(np.arange(stage.last))

        def step(state, frozen, batch):
            hyper = steps.Hyper(np.uint32(3), jnp.asarray(rates)[state.step])
            return train_step(state, frozen, hyper, batch)

        return step

    def run(self, kind=None, micro_batches=1):
        """Variables before and after each phase, on 8 devices where a kind is named."""
        devices = parallel.DataParallel(kind) if kind else None
        state, frozen = stages_lib.begin(self, self.start)
        for number, stage in enumerate(self.stages):
            if number:
                state, frozen = stages_lib.follow(self, number, state, frozen, self.start["params"])
            before = host(state, frozen)
            if devices is None:
                step = jax.jit(self.step(stage, micro_batches=micro_batches))
            else:
                state, frozen = devices.replicate((state, frozen))
                compiled = devices.compile(
                    self.step(stage, parallel.AXIS), arguments=2, donate=True
                )

                def step(state, frozen, batch, compiled=compiled):
                    return compiled(state, frozen, devices.shard(batch))

            for seed in range(3):
                state, metrics = step(state, frozen, batch(seed))
            assert np.isfinite(metrics["loss"])
            yield stage.plan, before, host(state, frozen)


def host(state, frozen):
    variables = steps.variables_of(state.trainable, state.statistics, frozen)
    return {path: np.asarray(leaf) for path, leaf in param_tree.flatten(variables).items()}


def moved(before, after):
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def check_what_moved(phases, kind=None, micro_batches=1):
    for number, (plan, before, after) in enumerate(phases.run(kind, micro_batches)):
        expected = {f"params/{path}" for path in plan.groups if plan.trains(path)}
        expected |= {f"batch_stats/{path}" for path in plan.statistics}
        assert moved(before, after) == expected, (number, plan.phase)
        assert all(after[path].dtype == before[path].dtype for path in before)


# Their labels are those of others, by tests/test_strategies.py.
SAME = {"wise_ft", "patterns", "discriminative", "random_trunk"}
# With batch_norm=batch where a block trains that has one.
BATCH = {"full", "top_k", "lp_ft", "gradual_unfreezing", "surgical", "norm_only", "bitfit"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - SAME))
def test_exactly_the_trainable_moves(digits_config, strategy, name):
    fields = {**HARD, "freeze.strategy": strategy}
    if strategy == "gradual_unfreezing":
        fields["freeze.groups"] = 2
    if strategy in BATCH and name.startswith("resnet"):
        fields["freeze.batch_norm"] = "batch"
    check_what_moved(Phases(digits_config(name, **fields)), micro_batches=2)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("lp_ft", "vit_plain"),
        ("bitfit", "vit_plain"),
        ("lora", "resnet_basic"),
        ("l2_sp", "vit_plain"),
        ("surgical", "resnet_basic"),
    ],
)
def test_exactly_the_trainable_moves_on_eight_devices(digits_config, strategy, name):
    fields = {**HARD, "freeze.strategy": strategy}
    check_what_moved(Phases(digits_config(name, **fields)), kind="pmap")


@pytest.mark.parametrize(
    ("strategy", "policy"),
    [("linear_probe", "stats_only"), ("top_k", "batch")],
)
@pytest.mark.parametrize("kind", [None, "pmap"])
def test_statistics_move_as_the_policy_says(digits_config, strategy, policy, kind):
    fields = {**HARD, "freeze.strategy": strategy, "freeze.batch_norm": policy}
    phases = Phases(digits_config("resnet_basic", **fields))
    everything = set(param_tree.flatten(phases.start["batch_stats"]))
    (plan,) = [stage.plan for stage in phases.stages]
    upper = {path for path in everything if "stages_1" in path}
    assert plan.statistics == (everything if policy == "stats_only" else upper)
    check_what_moved(phases, kind)


def test_a_frozen_prefix_moves_its_statistics_once_a_step(digits_config):
    """stats_only: each step moves every statistic by 0.1 of its way to the batch's."""
    fields = {"freeze.batch_norm": "stats_only", "optimizer.momentum": 0.0}
    phases = Phases(digits_config("resnet_bottleneck", **fields))
    state, frozen = stages_lib.begin(phases, phases.start)
    images = phases.pretrained.preprocessing.device(batch(0)["image"])
    blocks = range(len(phases.pretrained.blocks))
    _, once = phases.pretrained.module.apply(
        phases.start, images, batch_norm=blocks, mutable=["batch_stats"]
    )
    state, _ = jax.jit(phases.step(phases.stages[0]))(state, frozen, batch(0))
    for a, b in zip(
        jax.tree.leaves(state.statistics), jax.tree.leaves(once["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Phases: the optimizer's state


def adam_of(state):
    """Adam's moments by path, and its counter by path."""
    moments, counts = {}, {}
    groups = state.optimizer if hasattr(state.optimizer, "inner_states") else state.optimizer[-1]
    for label, inner in groups.inner_states.items():
        adam = next(s for s in inner.inner_state if isinstance(s, optax.ScaleByAdamState))
        leaves = jax.tree.map(
            lambda x: x, adam.mu, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
        )
        for path, leaf in param_tree.flatten(leaves).items():
            if not isinstance(leaf, optax.MaskedNode):
                moments[path] = np.asarray(leaf)
                counts[path] = (label, int(adam.count))
    return moments, counts


@pytest.mark.parametrize("strategy", ["lp_ft", "gradual_unfreezing"])
def test_moments_survive_and_what_is_new_starts_afresh(digits_config, strategy):
    fields = {"optimizer.name": "adam", "freeze.strategy": strategy, "train.epochs": 1}
    phases = Phases(digits_config("vit_plain", **fields))  # clipped from the second phase on
    state, frozen = stages_lib.begin(phases, phases.start)
    for number, stage in enumerate(phases.stages):
        if number:
            old, _ = adam_of(state)
            state, frozen = stages_lib.follow(phases, number, state, frozen, phases.start["params"])
            moments, counts = adam_of(state)
            assert int(state.step) == 3 * number
            for path, entry in stage.plan.entries.items():
                assert counts[path][1] == 3 * (number - entry)
                if entry == number:
                    assert path not in old and not moments[path].any()
                else:
                    np.testing.assert_array_equal(moments[path], old[path])
        step = jax.jit(phases.step(stage))
        for seed in range(3):
            state, _ = step(state, frozen, batch(seed))
        _, counts = adam_of(state)
        assert all(
            counts[path][1] == 3 * (number - entry + 1)
            for path, entry in stage.plan.entries.items()
        )


@pytest.mark.parametrize(
    ("phases", "kept"),
    [
        ([{"name": "adam"}, {"name": "adamw", "weight_decay": 0.1}], ["mu", "nu", "count"]),
        ([{"weight_decay": 0.1}, {"weight_decay": 0.0}], ["trace"]),
        ([{"name": "sgd"}, {"name": "adam"}], []),
        ([{}, {"momentum": 0.5}], ["trace"]),
    ],
)
def test_what_the_optimizers_of_two_phases_share_is_carried_over(digits_config, phases, kept):
    fields = {"freeze.strategy": "lp_ft", "freeze.phases": phases}
    phases = Phases(digits_config("vit_plain", **fields))
    state, frozen = stages_lib.begin(phases, phases.start)
    marked = jax.tree.map(lambda x: jnp.full_like(x, 7), state.optimizer)
    state, _ = stages_lib.follow(
        phases, 1, state._replace(optimizer=marked), frozen, phases.start["params"]
    )
    sevens = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        if (np.asarray(leaf) == 7).all():
            names = [str(getattr(key, "name", "")) for key in keys]
            sevens |= {name for name in names if name in ("mu", "nu", "count", "trace")}
    assert sevens == set(kept)


def norms_then_head(network):
    """First the norms, then the head alone."""
    return Recipe([Phase("norms", [train("norm")]), Phase("head", [train("head", HEAD)])])


def test_what_an_earlier_phase_changed_and_a_later_one_freezes_is_kept(digits_config, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "norms_then_head", norms_then_head)
    fields = {
        "freeze.strategy": "norms_then_head",
        "freeze.batch_norm": "batch",
        "head.init": "normal",  # through a head of zeros no gradient reaches the norms
    }
    phases = Phases(digits_config("resnet_bottleneck", **fields))
    (_, first, middle), (_, again, last) = phases.run()
    assert moved(first, middle) >= {"params/resnet/embedder/embedder/normalization/bias"}
    assert moved(middle, again) == set()
    assert moved(again, last) == {"params/classifier_1/kernel", "params/classifier_1/bias"}
    # And a checkpoint of the second phase brings it back.
    state, frozen = stages_lib.begin(phases, phases.start)
    step = jax.jit(phases.step(phases.stages[0]))
    state, _ = step(state, frozen, batch(0))
    state, frozen = stages_lib.follow(phases, 1, state, frozen, phases.start["params"])
    kept = stages_lib.kept(phases, 1, state, frozen)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(
        lambda leaf: leaf.shape, stages_lib.shapes(phases, 1, phases.start)
    )
    restored = stages_lib.resume(phases, 1, kept, phases.start)
    assert moved(host(*restored), host(state, frozen)) == set()


# L2-SP


def test_l2_sp_is_the_gradient_of_its_penalty(digits_config):
    fields = {
        "freeze.strategy": "l2_sp",
        "freeze.alpha": 0.3,
        "freeze.beta": 0.2,
        "optimizer.momentum": 0.0,
        "optimizer.learning_rate": 0.1,
        "optimizer.schedule": "constant",
        "train.gradient_clip_norm": 0.0,
    }
    phases = Phases(digits_config("vit_plain", **fields))
    start, module = phases.start["params"], phases.pretrained.module
    example = batch(0)
    images = phases.pretrained.preprocessing.device(example["image"])

    def objective(params):
        logits = module.apply({"params": params}, images)
        flat, origin = param_tree.flatten(params), param_tree.flatten(start)
        pull = sum(
            ((leaf - origin[path]) ** 2).sum()
            for path, leaf in flat.items()
            if not path.startswith("classifier")
        )
        decay = sum((x**2).sum() for path, x in flat.items() if path.startswith("classifier"))
        return losses.cross_entropy(logits, example["label"]).mean() + 0.15 * pull + 0.1 * decay

    expected = start
    for _ in range(3):
        gradient = jax.jit(jax.grad(objective))(expected)
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, expected, gradient)
    state, frozen = stages_lib.begin(phases, phases.start)
    step = jax.jit(phases.step(phases.stages[0]))
    for _ in range(3):
        state, _ = step(state, frozen, example)
    for path, leaf in param_tree.flatten(state.trainable).items():
        np.testing.assert_allclose(
            leaf, param_tree.flatten(expected)[path], rtol=1e-4, atol=1e-5, err_msg=path
        )


def test_decoupled_l2_sp_shrinks_the_distance_beside_the_gradient(digits_config):
    fields = {
        "freeze.strategy": "l2_sp",
        "freeze.alpha": 0.3,
        "freeze.decoupled": True,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 0.1,
        "optimizer.schedule": "constant",
        "train.gradient_clip_norm": 0.0,
    }
    phases = Phases(digits_config("vit_plain", **fields))
    (stage,) = phases.stages
    params = phases.start["params"]
    away = jax.tree.map(lambda w: w + 0.5, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = stage.optimizer.update(
        zeros, stage.optimizer.init(params), away, rate=stage.config.learning_rate, start=params
    )
    for path, change in param_tree.flatten(updates).items():
        expected = -0.1 * (0.01 * param_tree.flatten(away)[path])
        if not path.startswith("classifier"):
            expected = np.full(change.shape, -0.1 * 0.3 * 0.5)
        np.testing.assert_allclose(change, expected, rtol=1e-3, atol=1e-8, err_msg=path)


# LoRA


def randomised(phases):
    """The variables with adapters that do something."""
    flat = param_tree.flatten(phases.start["params"])
    keys = jax.random.split(jax.random.key(0), len(flat))
    drawn = {
        path: 0.1 * jax.random.normal(key, leaf.shape) if path.startswith("lora/") else leaf
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return {**phases.start, "params": param_tree.unflatten(drawn)}


TARGETS = {
    "vit_plain": [None, ["mlp", "attention"], ["stem"]],
    "resnet_bottleneck": [["stages.1"]],
    "resnet_early_stride": [None],
}


@pytest.mark.parametrize(
    ("name", "targets"), [(name, t) for name, found in TARGETS.items() for t in found]
)
def test_adapters_and_their_merged_kernels_compute_the_same(digits_config, name, targets):
    fields = {"freeze.strategy": "lora", "freeze.rank": 3, "freeze.alpha": 5.0}
    if targets:
        fields["freeze.targets"] = targets
    phases = Phases(digits_config(name, **fields))
    plain = load_pretrained(phases.config.model.pretrained, 10)
    shape = (4, *plain.family.example_shape(plain.config)[1:])
    images = jax.random.normal(jax.random.key(1), shape)
    module, settings = plain.module, phases.recipe.adapters

    def features(variables):
        with lora.applied(settings, variables["params"]):
            return module.apply(variables, images, last=-1)

    expected = module.apply(plain.variables, images, last=-1)
    np.testing.assert_array_equal(features(phases.start), expected)  # B is zero
    drawn = randomised(phases)
    unmerged, merged = features(drawn), module.apply(lora.merge(settings, drawn), images, last=-1)
    assert np.abs(unmerged - expected).max() > 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(merged, unmerged, rtol=0, atol=1e-5 * np.abs(expected).max())
    shapes = jax.tree.map(jnp.shape, lora.merge(settings, drawn))
    assert shapes == jax.tree.map(jnp.shape, plain.variables)


def test_adapter_dropout_belongs_to_the_example(digits_config):
    fields = {"freeze.strategy": "lora", "freeze.dropout": 0.5}
    phases = Phases(digits_config("vit_plain", **fields))
    drawn, images = randomised(phases), batch(0, 4)["image"]
    images = phases.pretrained.preprocessing.device(images)
    keys = jax.random.split(jax.random.key(7), 4)

    def features(images, keys):
        with lora.applied(phases.recipe.adapters, drawn["params"], keys):
            return phases.pretrained.module.apply(drawn, images, last=-1)

    whole = features(images, keys)
    parts = [features(images[i : i + 2], keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-6)
    assert np.abs(whole - features(images, None)).max() > 1e-3


# Costs, on networks large enough that elementwise work does not show

LARGE = {
    "resnet": {
        "model_type": "resnet",
        "depths": [2, 2],
        "hidden_sizes": [512, 1024],
        "embedding_size": 64,
        "layer_type": "bottleneck",
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 64,
        "patch_size": 16,
    },
}


AS_DEAR_AS_FULL = {"from_scratch", "layer_decay", "l2_sp"}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Folders of two networks with random weights."""
    from golden import networks

    from tl_jax import models

    found = {}
    for name, config in LARGE.items():
        family = models.family_of(config, name)
        shapes = models.variable_shapes(family.module(config, 3), family.example_shape(config))
        folder = tmp_path_factory.mktemp(name)
        tensors = {}
        for path, leaf in param_tree.flatten(shapes).items():
            key, shape = torch_name(path), leaf.shape
            shape = shape[::-1] if len(shape) == 2 else shape
            shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
            tensors[key] = list(shape)
        networks.write_folder(folder, {**config, "num_labels": 3}, tensors, seed=name)
        found[name] = str(folder)
    return found


def torch_name(path):
    import re

    from tl_jax.weight_conversion import TORCH_NAMES

    module, _, leaf = path.partition("/")[2].rpartition("/")
    module = re.sub(r"_(\d+)(?=/|$)", r".\1", module).replace("/", ".")
    return f"{module}.{TORCH_NAMES.get(leaf, leaf)}"


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - SAME - AS_DEAR_AS_FULL))
def test_a_step_costs_what_its_gradients_cost(digits_config, large, strategy, name):
    config = digits_config(
        "vit_plain", **{"model.pretrained": large[name], "freeze.strategy": strategy}
    )
    phases = Phases(config)
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((8,), jnp.int32)
    module = phases.pretrained.module
    forward = costs.lowered_flops(module.apply, plain(phases.start), images)
    for stage in {id(stage): stage for stage in (phases.stages[0], phases.stages[-1])}.values():
        state, frozen = jax.eval_shape(
            lambda v, stage=stage: steps.divide(stage.plan, v, stage.optimizer), phases.start
        )
        loss = steps.make_loss(module, stage.plan)
        example = {"image": images, "label": labels, "index": labels}
        step = phases.step(stage, preprocess=lambda batch, keys: batch["image"])
        compiled = costs.compiled_flops(step, state, frozen, example)
        least = costs.minimum_flops(
            lambda *args, loss=loss: loss(*args, None)[0],
            *(state.trainable, state.statistics, frozen, images, labels),
        )
        assert compiled <= 1.05 * least, (stage.plan.phase, compiled / least)
        if strategy == "lora":
            adapters = adapter_flops(phases, 8)
            assert compiled <= 2 * forward + 3 * adapters + 0.03 * forward


def plain(variables):
    return {**variables, "params": {k: v for k, v in variables["params"].items() if k != "lora"}}


def adapter_flops(phases, count):
    """Forward FLOPs of the adapters alone: what the forward pass costs more with them."""
    images = jnp.zeros((count, 64, 64, 3))
    module, settings = phases.pretrained.module, phases.recipe.adapters

    def adapted(variables, images):
        with lora.applied(settings, variables["params"]):
            return module.apply(variables, images)

    with_them = costs.lowered_flops(adapted, phases.start, images)
    return with_them - costs.lowered_flops(module.apply, plain(phases.start), images)


def test_labels_name_the_phase_of_entry(digits_config):
    phases = Phases(digits_config("vit_plain", **{"freeze.strategy": "lp_ft"}))
    found = optimizer.labels(phases.stages[1].plan)
    assert found["classifier/kernel"] == "head"
    assert found["vit/layernorm/bias"] == "trunk since phase 1"
