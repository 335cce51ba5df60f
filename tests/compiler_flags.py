"""Flags with which XLA compiles the tests' small programs in half the time.

They leave out LLVM's optimizer and the emitters of fused loops. Neither changes what a program
computes, but for last bits: a loop of steps is a step's bits for users only. What compares such
runs in another process (`as_users`), and `.ci/run` repeats all tests of bits without the flags.
"""

import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import os
import pathlib
from collections.abc import Iterator


def _known(flag: str) -> bool:
    """Whether the installed jaxlib has it: an unknown flag ends the process."""
    package = importlib.util.find_spec("jaxlib")
    assert package is not None and package.origin is not None
    name = flag.lstrip("-").partition("=")[0].encode()
    libraries = pathlib.Path(package.origin).parent.glob("*.so")
    return any(name in library.read_bytes() for library in libraries)


_FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
FAST = () if "TL_JAX_TESTS_AS_USERS" in os.environ else tuple(filter(_known, _FLAGS))
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
