"""The command line's contract, through `main` as run.py calls it."""

import errno
import json
import os
import shutil
import signal
import socket
import time

import command_line
import numpy as np
import pytest
from command_line import read_json, write_config
from image_fixtures import noise
from image_fixtures import write_folder as write_images
from PIL import Image
from safetensors.numpy import load_file, save_file

from tl_jax import certificate, config_files, inference, trainer, workdir
from tl_jax.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("main")


@pytest.fixture(scope="module")
def config(network, folder):
    """A config file of a short run; the name of its default work directory is `short`."""
    return write_config(folder / "short.py", network("resnet_gray"))


@pytest.fixture(scope="module")
def trained(config, folder):
    """The work directory of a finished run."""
    path = folder / "trained"
    assert main(["--config", str(config), "--workdir", str(path)]) == 0
    return path


@pytest.fixture
def fails(capsys):
    """`fails(words, *arguments)`: exit code 2 with one message that holds the words."""

    def check(words, *arguments, code=2):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == code
        complained = capsys.readouterr().err
        for word in [words] if isinstance(words, str) else words:
            assert str(word) in complained, f"{word!r} is not in: {complained}"
        assert "Traceback" not in complained
        return complained

    return check


def files(folder):
    """Every file below a folder with its bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


# How flags are written


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "short.py", "--mode", "plan", "--config.freeze.strategy=full"],
        ["--config.freeze.strategy=full", "--mode=plan", "--config=short.py"],
        ["--mode", "plan", "--config.freeze.strategy", "full", "--config", "./short.py"],
    ],
)
def test_flags_in_any_order_and_form(config, folder, tmp_path, monkeypatch, capsys, arguments):
    shutil.copy(config, tmp_path / "short.py")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert read_json(tmp_path / "runs" / "short" / "plan.json")["strategy"] == "full"
    assert "Plan: full" in capsys.readouterr().out


def test_later_overrides_win_and_take_every_type(config, tmp_path):
    overrides = {
        "optimizer.learning_rate": ("1e-3", 1e-3),
        "train.gradient_clip_norm": ("2", 2.0),
        "data.splits.validation": ("None", None),
        "data.skip_unreadable": ("true", True),
        "optimizer.warmup": ("1 epochs", "1 epochs"),
        "train.epochs": ("1", 1),
    }
    words = [f"--config.{name}={text}" for name, (text, _) in overrides.items()]
    arguments = ["--config", str(config), "--workdir", str(tmp_path), "--config.train.epochs=7"]
    assert main([*arguments, *words]) == 0
    found = read_json(tmp_path / "config.json")
    for name, (_, value) in overrides.items():
        *sections, leaf = name.split(".")
        section = found
        for key in sections:
            section = section[key]
        assert section[leaf] == value, name
    assert "validation" not in read_json(tmp_path / "summary.json")["metrics"]


def test_a_plan_blocks_nothing(config, tmp_path):
    path = tmp_path / "run"
    arguments = ["--config", str(config), "--workdir", str(path)]
    assert main([*arguments, "--mode", "plan", "--config.freeze.strategy=full"]) == 0
    assert files(path).keys() == {"plan.json", "figures/plan.png"}
    assert main([*arguments, "--config.train.epochs=1"]) == 0
    assert read_json(path / "plan.json")["strategy"] == "linear_probe"


def test_started_again_it_is_finished(config, trained, capsys):
    before = files(trained)
    assert main(["--config", str(config), "--workdir", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "finished" in printed and "test accuracy" in printed
    assert files(trained) == before


def test_a_finished_run_without_its_configuration(fails, config, trained, tmp_path, capsys):
    """Its hash is in the summary: another configuration is not answered with its results."""
    path = tmp_path / "copy"
    shutil.copytree(trained, path)
    (path / "config.json").unlink()
    arguments = ["--config", str(config), "--workdir", str(path)]
    fails("holds a finished run of another", *arguments, "--config.optimizer.learning_rate=0.02")
    assert main(arguments) == 0
    assert "finished" in capsys.readouterr().out


# What is wrong with the command or the configuration


def test_all_misspelt_and_ill_typed_fields_at_once(fails, config, tmp_path):
    message = fails(
        [
            "config.optimizer.learning_rat: no such field; did you mean optimizer.learning_rate?",
            "config.train.epochs: 'many' is str, not int",
            "config.freeze.strategy: 'linear_prob' is none of",
            "config.data.augmentation: 'flop' is none of none, flip, random_resized_crop",
        ],
        *("--config", config, "--workdir", tmp_path / "run"),
        *("--config.optimizer.learning_rat=1", "--config.train.epochs=many"),
        *("--config.freeze.strategy=linear_prob", "--config.data.augmentation=flop"),
    )
    assert "did you mean linear_probe?" in message and "did you mean flip?" in message
    assert not (tmp_path / "run").exists()


def test_config_files_that_cannot_be_used(fails, config, tmp_path):
    fails(["no config file", "shirt.py", "short.py"], "--config", config.parent / "shirt.py")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    fails(["broken.py fails", "SyntaxError"], "--config", broken)
    broken.write_text("x = 1\n")
    fails("does not define get_config()", "--config", broken)


def test_a_config_file_that_ends_the_program(fails, tmp_path):
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(3)\n")
    fails("ends.py fails: SystemExit: 3", "--config", tmp_path / "ends.py")


def test_sections_are_no_fields(fails, config):
    splits = "data.splits.train, data.splits.validation, data.splits.test"
    said = fails(
        f"config.data.splits: is a section; its fields are {splits}\n",
        *("--config", config, "--config.data.splits=train", "--config.train=3"),
    )
    assert "config.train: is a section; its fields are train.epochs, " in said


def test_arguments_that_are_not_utf8(fails, config):
    fails(r"'a\udcff' is not UTF-8", "--config", config, "--workdir", "a\udcff")
    fails(r"'a\udcff' is not UTF-8", "--config", config, "--config.data.source=a\udcff")


def test_a_compilation_cache_that_cannot_be_written(config, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "run"), "--mode", "plan"]
    arguments.append(f"--config.logging.compilation_cache={tmp_path / 'file' / 'below'}")
    assert main(arguments) == 0
    (record,) = caplog.records
    reason = "below cannot be written (Not a directory): going on without it"
    assert record.getMessage() == f"logging.compilation_cache {tmp_path}/file/{reason}"


def test_another_control_is_refused_before_the_run(fails, config, tmp_path, monkeypatch):
    path = tmp_path / "run"
    arguments = ["--config", str(config), "--workdir", str(path), "--config.train.epochs=1"]
    assert main([*arguments, "--config.control=random_trunk"]) == 0
    monkeypatch.setattr(trainer, "train", None)
    words = [f"{path / 'control'} holds a run with another configuration", "config.freeze.strategy"]
    fails(words, *arguments, "--config.control=from_scratch")


def test_incomplete_commands(fails, config, tmp_path, capsys):
    fails("--config configs/NAME.py")
    fails("--workdir", "--mode", "eval")
    fails("--images", "--mode", "predict", "--workdir", tmp_path)
    fails("--config.seed has no value", "--config", config, "--config.seed")
    for wrong in (["--mode", "trian"], ["--confg", "x"], ["--work", "x"]):
        with pytest.raises(SystemExit) as left:
            main(["--config", str(config), *wrong])
        assert left.value.code == 2
        assert wrong[-1] in capsys.readouterr().err


def test_another_configuration_in_the_same_place(fails, config, trained):
    before = files(trained)
    other = ["--config", str(config), "--workdir", str(trained), "--config.freeze.strategy=full"]
    assert main([*other, "--mode", "plan"]) == 0  # shown, but the run keeps its own
    assert main([*other[:4], "--mode", "eval", "--config.data.splits.test=test[:40]"]) == 0
    assert files(trained) == before
    words = ["config.seed: 0 there, 1 here", "--workdir"]
    fails(words, "--config", config, "--workdir", trained, "--config.seed=1")
    assert files(trained) == before


# What is wrong with the weights


def damaged(network, tmp_path, damage):
    """A copy of a network that `damage(folder)` spoilt."""
    path = tmp_path / "weights"
    shutil.copytree(network("resnet_gray"), path)
    damage(path)
    return path


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 5000)


def point_outside(path):
    (path / "model.safetensors").rename(path.parent / "secret.safetensors")
    index = {"weight_map": {"classifier.1.bias": "../secret.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def reshape(path):
    tensors = load_file(path / "model.safetensors")
    key = "resnet.embedder.embedder.convolution.weight"
    save_file({**tensors, key: tensors[key][:, :, :3]}, path / "model.safetensors")


def drop(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["resnet.embedder.embedder.convolution.weight"]
    save_file(tensors, path / "model.safetensors")


def retype(path):
    config = read_json(path / "config.json")
    (path / "config.json").write_text(json.dumps({**config, "model_type": "swin"}))


def pickle_only(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "model.safetensors").unlink(), ["weights", "model.safetensors"]),
        (lambda path: shutil.rmtree(path), "no folder"),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "JSON"]),
        (cut, "model.safetensors"),
        (garble, "model.safetensors"),
        (point_outside, ["outside its folder", "../secret.safetensors"]),
        (reshape, "resnet.embedder.embedder.convolution.weight"),
        (drop, "convolution"),
        (retype, ["swin", "resnet", "vit"]),
        (pickle_only, ["pickle", "pytorch_model.bin"]),
    ],
)
def test_weights_that_cannot_be_used(fails, config, network, tmp_path, damage, words):
    weights = damaged(network, tmp_path, damage)
    work = tmp_path / "run"
    fails(
        [*([words] if isinstance(words, str) else words), weights],
        *("--config", config, "--workdir", work, f"--config.model.pretrained={weights}"),
    )
    # The same command with good weights goes through.
    assert not (work / "config.json").exists()


def test_a_damaged_checkpoint(fails, config, trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / "summary.json").unlink()
    newest = path / "checkpoints" / "6"
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    words = [f"the checkpoint {newest} cannot be restored", "Remove that folder"]
    assert "tensorstore_spec" not in fails(words, "--config", config, "--workdir", path)
    shutil.rmtree(newest)
    assert main(["--config", str(config), "--workdir", str(path)]) == 0
    assert command_line.results(path)["exported"] == command_line.results(trained)["exported"]


@pytest.mark.parametrize("name", ["position/metadata", "metrics/metrics"])
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_file_of_a_checkpoint(fails, config, trained, tmp_path, name, content):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / "summary.json").unlink()
    newest = path / "checkpoints" / "6"
    (newest / name).write_text(content)
    words = [f"the checkpoint {newest} cannot be restored", "Remove that folder"]
    fails(words, "--config", config, "--workdir", path)
    shutil.rmtree(newest)
    assert main(["--config", str(config), "--workdir", str(path)]) == 0
    assert command_line.results(path)["exported"] == command_line.results(trained)["exported"]


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_file_of_the_work_directory(fails, config, trained, tmp_path, name, content):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / name).write_bytes(content.encode("latin-1"))
    words = [f"{path / name} is damaged: ", "Remove it"]
    fails(words, "--config", config, "--workdir", path)
    if name == "config.json":
        fails(words, "--mode", "eval", "--workdir", path)
    (path / name).unlink()
    assert main(["--config", str(config), "--workdir", str(path)]) == 0
    assert command_line.results(path) == command_line.results(trained)


@pytest.mark.parametrize("line", ["[]", "null", "{}", "3", '{"step": "1"}'])
def test_a_line_of_metrics_that_is_no_record(fails, config, trained, tmp_path, line):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / "summary.json").unlink()
    log = path / "metrics.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    words = [f"{log} is damaged: line 1 is no record", "Remove that line"]
    fails(words, "--config", config, "--workdir", path)


# What is wrong with the data


def no_network(*args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_data_set_that_is_not_there(fails, config, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    start = time.monotonic()
    arguments = ("--config", config, "--workdir", tmp_path / "run")
    missing = ("--config.data.source=tfds:fashion_mnist", f"--config.data.dir={tmp_path}")
    fails(["fashion_mnist", "python -m tl_jax.prepare fashion_mnist"], *arguments, *missing)
    fails("no such folder", *arguments, "--config.data.source=folder:/nowhere")
    fails("none of tfds:NAME, hf:OWNER/NAME, folder:PATH", *arguments, "--config.data.source=mnist")
    fails("data.splits", *arguments, "--config.data.splits.test=tset")
    assert time.monotonic() - start < 20


def folder_arguments(config, images, work):
    """A run on a folder of images."""
    return [
        *("--config", str(config), "--workdir", str(work)),
        *(f"--config.data.source=folder:{images}", "--config.data.splits.train=train[:16]"),
        *("--config.data.splits.validation=train[16:]", "--config.data.splits.test=None"),
        *("--config.data.batch_size=8", "--config.train.epochs=1"),
    ]


def test_unreadable_images_in_a_folder(fails, config, tmp_path, capsys):
    images = write_images(tmp_path / "images", {"cat": 11, "dog": 12}, many_sizes=True)
    (images / "cat" / "broken.png").write_bytes(b"no image at all")
    arguments = folder_arguments(config, images, tmp_path / "run")
    fails(["1 of 24 images", "broken.png", "data.skip_unreadable"], *arguments)
    assert main([*arguments, "--config.data.skip_unreadable=True"]) == 0


def test_an_image_that_breaks_while_it_is_decoded(fails, config, tmp_path):
    images = write_images(tmp_path / "images", {"cat": 12, "dog": 12}, many_sizes=True)
    whole = (images / "dog" / "003.png").read_bytes()
    middle = len(whole) // 2
    (images / "dog" / "003.png").write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    words = ["dog/003.png", "data.skip_unreadable"]
    fails(words, *folder_arguments(config, images, tmp_path / "run"))


def test_sizes_that_do_not_fit(fails, config, tmp_path):
    work = tmp_path / "run"
    arguments = ("--config", config, "--workdir", work)
    fails("60 does not divide by 8 devices; 56 or 64", *arguments, "--config.data.batch_size=60")
    fails(["256", "192 examples"], *arguments, "--config.data.batch_size=256")
    assert not (work / "config.json").exists()


# What is wrong with the strategy


def test_strategies_that_train_nothing_or_match_nothing(fails, config, tmp_path):
    arguments = ("--config", config, "--workdir", tmp_path / "run", "--config.freeze.strategy")
    nothing = "--config.freeze.patterns=(('.*', 'frozen'),)"
    fails("no parameter trains", *arguments, "patterns", nothing)
    unused = "--config.freeze.patterns=(('clasifier', 'train'), ('', 'frozen'))"
    fails("nothing matches 'clasifier'", *arguments, "patterns", unused)
    half = "--config.freeze.patterns=(('^classifier', 'train'),)"
    fails("no pattern covers resnet.", *arguments, "patterns", half)
    fails("takes no such option", *arguments, "full", "--config.freeze.k=2")
    assert not (tmp_path / "run" / "config.json").exists()


# What is wrong with the work directory


def test_work_directories_that_cannot_be_written(fails, config, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "run"
    fails([below, "Not a directory"], "--config", config, "--workdir", below)
    fails([tmp_path / "file"], "--config", config, "--workdir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    fails("/proc/run", "--config", config, "--workdir", "/proc/run")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/there")


def test_a_full_disk(fails, config, tmp_path, monkeypatch):
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "run")]
    for where, name in [
        (workdir.WorkDir, "write_bytes"),
        (workdir.MetricsLog, "write"),
        (trainer.Checkpoints, "save"),
        (trainer.results, "_export"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full_disk)
            said = fails("somewhere/there: no space left", *arguments)
            assert said.lower().count("no space left") == 1
        assert not (tmp_path / "run" / "summary.json").exists()
    assert main(arguments) == 0  # there is space again, and nothing is in the way


def test_a_file_that_may_not_grow(fails, config, tmp_path, monkeypatch):
    def too_large(*_args, **_options):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "somewhere/there")

    monkeypatch.setattr(trainer.Checkpoints, "save", too_large)
    fails("somewhere/there: a file would become", "--config", config, "--workdir", tmp_path / "run")


# Runs that fail


def test_a_loss_that_is_not_finite_is_said_last(config, tmp_path, capsys):
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "run")]
    arguments += ["--config.optimizer.learning_rate=1e30", "--config.optimizer.name=sgd"]
    assert main([*arguments, "--config.freeze.strategy=full"]) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("run failed: ") and " at step " in last
    assert not (tmp_path / "run" / "summary.json").exists()


def test_devices_that_drift_apart_are_said_last(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer.steps.jax.lax, "pmean", lambda tree, axis_name: tree)
    arguments = ["--config", str(config), "--workdir", str(tmp_path)]
    for _ in range(2):  # no checkpoint of it may pass when it is started again
        assert main([*arguments, "--config.train.epochs=1"]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("run failed: the devices differ at step 3")


def test_a_broken_certificate_is_said_last(config, tmp_path, capsys, monkeypatch):
    real = certificate.certify
    monkeypatch.setattr(certificate, "certify", lambda *a, **o: {**real(*a, **o), "ok": False})
    arguments = ["--config", str(config), "--workdir", str(tmp_path)]
    for _ in range(2):  # nor does it pass when it is started again
        assert main([*arguments, "--config.train.epochs=1"]) == 1
        assert "certificate" in capsys.readouterr().err.splitlines()[-1]
    assert read_json(tmp_path / "summary.json")["freeze"]["certificate"]["ok"] is False


# The trained classifier at work


def test_eval_repeats_the_run_s_figures(trained, config, folder, monkeypatch):
    expected = read_json(trained / "summary.json")["metrics"]
    found = []
    real = inference.evaluate
    monkeypatch.setattr(inference, "evaluate", lambda *args: found.append(real(*args)))
    before = files(trained)
    assert main(["--mode", "eval", "--workdir", str(trained)]) == 0
    # 60 does not divide by the 8 devices, and nor do 130 examples by anything near.
    arguments = ["--mode", "eval", "--config.data.batch_size=60", "--config.parallel=shard_map"]
    exported = ["--config", str(config), "--workdir", str(trained / "export")]
    assert main([*arguments, *exported]) == 0
    for metrics in found:
        for split, figures in expected.items():
            loss = pytest.approx(figures["loss"], rel=1e-6)
            assert metrics[split] == {**figures, "loss": loss}
    after = files(trained)
    assert after.keys() == before.keys()
    assert after["summary.json"] == before["summary.json"]


def test_eval_refuses_what_it_would_not_do(fails, trained):
    arguments = ["--mode", "eval", "--workdir", trained]
    words = "config.head.kind, config.freeze.strategy: without effect in --mode eval"
    fails(words, *arguments, "--config.head.kind=mlp", "--config.freeze.strategy=full")
    fails("share 100 examples", *arguments, "--config.data.splits.test=train[:100]")


def test_numbers_that_are_not_finite_are_no_prediction(fails, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(inference.Pretrained, "apply", lambda self, x: np.full((1, 10), np.nan))
    noise(1).save(tmp_path / "a.png")
    arguments = ["--mode", "predict", "--workdir", trained, "--images", tmp_path / "a.png"]
    fails("not finite", *arguments, code=1)


@pytest.mark.parametrize("option", ["model.dtype=bfloat16", "model.image_size=20"])
def test_eval_computes_as_the_run_did(config, tmp_path, option):
    path = tmp_path / "run"
    arguments = ["--config", str(config), "--workdir", str(path), f"--config.{option}"]
    assert main([*arguments, "--config.train.epochs=1"]) == 0
    before = (path / "evaluation.json").read_bytes()
    (path / "evaluation.json").unlink()
    assert main(["--mode", "eval", "--workdir", str(path)]) == 0
    assert (path / "evaluation.json").read_bytes() == before
    classifier = inference.load_trained(str(path))
    assert classifier.module.dtype == read_json(path / "config.json")["model"]["dtype"]


def test_classes_cannot_steer_the_terminal(trained, tmp_path, capsys):
    shutil.copytree(trained / "export", tmp_path / "export")
    stored = read_json(tmp_path / "export" / "config.json")
    stored["id2label"] = {number: f"{number}\x1b[31m" for number in stored["id2label"]}
    (tmp_path / "export" / "config.json").write_text(json.dumps(stored))
    image = tmp_path / "a\x9b.png"
    noise(0).save(image)
    assert (
        main(["--mode", "predict", "--workdir", str(tmp_path / "export"), "--images", str(image)])
        == 0
    )
    printed = capsys.readouterr().out
    assert r"\x1b[31m" in printed and "\x1b" not in printed
    assert r"a\x9b.png" in printed and "\x9b" not in printed


def test_predict_agrees_with_the_evaluation(trained, folder, capsys, config):
    images = folder / "images"
    images.mkdir()
    job = trainer.job_lib.prepare(config_files.resolve(read_json(trained / "config.json")))
    pixels = np.stack([job.examples["test"][i]["image"] for i in range(3)])
    names = []
    for number, image in enumerate(pixels):
        names.append(str(images / f"{number}.png"))
        Image.fromarray(image[..., 0]).save(names[-1])
    classifier = inference.load_trained(str(trained))
    logits = np.asarray(classifier.apply(classifier.preprocess(pixels)))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    answers = inference.predict(str(trained / "export"), names)
    for answer, row in zip(answers, expected, strict=True):
        assert len(answer) == 5
        assert answer[0][0] == str(row.argmax())
        # Resized by Pillow here and on the device there: pixels may differ by 1/255.
        assert [p for _, p in answer] == pytest.approx(np.sort(row)[::-1][:5], abs=1e-3)
    capsys.readouterr()
    assert main(["--mode", "predict", "--images", *names, "--workdir", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert f"{answers[0][0][1]:.4f}" in printed


def test_predict_takes_images_of_every_kind(trained, tmp_path, capsys):
    kinds = {"gray.png": "L", "colour.jpg": "RGB", "clear.png": "RGBA", "wide.webp": "RGB"}
    for number, (name, mode) in enumerate(kinds.items()):
        noise(number, 20, 30 + number, mode).save(tmp_path / name)
    names = [str(tmp_path / name) for name in kinds]
    assert main(["--mode", "predict", "--workdir", str(trained), "--images", *names]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in kinds)


def test_predict_names_every_image_that_fails(fails, trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    noise(0).save(tmp_path / "good.png")
    images = [tmp_path / name for name in ("good.png", "broken.png", "missing.png")]
    message = fails(
        ["broken.png: not an image", "missing.png"],
        *("--mode", "predict", "--workdir", trained, "--images", *images),
    )
    assert "good.png" not in message


def test_there_must_be_a_classifier_and_a_data_set(fails, config, trained, tmp_path):
    noise(0).save(tmp_path / "image.png")
    images = ("--images", tmp_path / "image.png")
    fails(["empty", "neither"], "--mode", "predict", "--workdir", tmp_path / "empty", *images)
    fails("no work directory", "--mode", "eval", "--workdir", tmp_path / "empty")
    fails("--config", "--mode", "eval", "--workdir", trained / "export")
    (tmp_path / "begun").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "begun")
    fails("not finished", "--mode", "predict", "--workdir", tmp_path / "begun", *images)
    fails("not finished", "--mode", "eval", "--workdir", tmp_path / "begun")


# In a process of its own


def test_control_c_is_one_line(config, tmp_path):
    path = tmp_path / "run"
    arguments = ("--config", config, "--workdir", path, "--config.train.epochs=500")
    # A job in the background ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = command_line.start(*arguments)
    signal.signal(signal.SIGINT, before)
    log = path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130, complained
    assert complained.splitlines()[-1].startswith("interrupted; the same command continues")
    assert "Traceback" not in complained
    assert any((path / "checkpoints").iterdir())


def test_a_terminal_that_knows_ascii_only(config, tmp_path):
    path = tmp_path / "run"
    arguments = ("--config", config, "--workdir", path, "--config.train.epochs=1")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    printed, complained = command_line.run(*arguments, environment=ascii_only)
    assert "the least FLOPs" in printed and printed.isascii() and not complained
    assert (path / "export" / "README.md").read_text("utf-8")
    predict = ("--mode", "predict", "--workdir", path, "--images", tmp_path / "Käfer.png")
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    _, complained = command_line.run(*predict, environment=ascii_only, code=2)
    assert r"K\xe4fer.png: No such file" in complained and complained.isascii()


def test_the_script_passes_the_exit_code_on(tmp_path):
    _, complained = command_line.run("--config", tmp_path / "none.py", code=2)
    assert complained.startswith("error: no config file") and "Traceback" not in complained
