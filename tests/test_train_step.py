"""The step: what it moves, what it costs, and that it is the same on any number of devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import costs, job, load_pretrained, optimizer, parallel, param_tree
from tl_jax import train_step as steps
from tl_jax.step_cost import step_cost

SHAPE = (32, 32, 3)


def images_and_labels(count, seed=0, classes=10):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, *SHAPE), np.uint8),
        "label": rng.integers(0, classes, count).astype(np.int32),
        "index": np.arange(count, dtype=np.int32) + 7,
    }


def build(config, axis_name=None, micro_batches=1):
    pretrained = load_pretrained(config.model.pretrained, 10, dtype=jnp.dtype(config.model.dtype))
    _, (plan, *_), pretrained = job.resolve_plans(config, pretrained)
    update = optimizer.make_optimizer(
        config.optimizer,
        plan,
        config.train.gradient_clip_norm or 0.0,
    )
    module = pretrained.module.clone(axis_name=axis_name)
    train_step = steps.make_train_step(
        steps.make_loss(module, plan, config.train.label_smoothing),
        update,
        lambda batch, keys: pretrained.preprocessing.device(batch["image"]),
        micro_batches=micro_batches,
        axis_name=axis_name,
    )
    hyper = steps.Hyper(np.uint32(3), np.float32(config.optimizer.learning_rate))

    def step(state, frozen, batch):
        return train_step(state, frozen, hyper, batch)

    state, frozen = steps.divide(plan, pretrained.variables, update)
    return plan, step, state, frozen, pretrained


def run_single(config, batches, **options):
    _plan, step, state, frozen, _ = build(config, **options)
    for batch in batches:
        state, metrics = jax.jit(step)(state, frozen, batch)
    return state, metrics


def run_parallel(config, batches, kind):
    _plan, step, state, frozen, _ = build(config, parallel.AXIS)
    devices = parallel.DataParallel(kind)
    state, frozen = devices.replicate((state, frozen))
    compiled = devices.compile(step, arguments=2, donate=True)
    for batch in batches:
        state, metrics = compiled(state, frozen, devices.shard(batch))
    assert len(jax.tree.leaves(state)[0].addressable_shards) == 8
    assert parallel.replicas_agree(state)
    return state, metrics


VARIANTS = {
    "probe": ("resnet_bottleneck", {}),
    "batch_norm": (
        "resnet_bottleneck",
        {"freeze.strategy": "top_k", "freeze.batch_norm": "batch", "optimizer.momentum": 0.5},
    ),
    "dropout": (
        "vit_smaller",
        {"freeze.strategy": "full", "optimizer.name": "sgd", "train.gradient_clip_norm": 0.1},
    ),
}


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_devices_equal_one(digits_config, variant, kind):
    name, fields = VARIANTS[variant]
    fields = {**fields, "optimizer.learning_rate": 0.01}
    config = digits_config(name, **fields)
    batches = [images_and_labels(16, seed) for seed in range(3)]
    one, one_metrics = run_single(config, batches)
    many, many_metrics = run_parallel(config, batches, kind)
    for path, leaf in param_tree.flatten(one.trainable).items():
        other = param_tree.flatten(many.trainable)[path]
        np.testing.assert_allclose(other, leaf, rtol=1e-4, atol=2e-6, err_msg=path)
    for a, b in zip(jax.tree.leaves(one.statistics), jax.tree.leaves(many.statistics), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    assert one_metrics.keys() == many_metrics.keys()
    assert one_metrics.keys() == {"objective", "loss", "accuracy", "gradient_norm"}
    for key, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[key], value, rtol=1e-4, err_msg=key)


def test_steps_compile_once_and_donate(digits_config):
    config = digits_config("resnet_bottleneck")
    for kind in ("pmap", "shard_map"):
        _plan, step, state, frozen, pretrained = build(config, parallel.AXIS)
        traces = []
        devices = parallel.DataParallel(kind)

        def counted(*args, traces=traces, step=step):
            traces.append(1)
            return step(*args)

        compiled = devices.compile(counted, arguments=2, donate=True)
        now, still = devices.replicate((state, frozen))
        before = jax.tree.leaves(now.trainable)
        for seed in range(3):
            now, _ = compiled(now, still, devices.shard(images_and_labels(16, seed)))
        assert len(traces) == 1
        assert all(leaf.is_deleted() for leaf in before)
        kept = jax.tree.leaves((still, pretrained.variables))
        assert not any(leaf.is_deleted() for leaf in kept)


def test_accumulated_gradients_are_those_of_the_whole_batch(digits_config):
    config = digits_config("vit_plain", **{"freeze.strategy": "full"})
    batches = [images_and_labels(16, seed) for seed in range(2)]
    whole, whole_metrics = run_single(config, batches)
    parts, parts_metrics = run_single(config, batches, micro_batches=4)
    for a, b in zip(
        jax.tree.leaves(whole.trainable), jax.tree.leaves(parts.trainable), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    for key in whole_metrics:
        np.testing.assert_allclose(parts_metrics[key], whole_metrics[key], rtol=1e-4)


MOVERS = {
    "probe": {},
    "top_k": {"freeze.strategy": "top_k", "freeze.batch_norm": "batch"},
    "patterns": {
        "freeze.strategy": "patterns",
        "freeze.patterns": [["classifier|stages_1.*convolution", "train"], ["", "frozen"]],
    },
    "full": {"freeze.strategy": "full"},
}


@pytest.mark.parametrize("strategy", MOVERS)
def test_exactly_the_trainable_moves(digits_config, strategy):
    """With everything on that could move more: decay, clipping, accumulation, bfloat16."""
    config = digits_config(
        "resnet_bottleneck",
        **MOVERS[strategy],
        **{
            "optimizer.name": "adamw",
            "optimizer.weight_decay": 0.1,
            "train.gradient_clip_norm": 1.0,
            "train.label_smoothing": 0.1,
            "model.dtype": "bfloat16",
        },
    )
    plan, step, state, frozen, pretrained = build(config, micro_batches=2)
    for seed in range(3):  # the head is zero at first, so the trunk moves from the second step on
        state, metrics = jax.jit(step)(state, frozen, images_and_labels(16, seed))
    assert np.isfinite(metrics["loss"])
    after = param_tree.flatten(steps.variables_of(state.trainable, state.statistics, frozen))
    before = param_tree.flatten(pretrained.variables)
    moved = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    expected = {f"params/{path}" for path in plan.groups if plan.trains(path)}
    expected |= {f"batch_stats/{path}" for path in plan.statistics}
    assert moved == expected
    assert all(after[path].dtype == before[path].dtype for path in before)


def cost_of(config):
    """FLOPs of the compiled step on preprocessed images, of the forward pass and the minimum."""
    plan, _, state, frozen, pretrained = build(config)
    loss = steps.make_loss(pretrained.module, plan)
    clip = config.train.gradient_clip_norm or 0.0
    update = optimizer.make_optimizer(config.optimizer, plan, clip)
    step = steps.make_train_step(loss, update, lambda batch, keys: batch["image"])
    hyper = steps.Hyper(np.uint32(0), np.float32(0.1))
    batch = images_and_labels(8)
    images = jnp.zeros((8, *SHAPE))
    compiled = costs.compiled_flops(step, state, frozen, hyper, {**batch, "image": images})
    forward = costs.compiled_flops(pretrained.module.apply, pretrained.variables, images)
    least = costs.minimum_flops(
        lambda *args: loss(*args, None)[0],
        state.trainable,
        state.statistics,
        frozen,
        images,
        batch["label"],
    )
    return compiled, forward, least


@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_plain"])
def test_a_linear_probe_costs_one_forward_pass_and_the_head(digits_config, name):
    config = digits_config(name, **{"train.gradient_clip_norm": 1.0})
    compiled, forward, least = cost_of(config)
    features = {"resnet_bottleneck": 32, "vit_plain": 16}[name]
    head = 8 * 2 * features * 10
    assert forward < compiled <= 1.02 * (forward + head)
    # The least counts products alone, XLA what is done element by element in the pass, too.
    pretrained = build(config)[-1]
    apply, images = pretrained.module.apply, jnp.zeros((8, *SHAPE))
    between = forward - costs.product_flops(apply, pretrained.variables, images)
    assert 0 <= between < 0.1 * forward
    assert compiled <= 1.005 * least + between


def test_the_least_that_full_fine_tuning_costs(digits_config):
    """The forward pass and two products more for each of it, but for the first layer's input.

    That a step costs hardly more is shown on larger networks, in test_phases.py.
    """
    compiled, forward, least = cost_of(digits_config("vit_plain", **{"freeze.strategy": "full"}))
    assert 2 * forward < least < 3 * forward and least <= compiled


def test_reported_cost_is_the_compiled_one(digits_config):
    config = digits_config("resnet_bottleneck")
    prepared = job.prepare(config)
    reported = step_cost(prepared)
    assert reported["flops_minimum"] <= reported["flops_per_step"]
    assert reported["flops_per_step"] <= 1.02 * reported["flops_minimum"]
    compiled, *_ = cost_of(config)  # 8 images, as one of 8 devices has of a batch of 64
    assert reported["flops_per_step"] == pytest.approx(compiled, rel=0.01)


@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_smaller"])
def test_rematerialised_gradients_are_the_same(digits_config, name):
    """Dropout and moving statistics included: one forward pass above the boundary more."""
    fields = {"freeze.strategy": "full"}
    if name.startswith("resnet"):
        fields["freeze.batch_norm"] = "batch"
    config = digits_config(name, **fields)
    pretrained = load_pretrained(config.model.pretrained, 10)
    _, (plan, *_), pretrained = job.resolve_plans(config, pretrained)
    update = optimizer.make_optimizer(config.optimizer, plan)
    state, frozen = steps.divide(plan, pretrained.variables, update)
    batch = images_and_labels(8)
    x = pretrained.preprocessing.device(batch["image"])
    keys = jax.random.split(jax.random.key(0), 8)
    found = []
    for again in (False, True):
        loss = steps.make_loss(pretrained.module, plan, rematerialise=again)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        args = (state.trainable, state.statistics, frozen, x, batch["label"], keys)
        (value, (_, statistics)), grads = run(*args)
        found.append((value, statistics, grads))
        flops = costs.lowered_flops(jax.grad(loss, has_aux=True), *args)
        found[-1] += (flops,)
    for one, other in zip(
        jax.tree.leaves(found[0][:3]), jax.tree.leaves(found[1][:3]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    again = costs.lowered_flops(loss, *args) - products_that_no_gradient_reads(pretrained, x)
    assert found[1][3] - found[0][3] == pytest.approx(again, rel=0.1)


def products_that_no_gradient_reads(pretrained, x):
    """FLOPs of the last product in each block that is computed again: what it adds to is linear."""
    config, count = pretrained.config, len(x)
    if pretrained.family.model_type == "resnet":  # every block ends with an activation
        return 0.0
    width, patch = config["hidden_size"], config["patch_size"]
    patches = (x.shape[1] // patch) * (x.shape[2] // patch)
    embedding = 2 * patches * width * patch * patch * x.shape[3]
    down = 2 * (patches + 1) * config["intermediate_size"] * width
    return count * (embedding + (config["num_hidden_layers"] - 1) * down)


@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_smaller"])
def test_rematerialising_keeps_less(digits_config, name):
    """For the backward pass it keeps the parameters, and of activations what passes on."""
    config = digits_config(name, **{"freeze.strategy": "full"})
    pretrained = load_pretrained(config.model.pretrained, 10)
    _, (plan, *_), pretrained = job.resolve_plans(config, pretrained)
    update = optimizer.make_optimizer(config.optimizer, plan)
    state, frozen = steps.divide(plan, pretrained.variables, update)
    x = jax.ShapeDtypeStruct((64, *SHAPE), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)

    def kept(loss):
        def backward(trainable, statistics, frozen, x, labels):
            return jax.vjp(lambda t: loss(t, statistics, frozen, x, labels, None)[0], trainable)[1]

        found = jax.eval_shape(backward, state.trainable, state.statistics, frozen, x, labels)
        return param_tree.nbytes(jax.tree.leaves(found))

    all_of_it = kept(steps.make_loss(pretrained.module, plan))
    passed_on = kept(steps.make_loss(pretrained.module, plan, rematerialise=True))
    between = [
        jax.eval_shape(lambda v, i, b=b: pretrained.module.apply(v, i, last=b), variables, x)
        for variables in [pretrained.variables]
        for b in range(1, len(plan.blocks) + 1)
    ]
    least = param_tree.nbytes(jax.tree.leaves(between))
    held = param_tree.nbytes(jax.tree.leaves((pretrained.variables, x, labels)))
    assert passed_on <= least + 2 * held < all_of_it / 2


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
@pytest.mark.parametrize("strategy", ["linear_probe", "top_k", "full"])
def test_devices_exchange_the_trainable_bytes_and_no_more(digits_config, strategy, kind):
    """Every all-reduce of the compiled step, summed: the gradients and the metrics."""
    config = digits_config("resnet_bottleneck", **{"freeze.strategy": strategy})
    _plan, step, state, frozen, _ = build(config, parallel.AXIS)
    devices = parallel.DataParallel(kind)
    state, frozen = devices.replicate((state, frozen))
    batch = devices.shard(images_and_labels(16))
    text = devices.compile(step, arguments=2).lower(state, frozen, batch).compile().as_text()
    exchanged = 0
    for line in text.splitlines():
        if match := re.search(r" = (.*?) all-reduce(?:-start)?\(", line):
            for shape in re.findall(r"f32\[([\d,]*)\]", match[1]):
                exchanged += 4 * math.prod(int(size) for size in shape.split(",") if size)
        assert " all-gather(" not in line and " all-to-all(" not in line
    trainable, metrics = param_tree.nbytes(jax.tree.leaves(state.trainable)), 3 * 4
    # Equal gradients (of the shifts of two norms that are added) and equal metrics go once.
    assert 0.98 * trainable <= exchanged <= trainable + metrics
