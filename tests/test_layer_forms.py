"""In whatever form a processor takes a layer, it is the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import networks

from tl_jax import job, layer_forms, prefix, stages

SHAPES = (  # height, width, channels, kernel, strides, features
    (32, 32, 3, (7, 7), (2, 2), 8),
    (33, 30, 1, (7, 7), (2, 2), 5),
    (9, 11, 4, (3, 3), (2, 2), 6),
    (14, 20, 3, (4, 5), (4, 5), 7),
    (15, 23, 2, (4, 5), (4, 5), 7),
    (12, 13, 2, (3, 2), (1, 1), 3),
    (8, 9, 3, (1, 1), (2, 2), 4),
    (10, 10, 3, (5, 4), (3, 2), 4),
)


@pytest.mark.parametrize("form", [layer_forms.over_patches, layer_forms.over_blocks])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_convolution_in_another_form(form, shape):
    """Its result and both gradients."""
    height, width, channels, size, strides, features = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(*size, channels, features)).astype(np.float32)

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=numbers)

    expected, back = jax.vjp(plain, x, kernel)
    found, back_again = jax.vjp(lambda x, kernel: form(x, kernel, strides), x, kernel)
    assert found.shape == expected.shape
    gradient = rng.normal(size=expected.shape).astype(np.float32)
    pairs = zip(
        (found, *back_again(gradient)), (expected, *back(jnp.asarray(gradient))), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_oblong"])
@pytest.mark.parametrize(
    ("backend", "differentiated"), [("cpu", False), ("gpu", False), ("gpu", True)]
)
def test_a_network_in_the_form_of_each_processor(
    digits_config, monkeypatch, name, backend, differentiated
):
    """On a GPU with XLA's attention in the place of cuDNN's, in half precision."""
    network = job.prepare(digits_config(name)).pretrained
    images, attention, called = networks.images(name), jax.nn.dot_product_attention, []

    def instead(*args, implementation):
        called.append(implementation)
        return attention(*args, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(layer_forms, "_has_flash_attention", lambda: True)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        module = network.module.clone(dtype=dtype)
        expected = network.apply(images, last=-1)
        with layer_forms.suited(differentiated=differentiated):
            found = jax.jit(lambda v, x, run=module: run.apply(v, x, last=-1))(
                network.variables, images
            )
        assert jnp.abs(found - expected).max() <= tolerance * jnp.abs(expected).max()
        fused = dtype == jnp.bfloat16 and backend == "gpu" and not differentiated
        layers = module.options.num_hidden_layers if fused and name.startswith("vit") else 0
        assert called == ["cudnn"] * max(layers - 1, 0)  # the top layer's one query is plain
        called.clear()


@pytest.mark.parametrize("name", ["resnet_bottleneck", "vit_smaller"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_prefix_gives_an_image_the_same_bits_at_every_place(digits_config, name, size):
    """Up to each boundary: XLA's own convolutions of few channels do not, on a CPU."""
    run = job.prepare(digits_config(name, **{"freeze.strategy": "linear_probe"}))
    stage, module = run.stages[0], run.pretrained.module
    below = stages.prefix_of(run, stage)(run.pretrained.variables)
    height, width = run.pretrained.preprocessing.output_size
    rng = np.random.default_rng(0)
    shape = (12, height, width, run.pretrained.preprocessing.channels)
    images = rng.normal(size=shape).astype(np.float32)
    for last in {1, stage.plan.boundary - 1}:
        plan = dataclasses.replace(stage.plan, boundary=last)
        rows = jax.jit(lambda x, plan=plan: prefix.apply(module, plan, below, x))

        def in_order(order, rows=rows):
            found = [rows(images[order[i : i + size]]) for i in range(0, 12, size)]
            return np.concatenate(found)[np.argsort(order)]

        assert in_order(np.arange(12)).tobytes() == in_order(rng.permutation(12)).tobytes()
