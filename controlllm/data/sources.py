"""Where rows come from: files, files that installed packages ship, and procedural puzzles."""

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

from controlllm.errors import UserError

Row = dict[str, Any]
GYM = "reasoning-gym://"


def read_rows(source: str, *, rows: int | None = None, seed: int = 0) -> Iterator[Row]:
    """The rows of a source, in order. `seed` moves a procedural source to other items and does nothing to files."""
    if source.startswith(GYM):
        yield from _puzzles(source.removeprefix(GYM).split("+"), rows=rows or 1000, seed=seed)
        return
    taken = 0
    for file in source_files(source):
        for row in _reader(file)(file):
            if rows is not None and taken == rows:
                return
            taken += 1
            yield row


def source_files(source: str) -> list[Path]:
    """The files behind `pkg://package/path`, `file://path` or a plain path; the last part may be a glob."""
    folder, pattern = _locate(source)
    files = sorted(folder.glob(pattern)) if any(c in pattern for c in "*?[") else [folder / pattern]
    if not files or not all(file.exists() for file in files):
        raise UserError(f"{source}: no such file (looked in {folder})")
    if empty := [file for file in files if file.is_file() and file.stat().st_size == 0]:
        raise UserError(f"{empty[0]}: the file is empty")
    if folders := [file for file in files if file.is_dir()]:
        raise UserError(f"{folders[0]}: is a directory; name a file, or files as in {folders[0]}/*.jsonl")
    return files


def _locate(source: str) -> tuple[Path, str]:
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        path = package_folder(package, source) / inside
    elif "://" in source and not source.startswith("file://"):
        raise UserError(f"{source}: this kind of source is not known; known: file://, pkg://, {GYM}, a path")
    else:
        path = Path(source.removeprefix("file://")).expanduser()
    return path.parent, path.name


def package_folder(package: str, source: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise UserError(f"{source}: the package '{package}' is not installed; pip install 'controlllm[demo]'")
    return Path(places[0])


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    name = file.name.removesuffix(".gz")
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader
    raise UserError(f"{file}: format not known by its name; known: {', '.join(_READERS)} (and .gz of the text formats)")


def _open(file: Path) -> Any:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8-sig")


def _text(file: Path) -> str:
    try:
        with _open(file) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{file}: damaged gzip file: {error}") from None


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            yield _object(line, f"{file}:{number}")


def _json(file: Path) -> Iterator[Row]:
    try:
        rows = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}: item {number} is not an object of fields, found {type(row).__name__}")
        yield row


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object of fields, found {type(row).__name__}")
    return row


def _csv(file: Path) -> Iterator[Row]:
    yield from csv.DictReader(_text(file).splitlines(), delimiter="\t" if ".tsv" in file.name else ",")


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        for batch in parquet.iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: damaged Parquet file: {error}") from None


def _yaml(file: Path) -> Iterator[Row]:
    row = yaml.safe_load(_text(file))
    if not isinstance(row, dict):
        raise UserError(f"{file}: a row is a mapping of fields, found {type(row).__name__}")
    yield row


def _plain(file: Path) -> Iterator[Row]:
    yield {"text": _text(file)}


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".txt": _plain,
}


def _puzzles(kinds: list[str], *, rows: int, seed: int) -> Iterator[Row]:
    """Kinds (`gcd` or `chain_sum?max_terms=2&...`) in turn.

    Item i of a kind is made from seed + i, so only distant seeds give other puzzles.
    """
    import reasoning_gym

    each = -(-rows // len(kinds))
    asked = [(kind.partition("?")[0], dict(parse_qsl(kind.partition("?")[2]))) for kind in kinds]
    made = [
        reasoning_gym.create_dataset(name, size=each, seed=seed, **{key: int(value) for key, value in options.items()})
        for name, options in asked
    ]
    for number in range(rows):
        item = made[number % len(kinds)][number // len(kinds)]
        yield {"kind": asked[number % len(kinds)][0], "question": item["question"], "answer": item["answer"]}
