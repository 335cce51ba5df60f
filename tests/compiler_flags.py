"""Flags with which XLA compiles the tests' small programs in half the time.

They leave out LLVM's optimizer and the emitters of fused loops. Neither changes what a program
computes, but for last bits: a loop of steps is a step's bits for users only. What compares such
runs in another process (`as_users`), and `.ci/run` repeats all tests of bits without the flags.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator


def _known(flags: tuple[str, ...]) -> bool:
    """Whether the installed XLA takes them: an unknown flag ends the process."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(start, env=environment, capture_output=True).returncode


def _fast() -> tuple[str, ...]:
    """The flags that the installed XLA takes; asked once, pytest's other processes inherit it."""
    if "TL_JAX_TESTS_AS_USERS" in os.environ:
        return ()
    if "TL_JAX_TESTS_FLAGS" not in os.environ:
        level, emitters = (
            "--xla_backend_optimization_level=0",
            "--xla_cpu_use_fusion_emitters=false",
        )
        found = (level, emitters) if _known((level, emitters)) else (level,)
        os.environ["TL_JAX_TESTS_FLAGS"] = " ".join(found)
    return tuple(os.environ["TL_JAX_TESTS_FLAGS"].split())


FAST = _fast()
DEVICES = "--xla_force_host_platform_device_count=8"


@contextlib.contextmanager
def as_users() -> Iterator[concurrent.futures.Executor]:
    """A process on 8 devices that compiles as it does for users."""
    here = os.environ["XLA_FLAGS"]
    spawn = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as executor:
        os.environ["XLA_FLAGS"] = DEVICES
        try:
            executor.submit(os.getpid).result()
        finally:
            os.environ["XLA_FLAGS"] = here
        yield executor
