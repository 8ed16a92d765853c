"""Training that does not wait for its data: a process beside it makes the shards, in the order they are needed.

`python -m controlllm.data.streaming PLAN BASE FOLDER` writes `<dataset>/units/<number>.json` as each shard is there and
`<dataset>/index.json` at the end, or `<dataset>/failed.json`.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from controlllm.config import DatasetConfig, MixConfig, PackConfig
from controlllm.data.order import DatasetOrder
from controlllm.data.prepared import open_job, open_manifest, shard_root, write_index, write_stats
from controlllm.data.shelf import GrowingShelf, Shelf
from controlllm.errors import UserError, one_line
from controlllm.fingerprint import sync

MAKER = ["-m", "controlllm.data.streaming"]
FIRST_TURN = 1
"""Units of each dataset that are made before the second of any; then twice as many, and so on."""


def is_plan(shards: Path) -> bool:
    return (shards / "plan.json").exists()


def pack_of(shards: Path) -> PackConfig:
    """How the shards are packed."""
    return PackConfig.model_validate_json((shards / "pack.json").read_text())


def open_shelves(shards: Path, mix: MixConfig, *, growing: Path) -> list[Shelf]:
    """What prepare made; or, after a plan, what is being made in the folder `growing`."""
    if not is_plan(shards):
        return [Shelf.open(shards / dataset.name) for dataset in mix.datasets]
    return [
        GrowingShelf(growing / d.name, name=d.name, units=len(open_manifest(shards, d.name).units), shards=shard_root())
        for d in mix.datasets
    ]


@contextmanager
def shards_being_made(shards: Path, base: Path, mix: MixConfig, *, growing: Path) -> Iterator[None]:
    """Runs the maker beside the block and waits for it at the end; does nothing when the shards are there already."""
    if not is_plan(shards):
        yield
        return
    growing.mkdir(parents=True, exist_ok=True)
    for failed in growing.glob("*/failed.json"):
        failed.unlink()
    maker = _Maker([str(shards), str(base), str(growing), str(mix.seed), mix.order], growing, mix)
    try:
        yield
        maker.wait()
    finally:
        maker.stop()
    maker.check()


class _Maker:
    """The process that makes the shards. Its death is told to all who wait for them, in this process or another."""

    def __init__(self, arguments: list[str], growing: Path, mix: MixConfig):
        self.growing, self.names, self.stopped = growing, [dataset.name for dataset in mix.datasets], False
        with (growing / "log.txt").open("w") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, *MAKER, *arguments], stderr=log
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self) -> None:
        self.process.wait()

    def stop(self) -> None:
        self.stopped = True
        self.process.terminate()
        self.process.wait()

    def check(self) -> None:
        """Raise UserError with what it died of."""
        if self.process.returncode:
            raise UserError(self._failure() or self._death())

    def _watch(self) -> None:
        self.process.wait()
        if self.process.returncode and not self.stopped and not self._failure():
            _tell(self.growing, self.names, self._death())

    def _failure(self) -> str | None:
        told = [file for name in self.names if (file := self.growing / name / "failed.json").exists()]
        return json.loads(told[0].read_text())["error"] if told else None

    def _death(self) -> str:
        return (
            f"the process that makes the shards ended with {self.process.returncode}, "
            f"most likely killed for want of memory; see {self.growing / 'log.txt'}"
        )


def make(plan: Path, base: Path, folder: Path, *, seed: int, order: str) -> None:
    """All shards of all datasets, in turns that grow."""
    from controlllm.data.build import check_units, find_duplicates, make_units, renderer_facts

    trainer = os.getppid()
    pack = pack_of(plan)
    datasets = [DatasetConfig.model_validate(d) for d in json.loads((plan / "plan.json").read_text())]
    jobs: dict[str, Any] = {}
    found: dict[str, dict[int, Any]] = {d.name: {} for d in datasets}
    for number, name, units in _turns(plan, datasets, seed=seed, shuffled=order == "shuffle"):
        if name not in jobs:
            jobs[name] = open_job(datasets[number], f"mix.datasets.{number}", base, plan, pack)
            find_duplicates(*jobs[name])
        job, manifest = jobs[name]
        for unit, facts, _ in make_units(job, manifest, units, shards=shard_root()):
            if os.getppid() != trainer:  # nobody waits any more
                return
            found[name][unit] = facts
            _write(folder / name / "units" / f"{unit}.json", facts)
    for name, (job, manifest) in jobs.items():
        made = [found[name][unit] for unit in range(len(manifest.units))]
        check_units(job, made)
        write_index(folder / name, name, made, renderer_facts(job), link=False)
    write_stats(folder, [d.name for d in datasets], pack)


def _turns(
    plan: Path, datasets: Sequence[DatasetConfig], *, seed: int, shuffled: bool
) -> Iterator[tuple[int, str, list[int]]]:
    """(place of the dataset, its name, its next units)."""
    left: dict[str, Iterator[int]] = {}
    for dataset in datasets:
        count = len(open_manifest(plan, dataset.name).units)
        left[dataset.name] = iter(DatasetOrder(dataset.name, count, int, seed=seed, shuffled=shuffled).unit_order())
    # Alone a dataset needs no turns: after its first unit, which all wait for, the rest is one batch of work.
    turn, growth = FIRST_TURN, 2 if len(datasets) > 1 else 1 << 30
    while left:
        for number, dataset in enumerate(datasets):
            units = list(islice(left.get(dataset.name, iter(())), turn))
            if units:
                yield number, dataset.name, units
            else:
                left.pop(dataset.name, None)
        turn *= growth


def _tell(folder: Path, names: Sequence[str], error: str) -> None:
    for name in names:
        _write(folder / name / "failed.json", {"error": error})


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    sync(partial)
    partial.replace(file)


def main(plan: str, base: str, folder: str, seed: str, order: str) -> int:
    try:
        make(Path(plan), Path(base), Path(folder), seed=int(seed), order=order)
    except Exception as error:
        datasets = json.loads((Path(plan) / "plan.json").read_text())
        _tell(Path(folder), [dataset["name"] for dataset in datasets], one_line(error))
        if not isinstance(error, UserError):
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
