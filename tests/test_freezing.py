import json

import jax
import numpy as np
import pytest

from tl_jax import certificate, config_files, job, load_pretrained, param_tree
from tl_jax.errors import UserError


@pytest.fixture(scope="module")
def resnet(network):
    return load_pretrained(network("resnet_bottleneck"), 10)


@pytest.fixture(scope="module")
def vit(network):
    return load_pretrained(network("vit_plain"), 10)


MINIMAL = {"model": {"pretrained": "a/b"}, "data": {"source": "tfds:digits"}}


def plans_of(pretrained, **options):
    config = config_files.resolve({**MINIMAL, "freeze": options})
    return job.resolve_plans(config, pretrained)[1]


def plan_of(pretrained, **options):
    (plan,) = plans_of(pretrained, **options)
    return plan


def trained(plan):
    return {p.path for p in plan.parameters if plan.trains(p.path)}


def under(pretrained, *prefixes):
    """Paths of the parameters below any of the prefixes, straight from the tree."""
    paths = param_tree.flatten(pretrained.variables["params"])
    return {path for path in paths if path.startswith(prefixes)}


def test_linear_probe(resnet, vit):
    plan = plan_of(resnet, strategy="linear_probe")
    assert trained(plan) == {"classifier_1/bias", "classifier_1/kernel"}
    assert plan.boundary == 6 and plan.blocks[6] == "head" and plan.training_blocks == (6,)
    plan = plan_of(vit, strategy="linear_probe")
    assert trained(plan) == {"classifier/bias", "classifier/kernel"}
    assert plan.boundary == 4
    assert {g.name for g in plan.groups.values()} == {"head", "frozen"}


def test_full(resnet, vit):
    for pretrained in (resnet, vit):
        plan = plan_of(pretrained, strategy="full")
        assert trained(plan) == under(pretrained, "")
        assert plan.boundary == 0


def test_top_k(resnet, vit):
    # The chain: stem, stages_0/layers_0, stages_1/layers_0, stages_1/layers_1, stages_2/layers_0, …
    plan = plan_of(resnet, strategy="top_k", k=2)
    upper = ("classifier_1", "resnet/encoder/stages_2", "resnet/encoder/stages_1/layers_1")
    assert trained(plan) == under(resnet, *upper)
    assert plan.boundary == 3
    plan = plan_of(vit, strategy="top_k")
    assert trained(plan) == under(vit, "classifier", "vit/layernorm", "vit/encoder/layer_1")
    assert plan.boundary == 2
    with pytest.raises(
        UserError, match="k = 5: below the head there are 5 blocks; full trains all"
    ):
        plan_of(resnet, strategy="top_k", k=5)


def test_patterns_first_match_wins(resnet):
    plan = plan_of(
        resnet,
        strategy="patterns",
        patterns=(
            ("stages_2.*bias", "frozen"),
            ("stages_2", 0.1),
            ("classifier.*kernel", "train"),
            ("classifier", 2),
            ("", "frozen"),
        ),
    )
    head, trunk = ("classifier_1",), ("resnet/encoder/stages_2",)
    biases = {path for path in under(resnet, *trunk) if path.endswith("bias")}
    assert trained(plan) == under(resnet, *head, *trunk) - biases
    multipliers = {path: plan.groups[path].multiplier for path in trained(plan)}
    assert multipliers["classifier_1/kernel"] == 1.0
    assert multipliers["classifier_1/bias"] == 2.0
    assert {multipliers[path] for path in under(resnet, *trunk) - biases} == {0.1}
    names = {plan.groups[path].name for path in trained(plan)}
    assert names == {"head", "head/classifier", "trunk/stages_2"}


def test_patterns_cover_everything_and_match_something(resnet):
    with pytest.raises(UserError) as error:
        plan_of(resnet, strategy="patterns", patterns=(("stage_9", "train"), ("stages", "frozen")))
    text = str(error.value)
    assert "nothing matches 'stage_9'" in text
    assert "no pattern covers classifier.1.weight" in text
    assert "no pattern covers resnet.embedder.embedder.convolution.weight" in text


def test_something_must_train(resnet):
    with pytest.raises(UserError, match="no parameter trains"):
        plan_of(resnet, strategy="patterns", patterns=(("", "frozen"),))


def test_statistics_move_only_where_asked_and_only_in_blocks_that_train(resnet):
    assert plan_of(resnet, strategy="full").statistics == frozenset()
    assert plan_of(resnet, strategy="full").batch_norm_blocks == ()
    plan = plan_of(resnet, strategy="top_k", batch_norm="batch")
    statistics = param_tree.flatten(resnet.variables["batch_stats"])
    assert plan.statistics == {path for path in statistics if "stages_2" in path}
    assert plan.batch_norm_blocks == plan.training_blocks == (4, 6)


def test_certificate_sees_one_bit_of_a_parameter_and_of_a_statistic(resnet):
    plan = plan_of(resnet, strategy="top_k", k=1)
    variables = jax.tree.map(np.array, resnet.variables)
    before = certificate.fingerprint(plan, variables)

    def changed(collection, part):
        flat = param_tree.flatten(variables[collection])
        path = next(path for path in flat if part in path)
        leaf = flat[path].copy()
        leaf.view(np.uint8).reshape(-1)[0] ^= 1
        return {**variables, collection: param_tree.unflatten({**flat, path: leaf})}

    same = certificate.certify(plan, before, variables)
    assert same["ok"] and same["sha256_before"] == same["sha256_after"] == before
    frozen = [path for path in param_tree.flatten(variables["params"]) if not plan.trains(path)]
    assert same["leaves"] == len(frozen) + len(param_tree.flatten(variables["batch_stats"]))
    assert not certificate.certify(plan, before, changed("params", "stages_1"))["ok"]
    assert not certificate.certify(plan, before, changed("batch_stats", "stages_2"))["ok"]
    assert certificate.certify(plan, before, changed("params", "stages_2"))["ok"]
    json.dumps(same)
