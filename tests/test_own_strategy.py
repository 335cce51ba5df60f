"""The strategy of one's own in docs/strategies.md is run as it stands there."""

import importlib
import pathlib
import re
import shutil
import sys

import pytest
from command_line import read_json, write_config

from tl_jax import config_files, job, load_pretrained, recipes
from tl_jax.errors import UserError
from tl_jax.main import main
from tl_jax.strategies import STRATEGIES

ROOT = pathlib.Path(__file__).parent.parent
OWN = ("--config.logging.figures=False", "--config.logging.compilation_cache=None")
DOCUMENT = (ROOT / "docs" / "strategies.md").read_text()


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def test_the_example_runs(registry, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(ROOT)
    arguments = ["--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--config.data.splits.train=train[:192]", *OWN]) == 0
    plan, summary = (read_json(tmp_path / "run" / f"{name}.json") for name in ("plan", "summary"))
    assert [phase["name"] for phase in plan["phases"]] == ["norms", "top"]
    upper = {leaf["block_index"] for leaf in plan["leaves"] if leaf["group"] == "trunk/upper"}
    assert upper == {4, 5} and len(plan["blocks"]) == 8  # 6 is the pool, 7 the head
    assert summary["freeze"]["certificate"]["ok"]
    before = read_json(tmp_path / "run" / "evaluation.json")
    # Where nothing registers the strategy, the run can be evaluated all the same.
    del STRATEGIES["norms_then_top"]
    assert main(["--mode", "eval", "--workdir", str(tmp_path / "run")]) == 0
    assert read_json(tmp_path / "run" / "evaluation.json") == before


def test_every_strategy_is_described():
    for name in STRATEGIES:
        assert f"| `{name}`" in DOCUMENT
        for option in recipes.options_of(name):
            assert re.search(rf"`{name}` \([^|]*{option}=", DOCUMENT), (name, option)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def mine(network, share: float = 1.0): ...", "must be keyword-only"),
        ("def mine(network, *, share=1.0): ...", "must be keyword-only and typed"),
        ("def mine(network, *, share: float): ...", "needs a default"),
        ("def full(network): ...", "there is a strategy 'full' already"),
        ("def mine(network, *, phases: int = 3): ...", "goes with every strategy already"),
        ("def mine(network, *, many: tuple[int, ...] = ()): ...", "must be an int, float, str"),
    ],
)
def test_what_a_strategy_must_be(registry, source, part):
    scope: dict = {}
    exec(source, scope)
    with pytest.raises(ValueError, match=part):
        recipes.strategy(next(f for name, f in scope.items() if name in ("mine", "full")))


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ('[train("(")]', "fails: .*unterminated subpattern"),
        ("None", "must return a Recipe"),
        ('[train("head", Group("head", -1.0))]', r"multiplier = -1\.0 is no number"),
        ('[train("head", Group("head", 0.0))]', "multiplier = 0 is frozen"),
        ('[train("head", Group("frozen", 0.1))]', "trains: give it another name"),
        (
            '[train("norm", Group("trunk", 0.1)), train("mlp", Group("trunk", 0.5))]',
            "two groups are called 'trunk'",
        ),
    ],
)
def test_rules_that_are_no_strategy(registry, network, rules, part):
    scope = {name: getattr(recipes, name) for name in ("train", "Group", "Phase", "Recipe")}
    body = "None" if rules == "None" else f'Recipe([Phase("one", {rules})])'
    exec(f"def mine(network):\n    return {body}", scope)
    recipes.strategy(scope["mine"])
    fields = {"model": {"pretrained": "a"}, "data": {"source": "tfds:x"}}
    config = config_files.resolve({**fields, "freeze": {"strategy": "mine"}})
    with pytest.raises(UserError, match=part):
        job.resolve_plans(config, load_pretrained(network("vit_plain"), 10))


