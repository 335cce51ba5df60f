import dataclasses

import pytest

from tl_jax import config as config_lib
from tl_jax import config_files
from tl_jax.errors import UserError

MINIMAL = {"model": {"pretrained": "a/b"}, "data": {"source": "tfds:digits"}}


def message(fields, overrides=()):
    with pytest.raises(UserError) as caught:
        config_files.resolve(fields, overrides)
    return str(caught.value)


def test_defaults_fill_what_is_left_out():
    config = config_files.resolve(MINIMAL)
    assert config.model.pretrained == "a/b"
    assert config.optimizer == config_lib.Optimizer()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_overrides_take_the_type_of_the_field():
    config = config_files.resolve(
        MINIMAL,
        [
            ("optimizer.learning_rate", "1e-3"),
            ("train.epochs", "3"),
            ("train.gradient_clip_norm", "1"),
            ("model.revision", "123"),
            ("data.splits.validation", "None"),
            ("data.skip_unreadable", "true"),
            ("freeze.strategy", "patterns"),
            ("freeze.patterns", "[('stages_3', 0.1), ('.*', 'frozen')]"),
            ("optimizer.warmup", "5%"),
        ],
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.epochs == 3
    assert config.train.gradient_clip_norm == 1.0
    assert type(config.train.gradient_clip_norm) is float
    assert config.model.revision == "123"
    assert config.data.splits.validation is None
    assert config.data.skip_unreadable is True
    assert config.freeze.options == {"patterns": (("stages_3", 0.1), (".*", "frozen"))}
    assert config.optimizer.warmup == "5%"


def test_all_problems_are_reported_at_once_with_the_nearest_name():
    text = message(
        {**MINIMAL, "optimiser": {"learning_rate": 1.0}, "train": {"epochs": "ten"}},
        [("data.batchsize", "3"), ("lr", "0.1"), ("optimizer.name", "adamv"), ("seed", "1.5")],
    )
    assert (
        "config.optimiser.learning_rate: no such field; did you mean optimizer.learning_rate?"
        in text
    )
    assert "config.train.epochs: 'ten' is str, not int" in text
    assert "config.data.batchsize: no such field; did you mean data.batch_size?" in text
    assert "config.lr: no such field" in text
    assert "config.optimizer.name: 'adamv' is none of sgd, adam, adamw" in text
    assert "config.seed: 1.5 is float, not int" in text


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("train.epochs", "0", "less than 1"),
        ("optimizer.learning_rate", "0", "not more than 0"),
        ("optimizer.learning_rate", "1e999", "not finite"),
        ("train.label_smoothing", "1.0", "not less than 1"),
        ("optimizer.warmup", "5 parsecs", "is no duration"),
        ("data.source", "fashion_mnist", "none of tfds:NAME"),
        ("data.batch_size", "True", "is bool, not int"),
        ("train.gradient_accumulation", "3", "does not divide"),
        ("model.pretrained", "", "name a Hub id or a folder"),
    ],
)
def test_values_that_make_no_sense(name, value, part):
    text = message(MINIMAL, [(name, value)])
    assert (
        part in text
        and f"config.{name.replace('train.gradient_acc', 'data.batch_size')[:8]}" in text
    )


