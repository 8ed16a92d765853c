"""What the model will see: the first packed rows of a run, token by token, before anything is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from controlllm.config import RunConfig
from controlllm.data.prepared import open_job, shard_root
from controlllm.data.shard import Facts
from controlllm.data.shelf import Shelf, StoredShelf
from controlllm.data.types import Unit

STYLES = {"target": "green", "context": "dim", "target special": "bold green reverse", "context special": "cyan"}
CONTROL = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "␡"}
    | dict.fromkeys(range(128, 160), "�")
)


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
    """Whether other parts of it stand elsewhere, or were left out."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Preview:
    """The first packed rows in the order of training, and a sentence about each dataset."""

    rows: list[list[Shown]]
    datasets: dict[str, str]
    notes: list[str]
    """In what the run's order can differ from this one, and why there are fewer rows than were asked for."""


def preview(config: RunConfig, *, rows: int) -> Preview:
    """Makes of each dataset only the first shard that has a row; a run finds it later."""
    from transformers import AutoTokenizer

    from controlllm.data.loader import Mix
    from controlllm.ingest import ingest_data, ingest_model

    base = ingest_model(config.model).path
    data = ingest_data(base, config.mix, config.benchmark, config.pack).path
    shelves: list[FirstShelf] = []
    sentences: dict[str, str] = {}
    for number, dataset in enumerate(config.mix.datasets):
        job, manifest = open_job(dataset, f"mix.datasets.{number}", base, data, config.pack)
        made = _first_shards(job, manifest)
        shelves.append(FirstShelf(dataset.name, made, manifest.units, all_units=config.mix.order != "length"))
        sentences[dataset.name] = _sentence(made[-1], len(manifest.units), job.renderer.facts()["tokenizer"])
    mix = Mix(shelves, config.mix, config.pack)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shown = [list(_documents(mix, position, tokenizer)) for position in _positions(mix, rows)]
    return Preview(shown, sentences, list(_notes(config, shelves, asked=rows, shown=len(shown))))


class FirstShelf(StoredShelf):
    """The first shards of a dataset; of the others only how many rows they may have."""

    def __init__(self, name: str, made: list[Facts], units: Sequence[Unit], *, all_units: bool):
        super().__init__(name, made, shard_root())
        self.made = len(made)
        self.units = len(units) if all_units else len(made)
        self._share = [max(unit.end - unit.start, unit.rows or 0, 1) / max(self._span(units), 1) for unit in units]

    def _span(self, units: Sequence[Unit]) -> int:
        return sum(max(unit.end - unit.start, unit.rows or 0, 1) for unit in units[: self.made])

    def rows_of(self, unit: int, kind: str = "train") -> int:
        """Of a shard that is not there, as many as its bytes let one expect."""
        if unit < self.made:
            return super().rows_of(unit, kind)
        return max(round(self._share[unit] * sum(super(FirstShelf, self).rows_of(u) for u in range(self.made))), 1)


def print_preview(made: Preview, *, to: Console | None = None) -> None:
    """To stdout: green is learned, dim is context, reversed is a special token; without colours ⟦ ⟧ is learned."""
    from rich.text import Text

    out = to or Console(highlight=False, soft_wrap=True, markup=False)
    plain = not out.is_terminal or out.no_color or out.color_system is None
    for number, row in enumerate(made.rows, start=1):
        tokens, targets = sum(d.tokens for d in row), sum(d.targets for d in row)
        out.rule(f"packed row {number}: {_count(len(row), 'document')}, {tokens} tokens, {targets} of them learned")
        for document in row:
            cut = " · cut" if document.is_cut else ""
            out.print(f"── {document.source} · {document.tokens} tokens{cut}", style="yellow")
            line = Text()
            for piece in _marked(document.pieces) if plain else document.pieces:
                line.append(piece.text, style=STYLES[piece.kind])
            out.print(line)
    out.rule("⟦ ⟧ is learned, the rest is context" if plain else "green is learned, dim is context")
    for line in (*(f"{name}: {about}" for name, about in made.datasets.items()), *made.notes):
        out.print(line)


