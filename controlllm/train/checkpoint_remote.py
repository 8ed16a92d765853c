"""Checkpoints on another machine: written here, sent file by file; the manifest last, without which no step exists."""

import shutil
from pathlib import Path

from controlllm.data.location import file_system
from controlllm.data.remote import info_of, read_range, retried, told
from controlllm.data.shared_folder import SharedFolder
from controlllm.train.checkpoint_files import MANIFEST, Damaged, Manifest, step_name, step_numbers
from controlllm.train.distributed import World


class RemoteStore:
    """As LocalStore, of a URI; `scratch` is a folder of this machine, `node` the first rank of this machine."""

    def __init__(self, uri: str, *, scratch: Path, node: int):
        self.uri, self.scratch, self.node = uri.rstrip("/"), scratch, node

    def __str__(self) -> str:
        return self.uri

    def place(self, step: int) -> Path:
        """Where `fetch` puts a step on this machine."""
        return self.scratch / f"{step_name(step)}.fetched-{self.node}"

    def partial(self, step: int) -> Path:
        folder = self.scratch / f"sent-{self.node}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_fetched_by(self, world: World) -> bool:
        return world.local_rank == 0

    def steps(self) -> list[int]:
        return [step for step in self._folders() if info_of(f"{self._uri(step)}/{MANIFEST}") is not None]

    def manifest(self, step: int) -> Manifest:
        uri = f"{self._uri(step)}/{MANIFEST}"
        info = info_of(uri)
        if info is None:
            raise Damaged(f"{MANIFEST} is missing")
        return Manifest.parse(read_range(uri, 0, int(info["size"])), step=step)

    def fetch(self, step: int, manifest: Manifest) -> None:
        """Bring the files here; by one process of each machine. Raises Damaged where names or sizes do not fit."""
        folder = SharedFolder(self._uri(step))
        there = {name: stored.size for name, stored in folder.files().items() if name != MANIFEST}
        wanted = {name: size for name, (size, _) in manifest.files.items()}
        for name in sorted(there.keys() | wanted.keys()):
            if name not in wanted:
                raise Damaged(f"{name} does not belong to it")
            if name not in there:
                raise Damaged(f"{name} is missing")
            if there[name] != wanted[name]:
                raise Damaged(f"{name} has {there[name]} bytes instead of {wanted[name]}")
        place = self.place(step)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in wanted:
            with (place / name).open("wb") as stream:
                stream.writelines(folder.blocks(name))

    def release(self, step: int) -> None:
        shutil.rmtree(self.place(step), ignore_errors=True)

    def begin(self, step: int) -> None:
        """Clear what a killed process left of this step, or a step that is written again."""
        if step in self._folders():
            self.remove(step)

    def deliver(self, step: int, name: str) -> None:
        self._send(step, self.partial(step) / name)

    def publish(self, step: int, manifest: Manifest) -> None:
        file = self.partial(step) / MANIFEST
        file.write_bytes(manifest.dump())
        self._send(step, file)
        for other in set(self._folders()) - {*self.steps(), step}:
            self.remove(other)

    def abandon(self, step: int) -> None:
        if step in self._folders():
            self.remove(step)

    def remove(self, step: int) -> None:
        """First what makes it visible."""
        uri = self._uri(step)
        with told(uri):
            system, path = file_system(uri)
            if info_of(f"{uri}/{MANIFEST}") is not None:
                system.rm_file(f"{path}/{MANIFEST}")
            system.rm(path, recursive=True)

    def _uri(self, step: int) -> str:
        return f"{self.uri}/{step_name(step)}"

    def _folders(self) -> list[int]:
        """Steps with or without a manifest."""
        with told(self.uri):
            system, path = file_system(self.uri)
            try:
                entries = system.ls(path, detail=True)
            except FileNotFoundError:
                return []
        return step_numbers(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries)

    def _send(self, step: int, file: Path) -> None:
        """Send and forget; tried again where that may help."""
        folder = SharedFolder(self._uri(step))

        def put() -> bytes:
            folder.put(file)
            return b""

        retried(f"{folder}/{file.name}", put)
        if (there := folder.size(file.name)) != file.stat().st_size:
            raise OSError(f"{folder}/{file.name}: {there} bytes arrived of {file.stat().st_size}")
        file.unlink()
