"""The prefix made ready to run is the network's lower part: BatchNorm folded, kernels cast."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import networks

from tl_jax import costs, job, lora, param_tree, prefix, stages
from tl_jax import train_step as steps


def prepared(digits_config, name, **fields):
    run = job.prepare(digits_config(name, **fields))
    return run, run.stages[0]


@pytest.mark.parametrize("name", [*networks.RESNETS, "vit_smaller", "vit_oblong"])
def test_folded_it_gives_the_same(digits_config, name):
    """Within 1e-5 of the scale, whatever the statistics, at every boundary."""
    run, stage = prepared(digits_config, name)
    network, images = run.pretrained, networks.images(name)
    count = len(network.blocks)
    for boundary in {1, count // 2, count - 2, count - 1}:
        plan = dataclasses.replace(stage.plan, boundary=boundary)
        below = prefix.ready(network.module, network.family, plan, network.variables)
        found = prefix.apply(network.module, plan, below, images)
        expected = network.apply(images, last=boundary)
        scale = jnp.abs(expected).max()
        assert jnp.abs(found - expected).max() <= 1e-5 * scale


def test_nothing_of_batch_norm_is_left(digits_config):
    run, stage = prepared(digits_config, "resnet_bottleneck")
    network = run.pretrained
    below = prefix.ready(network.module, network.family, stage.plan, network.variables)
    paths = param_tree.flatten(below["params"])
    assert not [path for path in paths if "normalization" in path]
    assert len(below["shift"]) == 16 == len([p for p in paths if p.endswith("kernel")])
    text = str(
        jax.make_jaxpr(lambda b, x: prefix.apply(network.module, stage.plan, b, x))(
            below, networks.images("resnet_bottleneck")
        )
    )
    assert "rsqrt" not in text


def test_kernels_are_held_in_the_compute_dtype_and_norms_are_not(digits_config):
    run, stage = prepared(digits_config, "vit_smaller", **{"model.dtype": "bfloat16"})
    network, images = run.pretrained, networks.images("vit_smaller")
    below = prefix.ready(network.module, network.family, stage.plan, network.variables)
    for path, leaf in param_tree.flatten(below["params"]).items():
        held = "layernorm" not in path and "cls_token" not in path and "position" not in path
        assert leaf.dtype == (jnp.bfloat16 if held else jnp.float32), path
    found = prefix.apply(network.module, stage.plan, below, images)
    expected = network.module.apply(network.variables, images, last=stage.plan.boundary)
    np.testing.assert_array_equal(found, expected)


def test_frozen_adapters_are_merged(digits_config):
    """A later phase may freeze adapters that an earlier one trained."""
    run, stage = prepared(digits_config, "resnet_bottleneck", **{"freeze.strategy": "lora"})
    network, images = run.pretrained, networks.images("resnet_bottleneck")
    groups = {
        p.path: dataclasses.replace(stage.plan.groups[p.path], multiplier=None)
        if p.path.startswith("lora/")
        else stage.plan.groups[p.path]
        for p in stage.plan.parameters
    }
    top = len(network.blocks) - 1
    plan = dataclasses.replace(stage.plan, groups=groups, boundary=top)
    rng = np.random.default_rng(0)
    params = dict(network.variables["params"])
    params["lora"] = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, params["lora"]
    )
    variables = {**network.variables, "params": params}
    below = prefix.ready(network.module, network.family, plan, variables)
    with lora.applied(plan.adapters, params):
        expected = network.module.apply(variables, images, last=top)
    found = prefix.apply(network.module, plan, below, images)
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max()
    plain = network.module.apply(network.variables, images, last=top)
    assert jnp.abs(plain - expected).max() > 1e-2 * jnp.abs(expected).max()


def test_the_steps_hold_each_parameter_once(digits_config):
    """What lies below the boundary is there ready to run; of each BatchNorm only its shift."""
    run, stage = prepared(digits_config, "resnet_bottleneck")
    state, frozen = stages.begin(run, run.pretrained.variables)
    held = stages.above(run, stage, frozen)
    below = stages.prefix_of(run, stage)(run.pretrained.variables)
    assert param_tree.flatten(held.params) == {} == param_tree.flatten(held.statistics)
    total = param_tree.size(jax.tree.leaves(run.pretrained.variables["params"]))
    kept = param_tree.size(jax.tree.leaves((held, below, state.trainable)))
    assert total - kept == sum(shift.size for shift in below["shift"].values())


def test_statistics_that_move_below_the_boundary_leave_it_as_it_is(digits_config):
    _, stage = prepared(digits_config, "resnet_bottleneck", **{"freeze.batch_norm": "stats_only"})
    assert not prefix.can_be_ready(stage.plan)


def test_the_step_on_cached_rows_costs_what_lies_above(digits_config):
    fields = {"freeze.strategy": "top_k", "freeze.k": 1}
    run, stage = prepared(digits_config, "resnet_bottleneck", **fields)
    network, boundary = run.pretrained, stage.plan.boundary
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    state, frozen = stages.begin(run, network.variables)
    held = stages.above(run, stage, frozen)
    x = jax.eval_shape(lambda i: network.module.apply(network.variables, i, last=boundary), images)
    rows = jax.ShapeDtypeStruct((16,), jnp.int32)
    batch = {"activations": x, "label": rows, "index": rows}
    loss = steps.make_loss(network.module, stage.plan, first=boundary)
    step = steps.make_train_step(loss, stage.optimizer, lambda b, keys: b["activations"])
    hyper = steps.Hyper(np.uint32(0), np.float32(0.1))

    def forward(trainable, held, x, labels):
        return loss(trainable, {}, held, x, labels, None)[0]

    least = costs.minimum_flops(forward, state.trainable, held, x, rows)
    found = costs.compiled_flops(step, state, held, hyper, batch)
    assert found <= 1.35 * least  # in a network as small as this one elementwise work counts
    whole = costs.lowered_flops(lambda v, i: network.module.apply(v, i), network.variables, images)
    assert found < whole
