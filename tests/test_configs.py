"""Every configuration in configs/ is whole: its network, plan, optimizer and step have shapes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import ablation_config, config_files, depth_map, freezing, models, optimizer, param_tree
from tl_jax import train_step as steps
from tl_jax.preprocessing import Preprocessing

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Parameters of the trunk, as the papers and the Hub have them.
PARAMETERS = {"microsoft/resnet-50": 23_508_032, "google/vit-base-patch16-224-in21k": 85_798_656}
CLASSES = 7


def files_of(source):
    """config.json and preprocessor_config.json of a checkpoint."""
    if pathlib.Path(source).is_dir():
        names = ("config.json", "preprocessor_config.json")
        return [json.loads((pathlib.Path(source) / name).read_text()) for name in names]
    name = source.replace("/", "--")
    return [
        json.loads((GOLDEN / folder / f"{name}.json").read_text())
        for folder in ("hub_configs", "processors")
    ]


def test_the_configurations_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "quickstart",
        "resnet_fashion",
        "vit_fashion",
        "resnet_cats_vs_dogs",
        "vit_folder",
        "ablation_quickstart",
        "ablation_fashion",
        "ablation_head",
    }


@pytest.mark.parametrize(
    ("name", "cells", "groups"),
    [("ablation_quickstart", 20, 10), ("ablation_fashion", 48, 16), ("ablation_head", 6, 2)],
)
def test_sweeps_are_whole(name, cells, groups):
    path = str(ROOT / "configs" / f"{name}.py")
    sweep = ablation_config.read(path, config_files.load_config(path), [])
    assert (len(sweep.cells), len(sweep.groups)) == (cells, groups)
    assert len({len(cell.rates) for cell in sweep.cells}) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds(path):
    for word in ("Command", "Hardware", "Runtime", "Expected"):
        assert f"\n{word}" in path.read_text(), f"the header says nothing of {word}"
    fields = config_files.load_config(str(path))
    fields.pop("ablate", None)
    config = config_files.resolve(fields)
    if (
        config.model.pretrained.startswith("/")
        and not pathlib.Path(config.model.pretrained).exists()
    ):
        pytest.fail(f"{config.model.pretrained} is not in the repository")
    network, processor = files_of(config.model.pretrained)
    family = models.family_of(network, str(path))
    module = family.module(network, CLASSES, jnp.dtype(config.model.dtype))
    preprocessing = Preprocessing.from_processor(
        processor, network.get("num_channels", 3), config.model.image_size
    )
    height, width = preprocessing.output_size
    channels = network.get("num_channels", 3)
    images = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    blocks = family.chain(network)
    network_map = depth_map.describe(family, blocks, variables["params"], names={})
    recipe = freezing.recipe(config.freeze, network_map)
    statistics = {
        path: depth_map.block_of(path, blocks)
        for path in param_tree.flatten(variables.get("batch_stats", {}))
    }
    (plan,) = freezing.resolve(config.freeze, recipe, network_map, statistics)
    if expected := PARAMETERS.get(config.model.pretrained):
        trunk = [p for p in plan.parameters if plan.groups[p.path].name != "head"]
        assert param_tree.size(trunk) == expected
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch=10, total_steps=100)
    update = optimizer.make_optimizer(config.optimizer, plan)
    hyper = steps.Hyper(np.uint32(config.seed), schedule(0))

    def one_step(variables, images):
        state, frozen = steps.divide(plan, variables, update)
        loss = steps.make_loss(module, plan, config.train.label_smoothing)
        step = steps.make_train_step(loss, update, lambda batch, keys: batch["image"])
        labels = jnp.zeros(2, jnp.int32)
        return step(state, frozen, hyper, {"image": images, "label": labels, "index": labels})

    state, metrics = jax.eval_shape(one_step, variables, images)
    assert metrics["loss"].shape == ()
    head = param_tree.flatten(state.trainable)[f"{family.head}/kernel"]
    assert head.shape[1] == CLASSES
