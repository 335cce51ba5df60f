"""Flags with which XLA compiles the tests' small programs in a third of the time.

They leave out LLVM's optimizer and the emitters of fused loops; neither changes what a program
computes, but for last bits, and tests compare bits of programs that were compiled alike. `.ci/run`
repeats the tests of bits without them, as users compile.
"""

import importlib.util
import os
import pathlib


def _known(flag: str) -> bool:
    """Whether the installed jaxlib has it: an unknown flag ends the process."""
    package = importlib.util.find_spec("jaxlib")
    assert package is not None and package.origin is not None
    name = flag.lstrip("-").partition("=")[0].encode()
    libraries = pathlib.Path(package.origin).parent.glob("*.so")
    return any(name in library.read_bytes() for library in libraries)


_FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
FAST = () if "TL_JAX_TESTS_AS_USERS" in os.environ else tuple(filter(_known, _FLAGS))