def test_config_files(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from tl_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optimizer.learning_rat = 3\n"
        "    config.train.epochs = 7\n"
        "    return config\n"
    )
    fields = config_files.load_config(str(file))
    assert fields["train"]["epochs"] == 7
    assert "learning_rat: no such field; did you mean optimizer.learning_rate" in message(fields)
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="does not define get_config"):
        config_files.load_config(str(file))
    file.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        config_files.load_config(str(file))
    file.write_text("def get_config(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        config_files.load_config(str(file))
    with pytest.raises(UserError, match=r"no config file .*there are .*c\.py"):
        config_files.load_config(str(tmp_path / "d.py"))


def test_hash_leaves_out_what_does_not_change_the_result():
    config = config_files.resolve(MINIMAL)
    same = [
        ("parallel", "shard_map"),
        ("data.dir", "/x"),
        ("logging.every_steps", "7"),
        ("control", "random_trunk"),
        ("train.checkpoint_every_steps", "3"),
    ]
    other = [("seed", "1"), ("optimizer.learning_rate", "0.2")]
    for override in same:
        assert config_lib.config_hash(config_files.resolve(MINIMAL, [override])) == (
            config_lib.config_hash(config)
        )
    for override in other:
        changed = config_files.resolve(MINIMAL, [override])
        assert config_lib.config_hash(changed) != config_lib.config_hash(config)
        (line,) = config_lib.differences(changed, config_lib.to_dict(config))
        assert line.startswith(f"config.{override[0]}:")


def test_the_options_in_a_file_belong_to_the_strategy_in_the_file():
    fields = {**MINIMAL, "freeze": {"strategy": "top_k", "k": 2, "batch_norm": "batch"}}
    assert config_files.resolve(fields, [("seed", "1")]).freeze.options == {"k": 2}
    other = config_files.resolve(fields, [("freeze.strategy", "full")]).freeze
    assert (other.strategy, other.options, other.batch_norm) == ("full", {}, "batch")
    text = message(fields, [("freeze.strategy", "full"), ("freeze.k", "3")])
    assert "config.freeze.k: the strategy full takes no such option" in text


def test_options_are_recorded_with_their_defaults():
    config = config_files.resolve(MINIMAL, [("freeze.strategy", "top_k")])
    assert config_lib.to_dict(config)["freeze"]["k"] == 1
    explicit = config_files.resolve(MINIMAL, [("freeze.strategy", "top_k"), ("freeze.k", "1")])
    assert config_lib.config_hash(explicit) == config_lib.config_hash(config)
    more = config_files.resolve(MINIMAL, [("freeze.strategy", "top_k"), ("freeze.k", "2")])
    assert config_lib.differences(more, config_lib.to_dict(config)) == [
        "config.freeze.k: 1 there, 2 here"
    ]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"strategy": "linear_prob"}, "did you mean linear_probe?"),
        ({"strategy": ["full"]}, "config.freeze.strategy: ['full'] is list, not str"),
        ({"strategy": "full", "k": 2}, "the strategy full takes no such option"),
        ({"strategy": "top_k", "K": 2}, "no such field; did you mean freeze.k?"),
        ({"strategy": "top_k", "k": 0}, "config.freeze.k: 0 is less than 1"),
        ({"strategy": "lora", "rank": 1.5}, "config.freeze.rank: 1.5 is float, not int"),
        ({"strategy": "lora", "targets": ["("]}, "'(' is no regular expression"),
        ({"strategy": "patterns", "patterns": [["(", "train"]]}, "is no regular expression"),
        ({"strategy": "patterns", "patterns": [["a", "freeze"]]}, "'freeze' is none of"),
        ({"strategy": "patterns", "patterns": [["b"]]}, "('b',) is no pair"),
        ({"strategy": "patterns", "patterns": [["c", -1]]}, "-1 is none of"),
        ({"strategy": "wise_ft", "coefficients": [0, 2]}, "no list of numbers from 0 to 1"),
        ({"discriminative": [1]}, "is no pair of a lowest and a highest"),
        ({"discriminative": [0.1, 1], "layer_decay": 0.5}, "goes without freeze.layer_decay"),
        ({"discriminative": [0.1, float("inf")]}, "is no pair of a lowest and a highest"),
        ({"layer_decay": 1e300}, "config.freeze.layer_decay: 1e+300 is not less than 1.0"),
        ({"reestimate": "after"}, "goes with freeze.batch_norm=reestimate only"),
        ({"phases": [3]}, "config.freeze.phases[0]: 3 is no dict"),
        ({"phases": [{"epoch": 1}]}, "config.freeze.phases[0].epoch: no such field; did you mean"),
        ({"phases": [{"learning_rate": 0}]}, "phases[0].learning_rate: 0.0 is not more than 0"),
        ({"phases": [{}, {"warmup": "soon"}]}, "config.freeze.phases[1].warmup: 'soon' is no"),
    ],
)
def test_what_a_strategy_does_not_take(fields, part):
    assert part in message({**MINIMAL, "freeze": fields})


def test_abbreviations_and_numbers_that_are_none():
    text = message(MINIMAL, [("optimizer.lr", "1"), ("optimizer.weight_decay", "nan")])
    assert "did you mean optimizer.learning_rate?" in text
    assert "config.optimizer.weight_decay: nan is not finite" in text


def test_a_written_config_is_the_same_config():
    config = config_files.resolve(
        {**MINIMAL, "freeze": {"strategy": "patterns", "patterns": [["a", "train"]]}}
    )
    assert config_files.resolve(config_lib.to_dict(config)) == config


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (7, 7),
        ("7", 7),
        ("7 steps", 7),
        ("1 step", 1),
        ("2 epochs", 20),
        ("0.5 epochs", 5),
        ("5%", 4),
    ],
)
def test_durations(duration, steps):
    assert config_lib.steps_of(duration, steps_per_epoch=10, total_steps=80) == steps
