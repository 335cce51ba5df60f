"""Where the time of a GPU goes: a trace of `config.logging.profile_steps`, by kind of kernel.

    python run.py --config CONFIG --config.logging.profile_steps=20 --workdir RUN
    python benchmarks/trace.py RUN/profile [--top 12]

Adds up the kernels on each GPU's streams. Kernels are told apart by their names: matrix products
and convolutions (the GPU's tensor cores), what reorders memory, and the rest, which XLA fuses
(element by element, sums). `idle` is the time between the first kernel and the last in which none
ran. Prints a table by kind and the longest kernels, and one JSON line.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

from jax.profiler import ProfileData

# The first that matches decides.
KINDS = (
    ("attention", r"fmha|flash|sdpa"),
    ("convolution", r"fprop|dgrad|wgrad|conv(?!ert)|implicit_gemm"),
    ("matrix product", r"gemm|nvjet|cutlass|xmma|_dot_"),
    ("layout and copies", r"transpose|nchw|nhwc|memcpy|memset|copy|concat|pad"),
    ("pooling", r"select_and_scatter|reduce_window|pool"),
    ("sums", r"reduce"),
    ("element by element", r"fusion|loop|wrapped|convert"),
)


def kind_of(name):
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), "other")


def kernels(folder):
    """(name, start, end) of every kernel on a GPU's streams, nanoseconds."""
    for path in sorted(Path(folder).rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield event.name, event.start_ns, event.start_ns + event.duration_ns


def covered(intervals):
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder", help="of the trace")
    parser.add_argument("--top", type=int, default=12, help="so many of the longest kernels")
    flags = parser.parse_args()
    found = list(kernels(flags.folder))
    if not found:
        parser.error(f"{flags.folder} holds no trace of a GPU")
    whole = max(end for *_, end in found) - min(start for _, start, _ in found)
    by_kind, by_name, calls = defaultdict(float), defaultdict(float), defaultdict(int)
    for name, start, end in found:
        by_kind[kind_of(name)] += end - start
        by_name[name] += end - start
        calls[name] += 1
    by_kind["idle"] = whole - covered((start, end) for _, start, end in found)
    rows = sorted(by_kind.items(), key=lambda row: -row[1])
    print("| kind | ms | share |\n|---|---|---|")
    for kind, time in rows:
        print(f"| {kind} | {time / 1e6:.1f} | {time / whole:.1%} |")
    print("\n| kernel | kind | calls | ms | share |\n|---|---|---|---|---|")
    for name, time in sorted(by_name.items(), key=lambda row: -row[1])[: flags.top]:
        print(
            f"| `{name[:80]}` | {kind_of(name)} | {calls[name]} | {time / 1e6:.1f} | "
            f"{time / whole:.1%} |"
        )
    print(json.dumps({"milliseconds": whole / 1e6, **{k: t / whole for k, t in rows}}))


if __name__ == "__main__":
    main()
