"""The page of consolidating: the checkpoint's form, its files with sizes and hashes, its tensors."""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from controlllm.decks.page import Page, Section, Table, Tile, size_of
from controlllm.private import clean

Json = dict[str, Any]
SHOWN = 60
"""Tensors in the table, the largest first."""


def page(folder: Path, lineage: Json, places: Mapping[str, Path]) -> Page:
    """Of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    tensors = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in _tensors(file)]
    parameters = sum(count for _, _, _, count in tensors)
    dtypes = Counter[str]()
    for _, dtype, _, count in tensors:
        dtypes[dtype] += count
    weights = sum(stamp["size"] for name, stamp in lineage["files"].items() if name.endswith(".safetensors"))
    architecture = ", ".join(config.get("architectures") or [])
    tiles = [
        Tile("Form", _form(folder, config), architecture),
        Tile("Parameters", f"{parameters:,}", f"in {len(tensors):,} tensors"),
        Tile("Weights", size_of(weights)),
        Tile(
            "Numbers",
            ", ".join(dtypes),
            ", ".join(f"{name} {n:,}" for name, n in dtypes.items()) if len(dtypes) > 1 else "",
        ),
    ]
    sections = [_files(lineage), _largest(tensors)]
    if about := config.get("lineage"):
        rows = [[name, json.dumps(clean(value, name), ensure_ascii=False)] for name, value in about.items()]
        sections.append(Section("What the checkpoint says of itself", tables=[Table(["lineage", ""], rows)]))
    return Page("consolidate", "The tuned model", tiles, sections, made=lineage)


def _form(folder: Path, config: Json) -> str:
    if config.get("model_type") == "controlllm":
        return "expanded"
    if "auto_map" in config:
        return "with code of its own"
    return "plain, with its adapter" if (folder / "adapter").is_dir() else "plain"


def _files(lineage: Json) -> Section:
    files = sorted(lineage["files"].items(), key=lambda item: -item[1]["size"])
    rows = [[name, size_of(stamp["size"]), stamp["hash"]] for name, stamp in files]
    return Section("Files", tables=[Table(["File", "Size", "xxh3-128"], rows, numbers=["Size"])])


def _largest(tensors: list[tuple[str, str, list[int], int]]) -> Section:
    largest = sorted(tensors, key=lambda tensor: -tensor[3])
    rows = [[name, dtype, " × ".join(map(str, shape)), f"{count:,}"] for name, dtype, shape, count in largest[:SHOWN]]
    caption = f"The {SHOWN} largest of {len(tensors):,}." if len(tensors) > SHOWN else ""
    return Section("Tensors", tables=[Table(["Tensor", "Type", "Shape", "Numbers"], rows, caption, ["Numbers"])])


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """Name, type, shape and count, out of the file's header alone."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor["dtype"], tensor["shape"], prod(tensor["shape"])
