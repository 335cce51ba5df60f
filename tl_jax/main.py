"""The command line: flags → configuration → one of the modes; errors → one message, exit code 2."""

import argparse
import dataclasses
import errno
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_jax import ablation_config, config_files, process
from tl_jax.config import Config, Probe
from tl_jax.errors import NOT_UTF8, RunFailed, UserError, is_text, printable, printable_lines

# Fields that mean something to --mode eval.
_EVALUATION = (
    "data.",
    "model.dtype",
    "model.precision",
    "model.image_size",
    "parallel",
    "logging.",
)
MODES = ("train", "plan", "eval", "predict", "ablate")
_DISK_ERRORS = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EEXIST: "a file is in the way",
    errno.EFBIG: "a file would become larger than is allowed here",
    errno.EIO: "the disk fails to read or write",
    errno.ESTALE: "the network file system has lost the file",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "the machine has too many files open",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ELOOP: "too many symbolic links",
    errno.ETIMEDOUT: "the file system does not answer",
    errno.EISDIR: "a directory is in the way",
}


_report_unraisable = sys.unraisablehook


def _unraisable(event: Any) -> None:
    if str(event.exc_value) != "Event loop is closed":
        _report_unraisable(event)


def _nothing(event: Any) -> None:
    pass


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed run, 2 for a user's error."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):  # which may be of another encoding than UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Of a damaged checkpoint TensorStore's threads still tell an event loop that Orbax has closed.
    sys.unraisablehook = _unraisable
    try:
        flags, overrides = _parse(arguments)
        _run(flags, overrides, arguments)
    except UserError as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"run failed: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.unraisablehook = _nothing  # what was cut off while it came about cannot end well
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = printable(str(error.filename or flags.workdir))
        print(f"error: {where}: {_DISK_ERRORS[error.errno]}", file=sys.stderr)
        return 2
    return 0


def _run(
    flags: argparse.Namespace, overrides: list[tuple[str, str]], arguments: Sequence[str]
) -> None:
    if (flags.mode == "predict") != bool(flags.images):
        raise UserError("--mode predict and --images a.png b.png … go together")
    if flags.mode == "predict":
        process.start(None)
        from tl_jax import inference

        inference.predict(flags.workdir, flags.images)
        return
    fields = _fields(flags)
    if flags.mode == "ablate" or (flags.mode == "plan" and ablation_config.is_sweep(fields)):
        _sweep(flags, fields, overrides, arguments)
        return
    if idle := dict.fromkeys(name for name, _ in overrides if name.startswith("ablate.")):
        raise UserError(f"config.{', config.'.join(idle)}: without effect in --mode {flags.mode}")
    config = config_files.resolve(
        {name: value for name, value in fields.items() if name != "ablate"},
        overrides,
        recorded=flags.config is None,
    )
    process.start(config.logging.compilation_cache)
    if flags.mode == "eval":
        idle = dict.fromkeys(n for n, _ in overrides if not n.startswith(_EVALUATION))
        if idle:
            raise UserError(
                f"config.{', config.'.join(idle)}: without effect in --mode eval, which takes the "
                "network as it was trained"
            )
        from tl_jax import inference

        inference.evaluate(config, flags.workdir)
        return

    from tl_jax import display, planning, trainer
    from tl_jax.workdir import WorkDir

    if flags.mode == "plan":
        planning.plan(config, flags.workdir)
        return
    if (WorkDir(flags.workdir).path / "ablation").exists():
        raise UserError(f"{flags.workdir} holds a sweep: give the run another --workdir")
    beside = os.path.join(flags.workdir, "control")
    control = None if config.control is None else _control(config)
    if control is not None:  # refused now rather than after the run that it stands beside
        WorkDir(flags.workdir).claim(config)
        WorkDir(beside).claim(control)
    summary = trainer.train(config, flags.workdir)
    display.console.print(display.result(summary, flags.workdir))
    if control is not None:
        display.console.print(f"\nThe control, {config.control}:")
        other = trainer.train(control, beside)
        display.console.print(display.side_by_side(summary, other))
    command = ["python", "run.py", f"--config={flags.config}"]
    command += [
        f"--config.{name}={value}"
        for name, value in overrides
        if not name.startswith(("freeze.", "probe."))
        or (name, value) in (("freeze.batch_norm", "batch"), ("freeze.batch_norm", "reestimate"))
    ]
    own_head = summary["model"]["head"] is not None
    hints = display.what_next(command, flags.workdir, config, own_head)
    display.console.print(hints, soft_wrap=True)


def _sweep(
    flags: argparse.Namespace,
    fields: Mapping[str, Any],
    overrides: list[tuple[str, str]],
    arguments: Sequence[str],
) -> None:
    """Plans or runs a sweep; its processes start JAX, this one does not."""
    if not ablation_config.is_sweep(fields):
        raise UserError(f"{flags.config} has no `ablate` section: see configs/ablation_quickstart")
    from tl_jax import ablation

    sweep = ablation_config.read(flags.config, fields, overrides)
    if flags.mode == "plan":
        ablation.plan(sweep)
    else:
        ablation.run(sweep, flags.workdir, ["python", "run.py", *arguments])


def _control(config: Config) -> Config:
    """The same run with another strategy, of default options, and no control."""
    assert config.control is not None
    other = config_files.with_strategy(config, config.control)
    if config.control == "from_scratch":  # trains more than a head
        return dataclasses.replace(other, control=None, probe=Probe())
    grid = dataclasses.replace(config.probe.grid, seed=None)  # which a random trunk depends on
    return dataclasses.replace(
        other, control=None, probe=dataclasses.replace(config.probe, grid=grid)
    )


def _fields(flags: argparse.Namespace) -> dict[str, Any]:
    """Those of the config file, or of the work directory where there is none."""
    if flags.config is not None:
        return config_files.load_config(flags.config)
    from tl_jax.workdir import WorkDir

    return WorkDir(flags.workdir).config()


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the `--config.FIELD=VALUE` (or `--config.FIELD VALUE`) overrides apart."""
    rest, overrides = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"--config.{name} has no value: write --config.{name}=VALUE")
        overrides.append((name, value))
    flags = _flags().parse_args(rest)
    if flags.config is None and (flags.workdir is None or flags.mode not in ("eval", "predict")):
        least = "--workdir" if flags.mode in ("eval", "predict") else "--config configs/NAME.py"
        raise UserError(f"--mode {flags.mode} needs {least}")
    if flags.workdir == "":
        raise UserError("--workdir is empty: name a directory")
    for word in filter(None, (flags.config, flags.workdir, *(value for _, value in overrides))):
        if not is_text(word):
            raise UserError(f"{word!r} is {NOT_UTF8}")
    if flags.workdir is None:
        flags.workdir = os.path.join("runs", Path(flags.config).stem)
    return flags, overrides


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Transfer learning of image classifiers.",
        epilog="Any field of the configuration: --config.FIELD=VALUE, "
        "as in --config.optimizer.learning_rate=0.01",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="configs/NAME.py", help="defines get_config()")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/NAME")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="for --mode predict")
    return parser
