"""Anonymous host memory of a run against the size of its data set.

    python benchmarks/memory.py --config CONFIG [--images 10000 60000] [--config.FIELD=VALUE …]

Each run is a process of its own; its anonymous resident memory (RssAnon of /proc) is sampled twice
a second, and its peak while it trains on the first so many images is printed. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = str(Path(__file__).resolve().parent.parent / "run.py")


def peak(command):
    """Exit code of a command and the peak of its anonymous resident memory in bytes."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            most = max(most, int(found[1]) * 1024)
        time.sleep(0.5)
    return process.wait(), most


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--images", nargs="+", type=int, default=[10000, 60000])
    flags, rest = parser.parse_known_args()
    rows = []
    for images in flags.images:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                RUN,
                f"--config={flags.config}",
                *rest,
                f"--config.data.splits.train=train[:{images}]",
                "--config.data.splits.validation=None",
                "--config.control=None",
                "--config.cache=disk",
                f"--config.cache_dir={folder}/cache",
                f"--workdir={folder}/run",
            ]
            code, most = peak(command)
            if code:
                sys.exit(f"the run of {images} images failed: {' '.join(command)}")
            held = sum(f.stat().st_size for f in Path(folder, "cache").glob("*/*"))
        rows.append({"images": images, "peak_bytes": most, "cache_bytes": held})
        print(json.dumps(rows[-1]), flush=True)
    print("| images | cache on disk | peak of anonymous memory |\n|---|---|---|")
    for row in rows:
        cache, most = row["cache_bytes"] / 1e6, row["peak_bytes"] / 1e6
        print(f"| {row['images']:,} | {cache:.3g} MB | {most:.0f} MB |")


if __name__ == "__main__":
    main()
