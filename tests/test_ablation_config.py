"""The `ablate` section: axes, how they combine, and what is wrong with it."""

import sys

import numpy as np
import pytest

from tl_jax import ablation_config
from tl_jax.errors import UserError

BASE = {
    "model": {"pretrained": "somewhere"},
    "data": {"source": "tfds:digits", "splits": {"validation": "train[1000:]"}},
}
STRATEGIES = ("linear_probe", {"name": "last two", "freeze.strategy": "top_k", "freeze.k": 2})


def strategies(*values):
    return tuple(v if isinstance(v, dict) else {"freeze.strategy": v} for v in values)


def read(overrides=(), **ablate):
    return ablation_config.read("configs/x.py", {**BASE, "ablate": ablate}, overrides)


def refused(*said, overrides=(), **ablate):
    with pytest.raises(UserError) as error:
        read(overrides, **ablate)
    for text in said:
        assert text in str(error.value)


def test_a_product_of_axes():
    sweep = read(
        axes=(
            ("strategy", strategies(*STRATEGIES)),
            ("data.examples_per_class", (10, 100)),
            ("seed", (0, 7)),
        ),
        learning_rates=(0.1, 1),
    )
    assert len(sweep.cells) == 8
    assert sweep.compared == "strategy"
    assert sweep.axes == {
        "strategy": ("linear_probe", "last_two"),
        "data.examples_per_class": ("10", "100"),
        "seed": ("0", "7"),
    }
    cell = sweep.cells[-1]
    assert cell.name == "last_two,examples_per_class=100,seed=7"
    assert cell.group == "last_two,examples_per_class=100"
    assert cell.rates == (0.1, 1.0)
    assert (cell.config.freeze.options["k"], cell.config.seed) == (2, 7)
    assert cell.config.data.examples_per_class == 100
    assert [len(cells) for cells in sweep.groups.values()] == [2] * 4


def test_axes_may_be_nested_as_the_configuration_is():
    sweep = read(axes={"optimizer": {"learning_rate": (0.1, 0.2)}, "seed": (0,)})
    assert [cell.config.optimizer.learning_rate for cell in sweep.cells] == [0.1, 0.2]
    assert sweep.compared == "optimizer.learning_rate"


def test_numbers_may_be_numpy_s():
    sweep = read(
        axes=(("seed", tuple(np.arange(2))), ("freeze.strategy", ("full",))),
        learning_rates=np.logspace(-2, -1, 2),
    )
    assert [cell.config.seed for cell in sweep.cells] == [0, 1]
    assert sweep.cells[0].rates == (0.01, 0.1)


def test_an_axis_called_seed_sets_the_seed_alone():
    sizes = tuple({"name": str(n), "seed": n, "data.examples_per_class": n} for n in (2, 20))
    refused("seed: its values count as seeds", axes=(("seed", sizes),))
    others = tuple({"name": str(n), "data.examples_per_class": n} for n in (2, 20))
    refused("seed: its values count as seeds", axes=(("seed", others),))
    rates = ({"seed": 0}, {"seed": 1, "learning_rates": (7.0,)})
    refused("seed: its values count as seeds", axes=(("seed", rates),), learning_rates=(1.0,))
    named = tuple({"name": f"run{n}", "seed": n} for n in (2, 20))
    assert [cell.config.seed for cell in read(axes=(("seed", named),)).cells] == [2, 20]


def test_a_sweep_has_a_test_split():
    refused("data.splits.test", overrides=[("data.splits.test", "None")], axes=(("seed", (0,)),))


def test_what_is_compared_sees_the_same_test_examples():
    splits = ("data.splits.test", ("test[:100]", "test[:200]"))
    strategies = ("freeze.strategy", ("full", "bitfit"))
    refused("along data.splits.test the test examples differ", axes=(splits, strategies))
    assert len(read(axes=(strategies, splits)).cells) == 4
    assert len(read(axes=(splits, strategies), compare="freeze.strategy").cells) == 4


def test_axes_side_by_side():
    axes = (("freeze.strategy", ("full", "bitfit")), ("optimizer.learning_rate", (0.01, 0.1)))
    sweep = read(axes=axes, combine="list")
    found = [(c.config.freeze.strategy, c.config.optimizer.learning_rate) for c in sweep.cells]
    assert found == [("full", 0.01), ("bitfit", 0.1)]


