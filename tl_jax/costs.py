"""What a training step costs, and the least that it can cost.

Training needs the forward pass; and for every product `y = f(a, b)` in it that is linear in `a` and
in `b` (a matrix product, a convolution), one more product of the same cost for each operand whose
gradient is wanted: the weights, if they train, and the activations, if something below trains.
An operand's gradient is wanted exactly when the operand depends on a trainable leaf, so the least
cost is read off the forward pass alone, whatever the strategy.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core


def compiled_flops(function: Callable, *args: Any) -> float:
    """FLOPs of `jax.jit(function)(*args)` as XLA counts them, compiled for one device.

    A product-sum of n terms counts 2n; a convolution's padding counts nothing; each element of an
    elementwise operation counts one. Arguments may be shapes with dtype.
    """
    return _flops(jax.jit(function).lower(*args).compile())


def lowered_flops(function: Callable, *args: Any) -> float:
    """As `compiled_flops`, counted before compilation by the host's XLA: quick, and the same for
    every accelerator (a GPU's compiled convolutions are library calls that XLA cannot count)."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _flops(jax.jit(function).lower(*args))


def _flops(program: Any) -> float:
    return float(program.cost_analysis()["flops"])


def minimum_flops(forward: Callable, trainable: Any, *rest: Any) -> float:
    """The least FLOPs of one training step: forward pass and the gradients that are wanted.

    Args:
      forward: `forward(trainable, *rest)` gives the loss or the logits.
      trainable: tree of what is differentiated, arrays or shapes with dtype.
      *rest: what is not.
    """
    return lowered_flops(forward, trainable, *rest) + gradient_flops(forward, trainable, *rest)


def product_flops(function: Callable, *args: Any) -> float:
    """FLOPs of the matrix products and convolutions in `function(*args)`, without compiling it."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return _products(jaxpr.jaxpr)


def _products(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = _inner_jaxpr(equation)
        if inner is None:
            total += _product_flops(equation)
        else:
            total += _products(inner) * equation.params.get("length", 1)
    return total


def gradient_flops(forward: Callable, trainable: Any, *rest: Any) -> float:
    """FLOPs of the products that the gradient by `trainable` adds to the forward pass."""
    jaxpr = jax.make_jaxpr(forward)(trainable, *rest)
    wanted = [True] * len(jax.tree.leaves(trainable)) + [False] * len(jax.tree.leaves(rest))
    return _walk(jaxpr.jaxpr, wanted)[0]


def _walk(jaxpr: core.Jaxpr, wanted: list[bool]) -> tuple[float, list[bool]]:
    """Gradient FLOPs inside a jaxpr, and which of its outputs depend on a wanted input."""
    depends = {var for var, want in zip(jaxpr.invars, wanted, strict=True) if want}

    def is_wanted(var: Any) -> bool:
        return not isinstance(var, core.Literal) and var in depends

    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [is_wanted(var) for var in equation.invars]
        inner = _inner_jaxpr(equation)
        if inner is not None and len(inner.invars) <= len(inputs):
            # A custom rule's or a loop's own constants stand in front of what is passed on.
            flops, outputs = _walk(inner, inputs[len(inputs) - len(inner.invars) :])
            total += flops * equation.params.get("length", 1)  # the turns of a loop
        else:
            product = _product_flops(equation)
            total += product * sum(inputs)
            outputs = [any(inputs)] * len(equation.outvars)
        depends |= {var for var, want in zip(equation.outvars, outputs, strict=True) if want}
    return total, [is_wanted(var) for var in jaxpr.outvars]


def _inner_jaxpr(equation: Any) -> core.Jaxpr | None:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := equation.params.get(name)) is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _product_flops(equation: Any) -> float:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
        return 2.0 * float(terms) * float(np.prod(equation.outvars[0].aval.shape))
    if equation.primitive.name == "conv_general_dilated":
        return _convolution_flops(equation)
    return 0.0


def _convolution_flops(equation: Any) -> float:
    """2 × the pairs of an input and a weight that meet; positions in the padding do not count."""
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (var.aval.shape for var in equation.invars)
    output = equation.outvars[0].aval.shape
    pairs = float(output[numbers.out_spec[0]] * output[numbers.out_spec[1]])
    pairs *= kernel[numbers.rhs_spec[1]]  # input channels of a group
    spatial = zip(
        numbers.lhs_spec[2:],
        numbers.rhs_spec[2:],
        numbers.out_spec[2:],
        params["window_strides"],
        params["padding"],
        params["rhs_dilation"],
        strict=True,
    )
    for lhs, rhs, out, stride, (before, _), dilation in spatial:
        positions = np.arange(output[out])[:, None] * stride - before
        positions = positions + np.arange(kernel[rhs])[None, :] * dilation
        pairs *= int(((positions >= 0) & (positions < image[lhs])).sum())
    return 2.0 * pairs
