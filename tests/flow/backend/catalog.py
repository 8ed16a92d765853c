"""The cache of task outputs: by task, interface, cache version and inputs, where a literal's hash stands for it."""

import hashlib
from collections.abc import Iterable
from typing import Any

from flyteidl.core import literals_pb2


class Catalog:
    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def get(self, key: str) -> literals_pb2.LiteralMap | None:
        return literals_pb2.LiteralMap.FromString(self.kept[key]) if key in self.kept else None

    def put(self, key: str, outputs: literals_pb2.LiteralMap) -> None:
        self.kept[key] = outputs.SerializeToString(deterministic=True)


def catalog_key(task: Any, inputs: literals_pb2.LiteralMap, *, names: Iterable[str] | None = None) -> str:
    """names: of the inputs that count; all that the task does not ignore when left out."""
    ignored = set(task.metadata.cache_ignore_input_vars)
    digest = hashlib.sha256()
    for part in (task.id.project, task.id.domain, task.id.name, task.metadata.discovery_version):
        digest.update(f"{part}\0".encode())
    digest.update(task.interface.SerializeToString(deterministic=True))
    for name in sorted(set(inputs.literals if names is None else names) - ignored):
        digest.update(f"\0{name}\0".encode() + _counts(inputs.literals[name]))
    return digest.hexdigest()


def _counts(literal: literals_pb2.Literal) -> bytes:
    """What of a literal tells two inputs apart."""
    if literal.hash:
        return f"hash {literal.hash}".encode()
    if literal.WhichOneof("value") == "collection":
        return b"[" + b",".join(_counts(each) for each in literal.collection.literals) + b"]"
    if literal.WhichOneof("value") == "map":
        return b"{" + b",".join(k.encode() + _counts(v) for k, v in sorted(literal.map.literals.items())) + b"}"
    if literal.scalar.WhichOneof("value") == "union":
        return b"union" + _counts(literal.scalar.union.value)
    return literal.SerializeToString(deterministic=True)
