"""FLOPs counted by hand on a network of two convolutions and a dense layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tl_jax import costs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding=1, use_bias=False, name="lower")(x))
        x = nn.relu(nn.Conv(5, (2, 2), 2, padding="VALID", use_bias=False, name="upper")(x))
        return nn.Dense(3, use_bias=False, name="head")(x.mean((1, 2)))


IMAGES = jnp.zeros((2, 8, 8, 3))
# Batch 2. Lower: 3×3 on 8×8 with padding 1: of the 24 (position, tap) pairs a side 22 are inside.
LOWER = 2 * 2 * 22 * 22 * 3 * 4
UPPER = 2 * 2 * (4 * 2) ** 2 * 4 * 5
HEAD = 2 * 2 * 5 * 3

CASES = {
    "head": (["head"], HEAD),
    "upper": (["upper"], UPPER + HEAD),
    "upper+head": (["upper", "head"], UPPER + 2 * HEAD),
    "lower": (["lower"], LOWER + UPPER + HEAD),
    "all": (["lower", "upper", "head"], LOWER + 2 * UPPER + 2 * HEAD),
}


@pytest.fixture(scope="module")
def params():
    return Net().init(jax.random.key(0), IMAGES)["params"]


def loss(trainable, frozen, images):
    return Net().apply({"params": {**trainable, **frozen}}, images).sum()


def halves(params, names):
    return {n: params[n] for n in names}, {n: params[n] for n in params if n not in names}


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_hand(params, case):
    names, expected = CASES[case]
    assert costs.gradient_flops(loss, *halves(params, names), IMAGES) == expected


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_gradient_costs_the_minimum(params, case):
    trainable, frozen = halves(params, CASES[case][0])
    compiled = costs.compiled_flops(jax.value_and_grad(loss), trainable, frozen, IMAGES)
    least = costs.minimum_flops(loss, trainable, frozen, IMAGES)
    assert least * 0.999 <= compiled <= 1.1 * least  # relu and mean show in so small a network


def test_forward_is_counted_alike_before_and_after_compilation(params):
    before = costs.lowered_flops(loss, params, {}, IMAGES)
    assert before == pytest.approx(LOWER + UPPER + HEAD, rel=0.05)
    assert before == pytest.approx(costs.compiled_flops(loss, params, {}, IMAGES), rel=0.02)


def test_loops_count_every_turn():
    def looped(weight, x):
        return jax.lax.scan(lambda x, _: (x @ weight, None), x, None, length=5)[0].sum()

    weight, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    # The first turn's input needs no gradient, but a loop's turns are one program.
    assert costs.gradient_flops(looped, weight, x) == 5 * 2 * 2 * 4 * 4