def test_a_constraint_drops_cells():
    axes = (("freeze.strategy", ("full", "bitfit")), ("seed", (0, 1)))
    sweep = read(axes=axes, keep=lambda cell: cell["freeze.strategy"] == "full" or not cell["seed"])
    assert [cell.name for cell in sweep.cells] == ["full,seed=0", "full,seed=1", "bitfit,seed=0"]


def test_the_command_line_changes_the_section_and_all_cells():
    axes = (("seed", (0, 1)),)
    sweep = read([("ablate.jobs", "2"), ("train.epochs", "3")], axes=axes)
    assert sweep.options.jobs == 2
    assert [cell.config.train.epochs for cell in sweep.cells] == [3, 3]
    assert ("train.epochs", "3") in sweep.cells[0].overrides


def test_an_override_without_effect_is_refused():
    axes = (("seed", (0, 1)), ("s", ({"freeze.strategy": "full"},)))
    for name, text, said in (
        ("seed", "3", "as the axis seed sets it"),
        ("freeze.strategy", "bitfit", "as the axis s sets it"),
        ("optimizer.learning_rate", "0.2", "learning_rates are tried"),
    ):
        refused(f"config.{name}", said, overrides=((name, text),), axes=axes, learning_rates=(1.0,))


def test_a_value_may_bring_its_own_learning_rates():
    low = {"freeze.strategy": "full", "learning_rates": (0.001, 0.01)}
    sweep = read(axes=(("s", strategies("linear_probe", low)),), learning_rates=(0.1, 1.0))
    assert [cell.rates for cell in sweep.cells] == [(0.1, 1.0), (0.001, 0.01)]


def test_all_values_may_bring_their_own_learning_rates():
    one = {"freeze.strategy": "full", "learning_rates": (0.1, 0.2)}
    two = {"freeze.strategy": "top_k", "learning_rates": (0.3, 0.4)}
    sweep = read(axes=(("strategy", (one, two)),))
    assert [cell.rates for cell in sweep.cells] == [(0.1, 0.2), (0.3, 0.4)]


def test_names_are_safe_in_paths():
    sweep = read(axes=(("model.pretrained", ("/a/../b c", "owner/net")), ("seed", (0,))))
    assert [cell.values["model.pretrained"] for cell in sweep.cells] == ["b_c", "net"]
    sweep = read(axes=(("x", ({"name": "../../etc", "seed": 1},)),))
    assert "/" not in sweep.cells[0].name and not sweep.cells[0].name.startswith(".")


