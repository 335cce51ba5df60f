"""Start-up: import, plan, and the time to the first step with a cold and a warm compilation cache.

    python benchmarks/start_up.py --config CONFIG [--config.FIELD=VALUE …]

Each is a process of its own, timed whole from outside; the first-step runs train one epoch of one
batch. Prints a table and JSON lines.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = str(Path(__file__).resolve().parent.parent / "run.py")


def seconds(*command):
    """Wall time of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    flags, rest = parser.parse_known_args()
    run = [RUN, f"--config={flags.config}", *rest, "--config.control=None"]
    rows = []

    def add(what, took):
        rows.append({"what": what, "seconds": took})
        print(json.dumps(rows[-1]), flush=True)

    add("import jax", seconds("-c", "import jax"))
    add("import tl_jax", seconds("-c", "import tl_jax"))
    with tempfile.TemporaryDirectory() as folder:
        cache = f"--config.logging.compilation_cache={folder}/compilation"
        add("plan", seconds(*run, cache, "--mode=plan", f"--workdir={folder}/plan"))
        batch = next((w for w in rest if w.startswith("--config.data.batch_size=")), None)
        size = int(batch.partition("=")[2]) if batch else 64
        short = [
            "--config.train.epochs=1",
            f"--config.data.batch_size={size}",
            f"--config.data.splits.train=train[:{size}]",
            "--config.data.splits.validation=None",
            "--config.data.splits.test=None",
            "--config.cache=off",
        ]
        for what in ("one step, compilation cache cold", "one step, compilation cache warm"):
            workdir = f"{folder}/{what[-4:]}"
            add(what, seconds(*run, cache, *short, f"--workdir={workdir}"))
            summary = json.loads(Path(workdir, "summary.json").read_text())
            add(f"  of it compiling the step ({what[-4:]})", summary["cost"]["compile_seconds"])
    print("| what | seconds |\n|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['seconds']:.2f} |")


if __name__ == "__main__":
    main()
