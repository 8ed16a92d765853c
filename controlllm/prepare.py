"""Stage 2: rows to shards of packed tokens, per dataset; or, with `pack.streaming`, the plan of that.

On a cluster a big dataset is made in pieces, each in a pod of its own, and put together by what they are named.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from controlllm.config import Config, MixConfig, PackConfig, ValidationConfig
from controlllm.data.prepared import open_job, open_manifest, shard_root, take_shards, write_index, write_stats
from controlllm.progress import console
from controlllm.store import Output, run_stage

UNITS_PER_PIECE = 32


class Piece(Config):
    """Units [first, last) of a dataset of the mix, which one pod makes."""

    dataset: int
    """Its place in the mix."""
    first: int
    """Place of the first unit."""
    last: int
    """Place behind the last one."""


def pieces(data: Path, mix: MixConfig, pack: PackConfig) -> list[Piece]:
    """One for a dataset, more for a big one; none when training makes the shards."""
    if pack.streaming:
        return []
    units = [len(open_manifest(data, dataset.name).units) for dataset in mix.datasets]
    return [
        Piece(dataset=number, first=first, last=min(first + UNITS_PER_PIECE, count))
        for number, count in enumerate(units)
        for first in range(0, count, UNITS_PER_PIECE)
    ]


def prepare_piece(piece: Piece, base: Path, data: Path, mix: MixConfig, pack: PackConfig) -> Output:
    """The shards of some units."""
    dataset = mix.datasets[piece.dataset]

    def build(folder: Path) -> None:
        from controlllm.data.build import find_duplicates, make_units, renderer_facts

        job, manifest = open_job(dataset, f"mix.datasets.{piece.dataset}", base, data, pack)
        find_duplicates(job, manifest)
        made = make_units(job, manifest, range(piece.first, piece.last), shards=shard_root())
        units = [facts for _, facts, _ in made]
        write_index(folder, dataset.name, units, renderer_facts(job), link=True)

    config = _inputs(MixConfig.model_construct(datasets=[dataset]), pack) | {"piece": piece}
    return run_stage("prepare piece", config=config, parents={"ingest model": base, "ingest data": data}, build=build)


def gather(
    parts: Sequence[Path],
    base: Path,
    data: Path,
    mix: MixConfig,
    pack: PackConfig,
    validation: ValidationConfig | None = None,
) -> Output:
    """All datasets, out of pieces that pods made; what no piece holds is made here."""
    for part in parts:
        take_shards(part)
    return prepare(base, data, mix, pack, validation)


def prepare(
    base: Path, data: Path, mix: MixConfig, pack: PackConfig, validation: ValidationConfig | None = None
) -> Output:
    """`<dataset>/index.json` with its shards, `stats.json`, and `quarantine.jsonl` with the rows that were set aside;
    `probes/` with the old skills that training looks at, so that it depends on no others.

    With `pack.streaming` only `plan.json` and what it needs: training makes the shards while it runs.
    """
    probes = validation.retention.probes if validation and validation.retention else []

    def build(folder: Path) -> None:
        if pack.streaming:
            _plan(folder, data, mix, pack)
        else:
            _prepare_all(folder, base, data, mix, pack)
        for name in probes:
            (folder / "probes").mkdir(exist_ok=True)
            shutil.copy(data / "probes" / f"{name}.jsonl", folder / "probes")

    parents = {"ingest model": base, "ingest data": data}
    return run_stage("prepare", config=_inputs(mix, pack) | {"retention": probes}, parents=parents, build=build)


def _inputs(mix: MixConfig, pack: PackConfig) -> dict[str, object]:
    return {
        "pack": pack.model_dump(exclude={"chat_template"}),
        "chat template": Path(pack.chat_template).read_text() if pack.chat_template else None,
        "datasets": {d.name: d.model_dump(exclude={"name", "epochs", "weight"}) for d in mix.datasets},
    }


def _plan(folder: Path, data: Path, mix: MixConfig, pack: PackConfig) -> None:
    shutil.copytree(data / "manifests", folder / "manifests")
    if (data / "held_out").exists():
        shutil.copytree(data / "held_out", folder / "held_out")
    (folder / "pack.json").write_text(pack.model_dump_json())
    (folder / "plan.json").write_text(json.dumps([d.model_dump() for d in mix.datasets], indent=1))


def _prepare_all(folder: Path, base: Path, data: Path, mix: MixConfig, pack: PackConfig) -> None:
    from controlllm.data.build import prepare_dataset

    for number, dataset in enumerate(mix.datasets):
        job, manifest = open_job(dataset, f"mix.datasets.{number}", base, data, pack)
        made = prepare_dataset(job, manifest, shards=shard_root())
        write_index(folder / dataset.name, dataset.name, made.units, made.renderer, link=True)
        tokenizer = made.renderer["tokenizer"]
        console.print(
            f"  {dataset.name}: {made.rows:,} rows → {made.packed_rows:,} packed rows, {made.tokens:,} tokens; "
            f"{made.computed} of {len(made.units)} shards made now · {tokenizer}",
            markup=False,
        )
        if bad := sum(unit["bad_rows"] for unit in made.units):
            console.print(f"  {dataset.name}: {bad:,} bad rows were set aside, see quarantine.jsonl", markup=False)
    write_stats(folder, [dataset.name for dataset in mix.datasets], pack)
    (folder / "pack.json").write_text(pack.model_dump_json())