MISTAKES = {
    'Recipe([Phase("a", [train(lambda p: p.frac > 0.5)])])': "'a' fails: AttributeError",
    'Recipe([Phase("a", ["head"])])': "rules must be made by",
    'Recipe([("a", [])])': "is no Phase",
    'Recipe([Phase("a", [train("head")], rate="0.1")])': "rate = '0.1'",
    'Recipe([Phase("a", [train("head")], rate=-1.0)])': "rate = -1.0",
    'Recipe([Phase("a", [train("head")], rate=0.0)])': "rate = 0.0",
    'Recipe([Phase("a", [train("head")])], trunk="randm")': "trunk = 'randm'",
    'Recipe([Phase("a", [train("head")])], layer_decay=-0.5)': "layer_decay = -0.5",
    'Recipe([Phase("a", [train("head")])], discriminative=(1,))': "discriminative",
    'Recipe([Phase("a", [train("head")])], interpolate=(0.0, "x"))': "interpolate",
    'Recipe([Phase("a", [train("head")])], interpolate=(0.0, 1.0))': "first phase's end",
    'Recipe([Phase("a", [train("head")])], adapters=Lora(0, 1.0, 0.0, ("mlp",)))': "rank = 0",
    'Recipe([Phase("a", [train("head")])], adapters=Lora(2, 1.0, 0.0, "mlp"))': "targets = 'mlp'",
}


@pytest.mark.parametrize("body", MISTAKES)
def test_what_a_strategy_may_get_wrong_is_one_message(registry, network, body):
    scope = {name: getattr(recipes, name) for name in ("train", "Lora", "Phase", "Recipe")}
    exec(f"def mine(network):\n    return {body}", scope)
    recipes.strategy(scope["mine"])
    fields = {"model": {"pretrained": "a"}, "data": {"source": "tfds:x"}}
    config = config_files.resolve({**fields, "freeze": {"strategy": "mine"}})
    with pytest.raises(UserError, match=r"config\.freeze \(mine\)") as caught:
        job.resolve_plans(config, load_pretrained(network("vit_plain"), 10))
    assert MISTAKES[body] in str(caught.value)


def test_another_definition_is_another_run(registry, network, tmp_path, capsys):
    """Neither goes on from the other's checkpoint, nor shows the other's results."""
    code = """
from my_phases import phases
from tl_jax import recipes

@recipes.strategy
def mine(network):
    return recipes.Recipe(phases())
"""
    module = (
        "from tl_jax.recipes import Group, Phase, train\n\ndef phases():\n"
        '    return [Phase("a", [train("head"), train("norm", Group("trunk/n", {rate}))])]\n'
    )

    def start(rate, *arguments):
        (tmp_path / "my_phases.py").write_text(module.format(rate=rate))  # beside the config file
        sys.modules.pop("my_phases", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return main(["--config", str(config), "--workdir", str(tmp_path / "run"), *arguments])

    config = write_config(
        tmp_path / "mine.py", network("resnet_gray"), **{"freeze.strategy": "mine"}
    )
    config.write_text(code + config.read_text())
    assert start(0.1) == 0
    assert start(0.1) == 0 and "finished" in capsys.readouterr().out
    assert start(0.2) == 2 and "another configuration or strategy" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed at its end
    assert start(0.2) == 2 and "strategy's function" in capsys.readouterr().err
    assert start(0.1) == 0


def test_groups_of_a_head_keep_their_own_values(registry, network):
    """No decay on biases: the head's bias must not fall in with its kernel."""
    from tl_jax.recipes import Group, Phase, Recipe, train

    @recipes.strategy
    def no_decay(network):
        plain = Group("trunk/nodecay", weight_decay=0.0)
        return Recipe([Phase("all", [train("bias", plain), train(lambda p: True)])])

    fields = {"model": {"pretrained": "a"}, "data": {"source": "tfds:x"}}
    config = config_files.resolve({**fields, "freeze": {"strategy": "no_decay"}})
    _, (plan,), _ = job.resolve_plans(config, load_pretrained(network("vit_plain"), 10))
    assert plan.groups["classifier/bias"].name == "head/nodecay"
    assert plan.groups["classifier/kernel"].name == "head"


def test_a_strategy_that_fails_on_the_network_says_why(registry, network):
    @recipes.strategy
    def picky(network, *, least: int = 100):
        raise ValueError(f"{len(network.blocks)} blocks are fewer than {least}")

    config = config_files.resolve(
        {
            "model": {"pretrained": network("vit_plain")},
            "data": {"source": "tfds:digits"},
            "freeze": {"strategy": "picky"},
        }
    )
    with pytest.raises(UserError, match=r"config.freeze \(picky\): 5 blocks are fewer than 100"):
        job.resolve_plans(config, load_pretrained(network("vit_plain"), 10))
