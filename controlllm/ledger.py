"""The lineage of every output that was ever made, without the output: what a pruned parent was, and what changed.

`CONTROLLLM_LINEAGE`, a folder or an fsspec URI that all machines reach, or `lineage` in the stage store. On a cluster,
where each pod has a store of its own, only the former tells a stage what is other than in the last execution.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlllm.errors import UserError
from controlllm.fingerprint import sync

if TYPE_CHECKING:
    from controlllm.data.shared_folder import SharedFolder

VARIABLE = "CONTROLLLM_LINEAGE"
FOLDER = "lineage"
NEWEST = 100
"""Of a stage that are read to find what changed."""
Json = dict[str, Any]


class Ledger:
    """`<root>/<stage>/<key>.json`, each written under another name and renamed.

    Every method raises UserError where the folder cannot be used, or an entry is damaged.
    """

    def __init__(self, root: str):
        self.root = root.rstrip("/")

    @property
    def is_shared(self) -> bool:
        """Whether it is one that a person named, and not this machine's own."""
        return VARIABLE in os.environ

    def find(self, stage: str, key: str) -> Json | None:
        """None where no such output was ever written down."""
        name = f"{key}.json"
        if remote := self._remote(stage):
            return None if remote.size(name) is None else _parsed(_bytes(remote, name), f"{remote}/{name}")
        return _read(file) if (file := self._folder(stage) / name).is_file() else None

    def of(self, stage: str) -> list[Json]:
        """The newest of a stage."""
        if remote := self._remote(stage):
            files = remote.files()
            names = sorted((name for name in files if name.endswith(".json")), key=lambda name: -files[name].made)
            return [_parsed(_bytes(remote, name), f"{remote}/{name}") for name in names[:NEWEST]]
        found = sorted(self._folder(stage).glob("[!.]*.json"), key=lambda file: -file.stat().st_mtime)
        return [_read(file) for file in found[:NEWEST]]

    def add(self, lineage: Json) -> None:
        """Write one down."""
        name = f"{lineage['key']}.json"
        text = json.dumps(lineage, indent=1)
        if (remote := self._remote(lineage["stage"])) is None:
            _write(self._folder(lineage["stage"]) / name, text)
            return
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / name).write_text(text)
            remote.put(Path(scratch) / name)

    def _folder(self, stage: str) -> Path:
        return Path(self.root) / stage.replace(" ", "-")

    def _remote(self, stage: str) -> "SharedFolder | None":
        if "://" not in self.root:
            return None
        from controlllm.data.shared_folder import SharedFolder

        return SharedFolder(f"{self.root}/{stage.replace(' ', '-')}")


def _bytes(remote: "SharedFolder", name: str) -> bytes:
    return b"".join(remote.blocks(name))


def _read(file: Path) -> Json:
    return _parsed(file.read_bytes(), str(file))


def _parsed(text: bytes, place: str) -> Json:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: is damaged ({error}); remove it") from None


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        sync(fresh)
        fresh.replace(file)
    except OSError as error:
        raise UserError(f"{VARIABLE}: {file.parent} cannot be written: {error.strerror}; name another folder") from None
