import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import job, load_pretrained, optimizer, param_tree
from tl_jax.errors import UserError

SCHEDULE = dict(steps_per_epoch=10, total_steps=100)


def rates(config, steps=(0, 4, 9, 10, 55, 99)):
    schedule = optimizer.make_schedule(config.optimizer, **SCHEDULE)
    return [float(schedule(step)) for step in steps]


def test_schedules(digits_config):
    def config(name, warmup):
        return digits_config(
            "vit_plain",
            **{
                "optimizer.schedule": name,
                "optimizer.warmup": warmup,
                "optimizer.learning_rate": 1.0,
            },
        )

    assert rates(config("constant", 0)) == [1.0] * 6
    for warmup in ("10%", "1 epoch", 10, "10 steps"):
        assert rates(config("constant", warmup)) == pytest.approx([0.1, 0.5, 1.0, 1, 1, 1])
    assert rates(config("linear", 10)) == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 1 / 90], rel=1e-5)
    cosine = rates(config("cosine", 10))
    assert cosine == pytest.approx(
        [0.1, 0.5, 1, 1, 0.5, (1 + np.cos(np.pi * 89 / 90)) / 2], abs=1e-6
    )


@pytest.fixture(scope="module")
def resnet(network):
    return load_pretrained(network("resnet_bottleneck"), 10)


def build(digits_config, pretrained, **fields):
    config = digits_config("resnet_bottleneck", **fields)
    (plan,) = job.resolve_plans(config, pretrained)[1]
    update = optimizer.make_optimizer(
        config.optimizer,
        plan,
        config.train.gradient_clip_norm or 0.0,
    )
    return config, plan, update


@pytest.mark.parametrize(("name", "slots"), [("sgd", 1), ("adam", 2), ("adamw", 2)])
def test_state_is_that_of_the_trainable_part(digits_config, resnet, name, slots):
    _config, plan, update = build(digits_config, resnet, **{"optimizer.name": name})
    trainable, _ = plan.split_params(resnet.variables["params"])
    total, by_path = optimizer.state_bytes(update, trainable)
    head = 4 * (32 * 10 + 10)
    assert by_path == {
        "classifier_1/bias": 4 * 10 * slots,
        "classifier_1/kernel": 4 * 320 * slots,
    }
    assert head * slots <= total <= head * slots + 16  # and a few counters
    state = update.init(trainable)
    assert total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_multipliers_and_decay_reach_the_update(digits_config, resnet):
    fields = {
        "optimizer.momentum": 0.0,
        "optimizer.learning_rate": 0.5,
        "optimizer.weight_decay": 0.25,
        "freeze.strategy": "patterns",
        "freeze.patterns": [["classifier", "train"], ["stages_2", 0.1], ["", "frozen"]],
    }
    _config, plan, update = build(digits_config, resnet, **fields)
    trainable, _ = plan.split_params(resnet.variables["params"])
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = update.update(grads, update.init(trainable), trainable, rate=0.5, start={})
    flat, weights = param_tree.flatten(updates), param_tree.flatten(trainable)
    for path, change in flat.items():
        multiplier = 1.0 if path.startswith("classifier") else 0.1
        decay = 0.25 if path.endswith("kernel") else 0.0
        expected = -0.5 * multiplier * (1.0 + decay * weights[path])
        np.testing.assert_allclose(change, expected, rtol=1e-6)


def test_adamw_decays_kernels_only_and_decoupled(digits_config, resnet):
    fields = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1, "freeze.strategy": "full"}
    _config, _plan, update = build(digits_config, resnet, **fields)
    params = resnet.variables["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update.update(zeros, update.init(params), params, rate=0.05, start={})
    for path, change in param_tree.flatten(updates).items():
        weight = param_tree.flatten(params)[path]
        decay = 0.1 if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(change, -0.05 * decay * weight, rtol=1e-6)


def test_clipping_is_over_the_trainable_part(digits_config, resnet):
    fields = {"optimizer.momentum": 0.0, "train.gradient_clip_norm": 1.0}
    config, plan, update = build(digits_config, resnet, **fields)
    trainable, _ = plan.split_params(resnet.variables["params"])
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), trainable)
    updates, _ = update.update(
        grads, update.init(trainable), trainable, rate=config.optimizer.learning_rate, start={}
    )
    norm = np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)))
    assert norm == pytest.approx(config.optimizer.learning_rate, rel=1e-5)


def test_description_names_every_leaf(digits_config, resnet):
    fields = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}
    config, plan, update = build(digits_config, resnet, **fields)
    described = optimizer.describe(config.optimizer, plan, update)
    leaves = {leaf["path"]: leaf for leaf in described["leaves"]}
    assert leaves.keys() == param_tree.flatten(resnet.variables["params"]).keys()
    kernel = leaves["classifier_1/kernel"]
    assert kernel["group"] == "head" and kernel["learning_rate_multiplier"] == 1.0
    assert kernel["weight_decay"] == 0.1 and kernel["optimizer_state_bytes"] == 4 * 320 * 2
    assert leaves["classifier_1/bias"]["weight_decay"] == 0.0
    stem = leaves["resnet/embedder/embedder/convolution/kernel"]
    assert (stem["group"], stem["block"], stem["optimizer_state_bytes"]) == ("frozen", "stem", 0)
    totals = optimizer.leaf_totals(described["leaves"])
    assert totals["trainable"] == 330
    assert totals["total"] == param_tree.size(jax.tree.leaves(resnet.variables["params"]))


def test_a_warm_up_longer_than_the_training_is_refused(digits_config):
    config = digits_config("vit_plain", **{"optimizer.warmup": "11 epochs"})
    with pytest.raises(UserError, match="'11 epochs' is 110 steps, the whole training 100"):
        optimizer.make_schedule(config.optimizer, **SCHEDULE)
