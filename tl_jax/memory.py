"""How much memory there is, for what may be kept in it, and how much was held."""

import contextlib
import os
import resource
from pathlib import Path

import jax

_CGROUP = Path("/sys/fs/cgroup")


def host_available() -> int:
    """Bytes that this process could still take without swapping, as Linux estimates them.

    A container's limit counts, too; pages of files that it can give up (`inactive_file`) count as
    free, as in the working set of Kubernetes. Elsewhere than on Linux: all physical memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # none is set, or no such hierarchy
        return free
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        used -= int(dict(line.split() for line in lines)["inactive_file"])
    return max(min(free, limit - used), 0)


def device_available() -> int:
    """Bytes that are free on each local device; those of a CPU share the host's memory."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return host_available() // jax.local_device_count()
        free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(free)


def reset_peak() -> None:
    """Starts `peak` anew, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes held at once: on an accelerator since the process began, else resident ones here.

    Resident are pages of mapped files, too; they are counted since `reset_peak`.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
