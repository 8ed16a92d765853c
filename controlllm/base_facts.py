"""What a base model says of its licence and languages, kept beside its weights for the model card."""

import json
from pathlib import Path
from typing import Any

import yaml

from controlllm.gguf_header import read_header
from controlllm.progress import console

FILE = "base.json"
CARD = "README.md"
_STATED = ("license", "license_name", "license_link", "language")
_GGUF = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
    "general.languages": "language",
    "general.name": "title",
    "general.organization": "organization",
}


def keep_facts(facts: dict[str, Any], folder: Path) -> None:
    """Write `base.json`, or nothing where nothing is stated: a folder without a card stays as it was."""
    if facts:
        (folder / FILE).write_text(json.dumps(facts, indent=1, sort_keys=True))


def folder_facts(folder: Path) -> dict[str, Any]:
    """By the first that there is: base.json, the front matter of README.md, the lineage of a model of ours."""
    if (folder / FILE).exists():
        return json.loads((folder / FILE).read_text())
    if stated := _front_matter(folder / CARD):
        return stated
    config = folder / "config.json"
    lineage = json.loads(config.read_text()).get("lineage") if config.exists() else None
    return dict((lineage or {}).get("base") or {})


def gguf_facts(file: Path) -> dict[str, Any]:
    """From the file's metadata, and its own name."""
    found = read_header(file, *_GGUF)
    return {ours: found[key] for key, ours in _GGUF.items() if found.get(key)} | {"file": file.name}


def _front_matter(file: Path) -> dict[str, Any]:
    """Of a card as the Hub has it; {} where there is none."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        stated = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        console.print(f"[yellow]![/] {file.name} of the base model has no valid front matter: its licence is not known")
        return {}
    if not isinstance(stated, dict):
        return {}
    return {name: stated[name] for name in _STATED if isinstance(stated.get(name), str | list)}
