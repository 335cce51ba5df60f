"""The strategy of one's own in docs/strategies.md is run as it stands there."""

import pathlib
import re

import pytest
from command_line import read_json

from tl_jax import config_files, job, load_pretrained, recipes
from tl_jax.errors import UserError
from tl_jax.main import main
from tl_jax.strategies import STRATEGIES

ROOT = pathlib.Path(__file__).parent.parent
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
    assert main([*arguments, "--config.data.splits.train=train[:192]"]) == 0
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
