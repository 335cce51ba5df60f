"""The start of a process that computes: what must come before anything asks JAX for devices."""

import logging
import os
import tempfile

from tl_jax.errors import printable


def start(compilation_cache: str | None) -> None:
    """Sets JAX up, and silences the console of every process but the first.

    Args:
      compilation_cache: folder of programs that other processes compiled; None for none.
    """
    import jax
    from absl import logging as absl_logging

    from tl_jax import display, parallel

    if compilation_cache is not None and _writable(folder := os.path.expanduser(compilation_cache)):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    absl_logging.set_verbosity(absl_logging.FATAL)  # what Orbax fails at, it raises, too
    parallel.start()
    display.console.quiet = not parallel.is_first()


def _writable(cache: str) -> bool:
    """Whether the folder takes files; says so where it does not. JAX would warn at each of them."""
    if "://" in cache:
        return True
    try:
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return True
    except OSError as error:
        reason = f"logging.compilation_cache {cache} cannot be written ({error.strerror})"
        logging.warning("%s: going on without it", printable(reason))
        return False
