"""A run's inputs against those of this machine: packages, code, base model, data. Nothing is computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from controlllm.config import RunConfig
from controlllm.errors import UserError
from controlllm.fingerprint import CODE, code_hashes, content_of, version
from controlllm.record import Record
from controlllm.store import LINEAGE, find_lineage, store_root

Json = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """One input of a run."""

    name: str
    recorded: str
    here: str
    same: bool

    @property
    def said(self) -> str:
        return f"{self.name} {self.recorded} → {self.here}"


def compare_inputs(record: Record, config: RunConfig) -> list[Input]:
    """Every input, in the order packages, code, base model, data."""
    return [*_packages(record), *_code(record), *_base(record), *_data(record, config)]


def _packages(record: Record) -> Iterator[Input]:
    recorded: dict[str, set[str]] = {}
    for lineage in record.stages.values():
        for name, value in lineage["inputs"].items():
            if name.startswith("version of "):
                recorded.setdefault(name.removeprefix("version of "), set()).add(value or "none")
    for name, values in sorted(recorded.items()):
        here = version(name) or "none"
        yield Input(name, ", ".join(sorted(values)), here, values == {here})


def _code(record: Record) -> Iterator[Input]:
    """By stage; a file that only one side has counts, too."""
    for name, lineage in record.stages.items():
        stage = lineage["stage"]
        if stage not in CODE:
            yield Input(f"code of {name}", "a stage of another version", "none", False)
            continue
        recorded = {n.removeprefix("code "): v for n, v in lineage["inputs"].items() if n.startswith("code ")}
        here = dict(code_hashes(stage))
        other = sorted(file for file in {**recorded, **here} if recorded.get(file) != here.get(file))
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        yield Input(f"code of {name}", content_of(recorded), shown or content_of(here), not other)


def _base(record: Record) -> Iterator[Input]:
    """By content: any base model in the store that was ingested under the same name."""
    if (lineage := record.stages.get("ingest model")) is None:
        return
    wanted = {name: lineage["inputs"].get(name) for name in ("model.name", "model.revision")}
    stored = [s for s in _stored("ingest model") if all(s["inputs"].get(name) == v for name, v in wanted.items())]
    yield _by_content("base model", lineage["content"], [s["content"] for s in stored], "controlllm ingest")


def _data(record: Record, config: RunConfig) -> Iterator[Input]:
    """The files of each dataset as they lie here now; the packed rows by content where they were prepared."""
    if (lineage := record.stages.get("ingest data")) is not None:
        for number, dataset in enumerate(config.mix.datasets):
            recorded = str(lineage["inputs"].get(f"source.{dataset.name}"))
            files = record.made.get(f"manifests/{dataset.name}.json", {}).get("files", {})
            yield _source(f"data {dataset.name}", recorded, files, config, number)
    if (lineage := record.stages.get("prepare")) is not None:
        stored = [s["content"] for s in _stored("prepare")]
        found = [lineage["content"]] if lineage["content"] in stored else []
        yield _by_content("packed rows", lineage["content"], found, "controlllm prepare")


def _source(name: str, recorded: str, files: Json, config: RunConfig, number: int) -> Input:
    from controlllm.data.catalog import find_dataset
    from controlllm.data.manifest import list_source

    dataset = config.mix.datasets[number]
    try:
        source = find_dataset(dataset).source
        manifest = list_source(source, unit_rows=config.pack.unit_rows, rows=dataset.rows, seed=dataset.seed)
    except UserError as error:
        return Input(name, recorded, f"not to be read here: {error}", False)
    here = content_of(manifest.to_json())
    sizes = {file.uri.rpartition("/")[2]: file.stamp.size for file in manifest.files}
    then = {file: stamp["size"] for file, stamp in files.items()}
    other = sorted(file for file in {**sizes, **then} if sizes.get(file) != then.get(file))
    if here == recorded or not files:
        return Input(name, recorded, here, here == recorded)
    if not other:
        return Input(name, recorded, "files of the same names and sizes, but other places or times", False)
    return Input(name, recorded, f"{other[0]}: {then.get(other[0])} → {sizes.get(other[0])} bytes", False)


def _by_content(name: str, recorded: str, here: list[str], command: str) -> Input:
    if not here:
        return Input(name, recorded, f"not here yet, {command} gets it", False)
    same = recorded in here
    return Input(name, recorded, recorded if same else here[-1], same)


def _stored(stage: str) -> Iterator[Json]:
    for file in sorted((store_root() / stage.replace(" ", "-")).glob(f"*/{LINEAGE}")):
        if lineage := find_lineage(file.parent):
            yield lineage
