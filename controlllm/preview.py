"""What the model will see: the first packed rows of a run, token by token, before anything is trained."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.config import RunConfig
from controlllm.data.prepared import open_job, shard_root
from controlllm.progress import console

Json = dict[str, Any]
STYLES = {"target": "green", "context": "dim", "target special": "bold green reverse", "context special": "cyan"}


@dataclass(frozen=True)
class Piece:
    """Tokens in a row that are learned, or are not; a special token stands alone."""

    text: str
    kind: str
    """target, context, `target special` or `context special`."""


@dataclass(frozen=True)
class Shown:
    """One document of a packed row."""

    dataset: str
    source: str
    tokens: int
    targets: int
    is_cut: bool
    """Whether it goes on in another row, or was truncated: it does not end in a special token."""
    pieces: list[Piece]


def preview(config: RunConfig, *, rows: int) -> tuple[list[list[Shown]], dict[str, Json]]:
    """The first packed rows in the order of training, and what the first shard of each dataset holds.

    Makes no more than these shards; a run finds them later.
    """
    from transformers import AutoTokenizer

    from controlllm.data.build import find_duplicates, make_units, renderer_facts
    from controlllm.data.loader import Mix
    from controlllm.data.shelf import StoredShelf
    from controlllm.ingest import ingest_data, ingest_model

    base = ingest_model(config.model).path
    data = ingest_data(base, config.mix, config.benchmark, config.pack).path
    shelves: list[StoredShelf] = []
    facts: dict[str, Json] = {}
    for number, dataset in enumerate(config.mix.datasets):
        job, manifest = open_job(dataset, f"mix.datasets.{number}", base, data, config.pack)
        find_duplicates(job, manifest)
        for _, made, _ in make_units(job, manifest, [0], shards=shard_root(), workers=1):
            facts[dataset.name] = _facts(made, len(manifest.units), renderer_facts(job))
            shelves.append(StoredShelf(dataset.name, [made], shard_root()))
    mix = Mix(shelves, config.mix, config.pack)
    tokenizer = AutoTokenizer.from_pretrained(base)
    count = min(rows, mix.epoch_rows)
    return [list(_documents(mix, position, tokenizer)) for position in range(count)], facts


def print_preview(shown: list[list[Shown]], facts: dict[str, Json]) -> None:
    """To the terminal: green is learned, dim is context, boxes are special tokens."""
    from rich.text import Text

    for number, row in enumerate(shown, start=1):
        tokens, targets = sum(d.tokens for d in row), sum(d.targets for d in row)
        console.rule(f"packed row {number}: {len(row)} documents, {tokens} tokens, {targets} of them learned")
        for document in row:
            cut = " · cut" if document.is_cut else ""
            console.print(f"── {document.source} · {document.tokens} tokens{cut}", style="yellow", markup=False)
            line = Text()
            for piece in document.pieces:
                line.append(piece.text, style=STYLES[piece.kind])
            console.print(line)
    console.rule("green is learned, dim is context")
    for name, dataset in facts.items():
        console.print(f"{name}: {_sentence(dataset)}", markup=False)


def write_preview(shown: list[list[Shown]], facts: dict[str, Json], page: Path, *, name: str) -> None:
    """One HTML page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("controlllm"), autoescape=True, trim_blocks=True)
    lines = {dataset: _sentence(values) for dataset, values in facts.items()}
    made = environment.get_template("preview.html").render(name=name, rows=shown, datasets=lines)
    page.write_text(made, encoding="utf-8", errors="replace")


def _documents(mix: Any, position: int, tokenizer: Any) -> Iterator[Shown]:
    dataset, unit, place = mix.place(position)
    shelf = mix.shelves[dataset]
    row, file = shelf.read(unit, place), shelf.facts(unit)["unit"]["uri"]
    special = np.isin(row["input_ids"], tokenizer.all_special_ids)
    ends = np.cumsum(row["lengths"])
    for begin, end, number in zip(ends - row["lengths"], ends, row["rows"], strict=True):
        ids, target, marked = row["input_ids"][begin:end], row["target"][begin:end], special[begin:end]
        pieces = list(_pieces(ids, target, marked, tokenizer))
        cut = not marked[-4:].any()
        yield Shown(shelf.name, f"{shelf.name} · {_short(file)} row {number}", len(ids), int(target.sum()), cut, pieces)


def _short(uri: str) -> str:
    """The file's name; of a procedural source what it is."""
    return uri.partition("://")[0] if uri.startswith("reasoning-gym") else uri.rsplit("/", 1)[-1]


def _pieces(ids: np.ndarray, target: np.ndarray, special: np.ndarray, tokenizer: Any) -> Iterator[Piece]:
    def kind(i: int) -> tuple[str, int]:
        name = "target" if target[i] else "context"
        return (f"{name} special", i) if special[i] else (name, -1)

    for (name, _), run in groupby(range(len(ids)), key=kind):
        yield Piece(tokenizer.decode(ids[list(run)].tolist()), name)


def _facts(made: Json, units: int, renderer: Json) -> Json:
    train = made["files"].get("train", {})
    return {
        "rows": made["rows"],
        "units": units,
        "filtered": dict(Counter(made["filtered"])),
        "bad_rows": made["bad_rows"],
        "renderer": renderer,
        **{name: train.get(name, 0) for name in ("documents", "bins", "tokens", "targets")},
    }


def _sentence(facts: Json) -> str:
    left_out = ", ".join(f"{count:,} {name}" for name, count in facts["filtered"].items()) or "none"
    share = 100 * facts["targets"] / max(facts["tokens"], 1)
    return (
        f"{facts['rows']:,} rows in the first of {facts['units']} shards → {facts['documents']:,} documents in "
        f"{facts['bins']:,} packed rows, {facts['tokens']:,} tokens, {share:.0f} % learned; left out: {left_out}; "
        f"bad: {facts['bad_rows']:,}; {facts['renderer']['tokenizer']}"
    )