def write_preview(made: Preview, page: Path, *, name: str) -> None:
    """One HTML page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("controlllm"), autoescape=True, trim_blocks=True)
    text = environment.get_template("preview.html").render(name=name, made=made)
    page.write_text(text, encoding="utf-8", errors="replace")


def _first_shards(job: Any, manifest: Any) -> list[Facts]:
    """Up to the first one with a row to train on. Raises UserError when there is none."""
    from controlllm.data.build import check_units, find_duplicates, make_units

    find_duplicates(job, manifest)
    made: list[Facts] = []
    for number in range(len(manifest.units)):
        made += [facts for _, facts, _ in make_units(job, manifest, [number], shards=shard_root(), workers=1)]
        if "train" in made[-1]["files"]:
            return made
    check_units(job, made)
    raise AssertionError("a dataset without a row to train on is refused")


def _positions(mix: Any, rows: int) -> Iterator[int]:
    """Places of the order up to the first whose shard is not there, of one pass at the most."""
    for position in range(min(rows, mix.epoch_rows)):
        dataset, unit, _ = mix.place(position)
        if unit >= mix.shelves[dataset].made:
            return
        yield position


def _notes(config: RunConfig, shelves: Sequence["FirstShelf"], *, asked: int, shown: int) -> Iterator[str]:
    if shown < asked:
        yield f"{_count(shown, 'packed row')} of the {asked} asked for: the first shards hold no more of them"
    growing = [shelf.name for shelf in shelves if shelf.made < len(shelf._share)]
    if growing and config.mix.order == "length":
        yield "mix.order is length: a run sorts the rows of all shards, here stand only those of the first ones"
    if growing and len(shelves) > 1 and config.mix.datasets[0].weight is None:
        yield f"the datasets' turns are estimated from the first shards: {', '.join(growing)} have more"


def _documents(mix: Any, position: int, tokenizer: Any) -> Iterator[Shown]:
    dataset, unit, place = mix.place(position)
    yield from documents_of(mix.shelves[dataset], unit, place, tokenizer)


def documents_of(shelf: Shelf, unit: int, place: int, tokenizer: Any) -> Iterator[Shown]:
    """The documents of one packed row."""
    row, facts = shelf.read(unit, place), shelf.facts(unit)
    split = _rows_in_parts(shelf, unit) if facts["cut"] else set()
    special = np.isin(row["input_ids"], tokenizer.all_special_ids)
    ends = np.cumsum(row["lengths"])
    for begin, end, number in zip(ends - row["lengths"], ends, row["rows"].tolist(), strict=True):
        ids, target, marked = row["input_ids"][begin:end], row["target"][begin:end], special[begin:end]
        pieces = list(_pieces(ids, target, marked, tokenizer))
        cut = number in split or (bool(facts["cut"]) and not marked[-4:].any())
        source = f"{shelf.name} · {_short(facts['unit']['uri'])} row {number}"
        yield Shown(shelf.name, source, len(ids), int(target.sum()), cut, pieces)


def _rows_in_parts(shelf: Shelf, unit: int) -> set[int]:
    """Source rows of which a shard holds more than one piece."""
    rows = [shelf.read(unit, place)["rows"] for place in range(shelf.rows_of(unit))]
    numbers, counts = np.unique(np.concatenate(rows), return_counts=True)
    return set(numbers[counts > 1].tolist())


def _short(uri: str) -> str:
    """The file's name; of a procedural source what it is."""
    return uri.partition("://")[0] if uri.startswith("reasoning-gym") else uri.rsplit("/", 1)[-1]


def _pieces(ids: np.ndarray, target: np.ndarray, special: np.ndarray, tokenizer: Any) -> Iterator[Piece]:
    def kind(i: int) -> tuple[str, int]:
        name = "target" if target[i] else "context"
        return (f"{name} special", i) if special[i] else (name, -1)

    for (name, _), run in groupby(range(len(ids)), key=kind):
        places = list(run)
        yield Piece(_visible(_text(ids, places[0], places[-1] + 1, tokenizer)), name)


def _text(ids: np.ndarray, begin: int, end: int, tokenizer: Any) -> str:
    """Tokens [begin, end) as they read after the one before them: alone, some tokenizers drop the first blank."""
    before = tokenizer.decode(ids[max(begin - 1, 0) : begin].tolist(), clean_up_tokenization_spaces=False)
    text = tokenizer.decode(ids[max(begin - 1, 0) : end].tolist(), clean_up_tokenization_spaces=False)
    if text.startswith(before):
        return text[len(before) :]
    return tokenizer.decode(ids[begin:end].tolist(), clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """Control characters as pictures of themselves: in a terminal they would do things."""
    return text.translate(CONTROL)


def _marked(pieces: list[Piece]) -> Iterator[Piece]:
    """With brackets around what is learned."""
    for learned, run in groupby(pieces, key=lambda piece: piece.kind.startswith("target")):
        run = list(run)
        if learned:
            run[0] = Piece(f"⟦{run[0].text}", run[0].kind)
            run[-1] = Piece(f"{run[-1].text}⟧", run[-1].kind)
        yield from run


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(made: Facts, units: int, tokenizer: str) -> str:
    train = made["files"]["train"]
    left_out = ", ".join(f"{count:,} {name}" for name, count in made["filtered"].items()) or "none"
    return (
        f"{made['rows']:,} rows in the first of {_count(units, 'shard')} → {_count(train['documents'], 'document')} in "
        f"{_count(train['bins'], 'packed row')}, {train['tokens']:,} tokens, "
        f"{100 * train['targets'] / train['tokens']:.0f} % learned; left out: {left_out}; bad: {made['bad_rows']:,}; "
        f"{tokenizer}"
    )
