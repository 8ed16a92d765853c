"""The paper's claim on two cores: what is forgotten at equal gain, by method, learning rate and seed.

python bench/forgetting/run.py [--workers 2] [--only METHOD] [--results FOLDER] [--short] [section.key=value ...]

What is run stands in experiment.yaml; a run whose result is there is not run again, so that the same command goes on
with what was stopped. At the end the table and the chart are made (show.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from curves import DIAL, Results
from experiment import HERE, RESULTS, Experiment, Run
from show import show


def main() -> int:
    options = parse()
    experiment = Experiment.read(short=options.short, settings=options.settings)
    results = options.results or (Path(tempfile.mkdtemp()) if options.short else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    planned = [run for run in experiment.planned() if options.only in (None, run.method)]
    failed = run_all(planned, results, workers=options.workers)
    if not options.only:
        failed += run_all(list(experiment.later(worth_more(experiment, results))), results, workers=options.workers)
    show(experiment, results)
    return 1 if failed else 0


def worth_more(experiment: Experiment, results: Path) -> dict[str, list[str]]:
    """Every method, and what forgot least of the tuning; of each the learning rates that decided with the first seed.

    A rate that was best nowhere would change no curve by more than chance; with it, three seeds take twice as long.
    """
    first, levels = Results.read(results).of_seed(experiment.first_seed), experiment.levels
    ranked = sorted(first.names(experiment.tuning), key=lambda name: first.score(name, levels))
    best = list(dict.fromkeys(name.removesuffix(DIAL) for name in ranked))[: experiment.finalists]
    return {method: first.deciding(method, levels) for method in (*experiment.methods, *best)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--only", metavar="METHOD", help="of methods or tuning in experiment.yaml")
    parser.add_argument("--results", type=Path, help=f"folder, {RESULTS} by default")
    parser.add_argument("--short", action="store_true", help="two methods, a few steps")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="overrides, of every run")
    return parser.parse_args()


def run_all(runs: Sequence[Run], results: Path, *, workers: int) -> list[Run]:
    """Those that are not there yet, in their order; returns those that failed."""
    left = [run for run in runs if run.result(results) is None]
    print(f"{len(runs)} runs, {len(left)} of them to do; results in {results}", flush=True)
    began, failed = time.monotonic(), []
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(run_one, run, results): run for run in left}
        for number, done in enumerate(as_completed(waiting), start=1):
            run, problem = waiting[done], done.result()
            if problem:
                failed.append(run)
            minutes = (time.monotonic() - began) / 60 / number * (len(left) - number)
            print(f"{run.name}: {problem or 'done'} · {number}/{len(left)} · ETA {minutes:.0f} min", flush=True)
    return failed


def run_one(run: Run, results: Path) -> str:
    """In a process of its own, on one core; what went wrong, or nothing."""
    command = [sys.executable, str(HERE / "one_run.py"), json.dumps(asdict(run)), str(results / f"{run.name}.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stderr[-2000:] if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