@pytest.mark.parametrize(
    ("ablate", "said"),
    [
        ({}, ["axes"]),
        ({"axes": ()}, ["axes"]),
        ({"axes": (("freeze.stategy", ("full",)),)}, ["freeze.stategy", "freeze.strategy?"]),
        ({"axes": (("seed", ()),)}, ["seed", "no tuple of values"]),
        ({"axes": (("seed", "01"),)}, ["seed", "no tuple of values"]),
        ({"axes": (("seed", (0, 0)),)}, ["two cells are called 'seed=0'"]),
        ({"axes": (("seed", (0,)), ("seed", (1,)))}, ["twice"]),
        ({"axes": "seed"}, ["axes", "'seed'", "as in"]),
        ({"axes": (("seed", (0, 1)),), "measure": None}, ["ablate.measure", "is a section"]),
        ({"axes": (("seed", (0, 1)),), "measure": {"source": "mnist"}}, ["'mnist'", "tfds:NAME"]),
        ({"axes": (("control", ("random_trunk",)),)}, ["config.control", "freeze.strategy"]),
        (
            {"axes": (("s", ({"seed": 3, "freeze.strategy": "full"},)), ("seed", (0, 1)))},
            ["seed: both s and seed set it"],
        ),
        (
            {"axes": (("s", ({"name": "a", "seed": 1}, {"name": "b", "seed": 1})),)},
            ["'a' and 'b' are the same run"],
        ),
        (
            {"axes": (("s", ({"seed": 0, "learning_rates": 0.1},)),), "learning_rates": (0.1,)},
            ["learning_rates", "0.1", "a tuple"],
        ),
        ({"axes": (("seed", (0, 1)),), "keep": lambda cell: False}, ["no cell", "drops all 2"]),
        ({"axes": (("seed", (0, 1)),), "keep": 3}, ["keep", "no function"]),
        ({"axes": (("seed", (0, -1)), ("train.epochs", (0,)))}, ["config.seed", "train.epochs"]),
        ({"axes": (("freeze.strategy", ("ful",)),)}, ["'ful'", "full?"]),
        ({"axes": (("x", ({"freeze.strategy": "full", "freeze.k": 1},)),)}, ["freeze.k"]),
        ({"axes": (("seed", (0,)),), "lancher": "ray"}, ["ablate.lancher", "ablate.launcher?"]),
        ({"axes": (("seed", (0,)),), "launcher": "slurm"}, ["'slurm' is none of local, ray"]),
        ({"axes": (("seed", (0,)),), "compare": "model"}, ["compare", "'model'"]),
        ({"axes": (("seed", (0,)),), "learning_rates": (0.1, -1)}, ["learning_rates"]),
        (
            {"axes": (("seed", (0, 1)), ("train.epochs", (1,))), "combine": "list"},
            ["seed has 2", "train.epochs has 1"],
        ),
        (
            {"axes": (("optimizer.learning_rate", (0.1,)),), "learning_rates": (1.0,)},
            ["without effect"],
        ),
        ({"axes": ((None, (0, 1)),)}, ["None is no axis's name"]),
        ({"axes": (("s", ({3: "full"},)),)}, ["s: 3 is no name"]),
        ({"axes": (("s", ({"name": 7, "seed": 1},)),)}, ["s: 7 is no name"]),
        ({"axes": (("seed", (0, 1)),), "keep": sys.exit}, ["ablate.keep fails", "SystemExit"]),
        (
            {"axes": (("seed", (0,)),), "measure": {"shifts": ("contrast",), "severities": ()}},
            ["measure.severities"],
        ),
        (
            {"axes": (("seed", (0,)),), "measure": {"shifts": ("contrast",), "severities": (1.0,)}},
            ["measure.severities: 1.0 is none of 1, 2"],
        ),
        (
            {
                "axes": (("s", ({"freeze.phases": ({"learning_rate": 0.1},), "seed": 0},)),),
                "learning_rates": (0.1, 0.2),
            },
            ["learning_rates: without effect on", "as freeze.phases sets"],
        ),
        (
            {"axes": (("probe.grid.learning_rate", ((0.1, 0.2),)),), "learning_rates": (0.1, 0.2)},
            ["learning_rates: without effect on", "as probe.grid.learning_rate sets"],
        ),
        (
            {"axes": (("seed", (0, 1)), ("probe.grid.seed", ((0, 1),)))},
            ["probe.grid.seed: in a sweep"],
        ),
        (
            {"axes": (("s", ({"seed": 0, "learning_rates": (1.0,)}, {"seed": 1})),)},
            ["give those of the other values, too"],
        ),
        (
            {
                "axes": (
                    ("s", ({"freeze.strategy": "full", "learning_rates": (0.1,)},)),
                    ("t", ({"train.epochs": 2, "learning_rates": (0.2,)},)),
                ),
                "learning_rates": (0.3,),
            },
            ["the values of s and t have their own"],
        ),
        (
            {
                "axes": (("s", ({"seed": 0, "learning_rates": (1.0, 2.0)}, {"seed": 1})),),
                "learning_rates": (0.1,),
            },
            ["budgets are matched"],
        ),
    ],
)
def test_mistakes_are_one_message(ablate, said):
    refused("config", *said, **ablate)


def test_a_control_on_the_command_line_is_refused():
    refused("config.control", overrides=[("control", "full")], axes=(("seed", (0,)),))


def test_a_search_needs_a_validation_split():
    refused(
        "validation",
        overrides=[("data.splits.validation", "None")],
        axes=(("seed", (0,)),),
        learning_rates=(0.1,),
    )


def test_a_constraint_that_fails():
    refused("ablate.keep", "KeyError", axes=(("seed", (0,)),), keep=lambda cell: cell["k"])
