"""The pages of ingest: the base model; the datasets with their sizes, licences and first rows; what is measured."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from controlllm.base_facts import folder_facts
from controlllm.data.manifest import Manifest
from controlllm.decks.page import Page, Section, Table, Tile, size_of
from controlllm.errors import UserError
from controlllm.private import clean

Json = dict[str, Any]
SAMPLES = 3
"""Rows of a dataset, and items of a probe, that are shown."""


def model_page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of the base model."""
    config, stated = json.loads((folder / "config.json").read_text()), folder_facts(folder)
    files = sorted(lineage["files"].items(), key=lambda item: -item[1]["size"])
    weights = sum(stamp["size"] for name, stamp in files if name.endswith(".safetensors"))
    inner = config.get("text_config") or config
    names = {"num_hidden_layers": "Layers", "hidden_size": "Hidden size", "vocab_size": "Vocabulary"}
    tiles = [Tile("Weights", size_of(weights), ", ".join(config.get("architectures") or []))]
    tiles += [Tile(title, f"{inner[name]:,}") for name, title in names.items() if inner.get(name)]
    tiles.append(Tile("Licence", str(stated.get("license") or "not stated"), str(stated.get("license_link") or "")))
    rows = [[name, size_of(stamp["size"]), stamp["hash"]] for name, stamp in files]
    table = Table(["File", "Size", "xxh3-128"], rows, numbers=["Size"])
    title = str(clean(lineage["inputs"].get("model.name", "base model")))
    return Page("ingest model", title, tiles, [Section("Files", tables=[table])], made=lineage)


def data_page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of the data: where it comes from, how much it is, under which licence, how it begins; then the probes."""
    manifests = {file.stem: Manifest.from_json(json.loads(file.read_text()))
                 for file in sorted(folder.glob("manifests/*.json"))}  # fmt: skip
    probes = {file.stem: [json.loads(line) for line in file.read_text().splitlines()]
              for file in sorted(folder.glob("probes/*.jsonl"))}  # fmt: skip
    rows = [_line(name, manifest) for name, manifest in manifests.items()]
    columns = ["Dataset", "Source", "Files", "Bytes", "Rows", "Units", "Licence"]
    table = Table(
        columns, rows, "Rows are counted where a file says how many it has.", ["Files", "Bytes", "Rows", "Units"]
    )
    sections = [Section("Datasets", tables=[table])] if rows else []
    sections += [_beginning(name, manifest) for name, manifest in manifests.items()]
    counts = Table(["Probe", "Items"], [[name, f"{len(items):,}"] for name, items in probes.items()], numbers=["Items"])
    texts = [(f"{name} {item['id']}", _item(item)) for name, items in probes.items() for item in items[:SAMPLES]]
    sections.append(Section("Probes", "Held out: what is measured before and after.", tables=[counts], texts=texts))
    tiles = [Tile("Datasets", str(len(manifests))), Tile("Probe items", f"{sum(map(len, probes.values())):,}")]
    tiles.append(Tile("Decontamination", str(lineage["inputs"].get("mix.decontaminate"))))
    return Page("ingest data", "Data", tiles, sections, made=lineage)


def _line(name: str, manifest: Manifest) -> list[str]:
    from controlllm.data.catalog import CATALOG, dataset_names

    known = CATALOG[name] if name in dataset_names() else None
    is_known = known is not None and known.source == manifest.source
    counted = [unit.rows for unit in manifest.units]
    rows = f"{sum(filter(None, counted)):,}" if all(count is not None for count in counted) else "–"
    licence = known.license if known and is_known else "as its source says"
    return [name, str(clean(manifest.source)), f"{len(manifest.files):,}", size_of(manifest.bytes), rows,
            f"{len(manifest.units):,}", licence]  # fmt: skip


def _beginning(name: str, manifest: Manifest) -> Section:
    """The first rows as they are, or why they cannot be read here."""
    try:
        rows = list(_first_rows(manifest))
    except UserError as error:
        return Section(f"First rows of {name}", f"Not to be read here: {clean(str(error))}")
    texts = [(f"row {number}", json.dumps(row, ensure_ascii=False, indent=1, default=str)) for number, row in rows]
    return Section(f"First rows of {name}", texts=texts)


def _first_rows(manifest: Manifest) -> Iterator[tuple[int, Json]]:
    from controlllm.data.units import read_unit

    left = SAMPLES
    for unit in manifest.units:
        for batch in read_unit(unit, batch_rows=SAMPLES):
            for number, row in zip(batch.numbers.tolist(), batch.rows(), strict=True):
                yield number, row
                left -= 1
                if not left:
                    return


def _item(item: Json) -> str:
    asked = item.get("prompt") or item.get("text") or json.dumps(item, ensure_ascii=False)
    return f"{asked}⟶ {item['target']}" if item.get("target") else str(asked)
