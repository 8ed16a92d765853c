"""Why a stage of a run would compute, and which of its shards are there: nothing is computed to say it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from controlllm.changes import differences
from controlllm.config import DatasetConfig, RunConfig
from controlllm.data.prepared import open_job, shard_root
from controlllm.data.shard_store import ShardStore
from controlllm.errors import UserError
from controlllm.store import Miss, dry_run

Json = dict[str, Any]


class _Reported(Exception):
    """The last stage is cached; what follows would deliver it."""


def explain(config: RunConfig, *, until: str) -> list[str]:
    """A line per stage: cached, or what changed; for prepare also how many shards stay, and why others do not."""
    from controlllm import pipeline

    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("report: cached"):
            raise _Reported

    with dry_run(tell):
        try:
            pipeline.run(config, until=until)
        except _Reported:
            pass
        except Miss as miss:
            if miss.stage == "prepare":
                lines += _explain_shards(config, miss.parents["ingest model"], miss.parents["ingest data"])
            lines.append("what comes after it runs, too, unless it makes the same output again")
    return lines


def every_stage(config: RunConfig) -> list[tuple[str, str]]:
    """Each stage and its line, by itself: for one that would compute, the stored output that is nearest stands.

    They end with a stage of which nothing is stored.
    """
    from controlllm import pipeline

    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("report: "):
            raise _Reported

    with dry_run(tell, stand_in=True), suppress(_Reported, Miss):
        pipeline.run(config)
    return [(_stage_of(line), line) for line in lines]


def _stage_of(line: str) -> str:
    """A task of a benchmark, `chat (2 of 4)`, is of the benchmark."""
    name = line.partition(": ")[0]
    return "benchmark" if name.endswith(")") else name


def _explain_shards(config: RunConfig, base: Path, data: Path) -> Iterator[str]:
    store = ShardStore(shard_root())
    stored = _by_rows(store)
    for number, dataset in enumerate(config.mix.datasets):
        yield from _explain_dataset(config, number, dataset, base, data, store, stored)


def _explain_dataset(
    config: RunConfig,
    number: int,
    dataset: DatasetConfig,
    base: Path,
    data: Path,
    store: ShardStore,
    stored: dict[str, list[Json]],
) -> Iterator[str]:
    from controlllm.data.build import find_duplicates
    from controlllm.data.workers import unit_key

    job, manifest = open_job(dataset, f"mix.datasets.{number}", base, data, config.pack)
    find_duplicates(job, manifest)
    units = manifest.units
    missing = [n for n, unit in enumerate(units) if store.facts(unit_key(job, n, unit)) is None]
    reasons = Counter(_reason(job.unit_inputs(n, units[n]), stored) for n in missing)
    yield f"  {dataset.name}: {len(units) - len(missing)} of {len(units)} shards are there"
    yield from (f"  {dataset.name}: {count} to make, because {reason}" for reason, count in reasons.most_common())


def _by_rows(store: ShardStore) -> dict[str, list[Json]]:
    """Inputs of the stored shards by the hash of the rows that they hold."""
    found: dict[str, list[Json]] = {}
    for key in store.keys():  # noqa: SIM118 - a method of ours
        try:
            facts = store.described(key)
        except UserError:  # `cache verify` names it
            continue
        if facts:
            found.setdefault(facts["inputs"]["rows"], []).append(facts["inputs"])
    return found


def _reason(inputs: Json, stored: dict[str, list[Json]]) -> str:
    if not stored:
        return "there is no shard yet"
    same = stored.get(inputs["rows"])
    if same is None:
        return "no shard holds these rows: the file is new, was changed, or is cut into other pieces"
    changes = min((differences(other, inputs) for other in same), key=len)
    return ", ".join(changes) + " changed" if changes else "its file was removed or cut off"
