"""What a sweep saves: its time against that of its runs, started one by one.

    python benchmarks/ablation.py --config configs/ablation_quickstart.py [--jobs 1 2] \
        [--config.FIELD=VALUE …]

Runs the sweep with an empty compilation cache and without measures, as often as there are numbers
of jobs at once; then, with another empty cache, every trial of a learning rate and every cell by a
command of its own. The runs share that cache, as they do by default; what the sweep shares besides
is the processes, the features of frozen prefixes, and heads that are searched together. Prints a
table and a JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tl_jax import ablation_config, ablation_results, config_files

RUN = [sys.executable, str(Path(__file__).resolve().parents[1] / "run.py")]
PLAIN = {
    "ablate.measure.probe_images": 0,
    "ablate.measure.shifts": (),
    "ablate.measure.gradient_steps": 0,
    "ablate.measure.source": None,
}


def timed(*arguments):
    """Seconds that run.py takes."""
    started = time.perf_counter()
    subprocess.run([*RUN, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    config = f"--config={flags.config}"
    with tempfile.TemporaryDirectory() as folder:

        def cache(name):
            return f"--config.logging.compilation_cache={folder}/{name}"

        plain = [f"--config.{name}={value}" for name, value in PLAIN.items()]
        together = {
            jobs: timed(
                "--mode=ablate",
                config,
                *rest,
                *plain,
                f"--config.ablate.jobs={jobs}",
                cache(f"of {jobs}"),
                f"--workdir={folder}/sweep of {jobs}",
            )
            for jobs in flags.jobs
        }
        ended = Path(folder, f"sweep of {flags.jobs[0]}")
        sweep = ablation_config.read(
            flags.config, config_files.load_config(flags.config), overrides
        )
        found = {
            group: json.loads((ended / "search" / group / "search.json").read_text())
            for group, cells in sweep.groups.items()
            if cells[0].rates
        }
        alone, runs = 0.0, 0
        for cells in sweep.groups.values():
            first = cells[0]
            trials = [
                [*first.overrides, ("data.splits.test", "None"), ("optimizer.learning_rate", rate)]
                for rate in first.rates
            ]
            for fields in (*trials, *(ablation_results.overrides_of(c, found) for c in cells)):
                words = [f"--config.{name}={value}" for name, value in fields]
                runs += 1
                alone += timed(config, *words, cache("alone"), f"--workdir={folder}/alone/{runs}")
    print("| runs | one by one | at once | as a sweep | share |\n|---|---|---|---|---|")
    for jobs, seconds in together.items():
        print(f"| {runs} | {alone:.0f} s | {jobs} | {seconds:.0f} s | {seconds / alone:.2f} |")
    print(json.dumps({"runs": runs, "alone_seconds": alone, "sweep_seconds": together}))


if __name__ == "__main__":
    main()
