"""Checkpoints of what is trained: written while training goes on, seen whole or not at all, verified before they are
read; the newest that is whole is the one that counts, whatever number of processes and sharding it goes on with.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor, nn

from controlllm.config import CheckpointConfig
from controlllm.data.location import is_remote
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.checkpoint_files import Damaged, LocalStore, Manifest, step_name, told, verify
from controlllm.train.checkpoint_remote import RemoteStore
from controlllm.train.checkpoint_tensors import (
    Offsets,
    Optimizer,
    OwnState,
    Written,
    named_tensors,
    own_share,
    read_into,
    read_tensors,
    write_shard,
)
from controlllm.train.distributed import World
from controlllm.train.staging import Staging
from controlllm.train.together import Together
from controlllm.train.trained import load_trained, trained_tensors

__all__ = ["Checkpoints", "load_trained", "trained_tensors"]


class Checkpoints:
    """The checkpoints of one run, in a folder that all its processes share, or a URI.

    All methods but `failed` are called by all processes, and what goes wrong in one is raised in all.
    """

    def __init__(
        self,
        folder: Path | str,
        config: CheckpointConfig,
        *,
        world: World,
        identity: Mapping[str, Any],
        scratch: Path | None = None,
    ):
        """identity: what makes the run this run, by name; a checkpoint of another is refused.
        scratch: a folder of this machine, which a URI needs.
        """
        self.config, self.world, self.identity = config, world, _plain(dict(identity))
        self._store = _store(str(folder), scratch, world)
        self._together = Together(world)
        self._staging = Staging()
        self._share: tuple[Any, Offsets] = (None, {})
        self._passed_over: set[int] = set()
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def restore(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Read the newest verified checkpoint into place and return its state; None where there is no checkpoint.

        UserError where it is of another run, or where there are some and none is whole.
        """
        manifest = self._newest()
        if manifest is None and self._passed_over:
            raise UserError(
                f"{self._store}: none of its {len(self._passed_over)} checkpoints is whole; "
                f"choose another train.checkpoint.folder, or remove this one to begin anew"
            )
        return self._read(manifest, model, optimizer)

    def restore_best(self, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any] | None:
        """The trained tensors of the newest checkpoint marked best, and its state; None where there is none.

        optimizer: whose state stays as it is; needed where it is an OwnState, which holds the trained tensors.
        """
        own = optimizer if isinstance(optimizer, OwnState) else None
        return self._read(self._newest(only_best=True), model, own, with_optimizer=False)

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: dict[str, Any],
        *,
        best: bool = False,
        wait: bool = False,
    ) -> None:
        """Copy what is trained, then write it in the background. `state` is plain JSON and has the step.

        Waits for the save before, and raises its error.
        """
        self.wait()
        tensors = named_tensors(model, optimizer)
        offsets = self._offsets(tensors)
        staged = self._staging.copy({name: tensors[name] for name in offsets})
        facts = Manifest(state["step"], _plain(state), self.identity, self.world.size, best, {})
        self._thread = Thread(target=self._write, args=(facts, staged, offsets), name="checkpoint", daemon=True)
        self._thread.start()
        if wait or not self.config.asynchronous:
            self.wait()

    def failed(self) -> bool:
        """Whether the save in the background has failed; `wait` says why. Of this process, at once."""
        return self._error is not None

    def wait(self) -> None:
        """Until the running save is done; UserError or OSError where it failed, and nothing of it is visible then."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _offsets(self, tensors: dict[str, Tensor]) -> Offsets:
        """What this process writes: agreed upon once, as long as the tensors are the same."""
        signature = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if self._share[0] != signature:
            self._share = signature, own_share(tensors, rank=self.world.rank, gather=self._together.gather)
        return self._share[1]

    def _write(self, facts: Manifest, staged: dict[str, Tensor], offsets: Offsets) -> None:
        """In the background, on every process at the same time."""
        try:
            self._together.do(lambda: self._store.begin(facts.step) if self.world.is_main else None)
            written = self._together.do(lambda: self._write_own(facts.step, staged, offsets))
            manifest = replace(facts, files={name: [*file] for part in written for name, file in part.items()})
            self._together.do(lambda: self._publish(manifest) if self.world.is_main else None)
        except Exception as error:  # noqa: BLE001 - `wait` raises it
            self._error = told(error, f"{self._store}/{step_name(facts.step)}")
            if self.world.is_main:
                with suppress(OSError, UserError):  # the error before says it; the next save clears what is left
                    self._store.abandon(facts.step)

    def _write_own(self, step: int, staged: dict[str, Tensor], offsets: Offsets) -> dict[str, Written]:
        if not staged:
            return {}
        name = f"shard-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        file = self._store.partial(step) / name
        try:
            written = write_shard(file, staged, offsets)
            self._store.deliver(step, name)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        return {name: written}

    def _publish(self, manifest: Manifest) -> None:
        """Make it visible, then remove what is not to be kept, damaged ones that it takes the place of first."""
        self._store.publish(manifest.step, manifest)
        steps = self._store.steps()
        good = [step for step in steps if step == manifest.step or step not in self._passed_over]
        kept = {manifest.step, *good[-self.config.keep :]}
        kept |= {step for step in good if self.config.keep_every and step % self.config.keep_every == 0}
        if kept != set(good):
            kept |= set([step for step in good if self._is_best(step)][-1:])
        for step in steps:
            if step not in kept:
                self._store.remove(step)
        self._passed_over = set()

    def _is_best(self, step: int) -> bool:
        try:
            return self._store.manifest(step).best
        except Damaged:
            return False

    def _newest(self, *, only_best: bool = False) -> Manifest | None:
        """The newest verified checkpoint; damaged ones are named and passed over."""
        self.wait()
        self._passed_over = set()
        steps = self._together.do(lambda: self._store.steps() if self.world.is_main else [])[0]
        for step in reversed(steps):
            found = self._together.do(lambda step=step: self._examined(step, only_best))
            problem = next((item for item in found if isinstance(item, str)), None)
            if problem is not None:
                self._passed_over.add(step)
                if self.world.is_main:
                    console.print(f"[yellow]![/] {self._store}/{step_name(step)} is passed over: {problem}")
            elif isinstance(found[0], Manifest):
                return found[0]
        return None

    def _examined(self, step: int, only_best: bool) -> Manifest | str | None:
        """The manifest where the checkpoint is whole, what is wrong where it is not, None where it is not wanted."""
        if not self._store.is_fetched_by(self.world):
            return None
        try:
            manifest = self._store.manifest(step)
            self._require_this_run(manifest)
            if only_best and not manifest.best:
                return None
            self._store.fetch(step, manifest)
            verify(self._store.place(step), manifest)
        except Damaged as damage:
            return str(damage)
        return manifest

    def _require_this_run(self, manifest: Manifest) -> None:
        there, here = manifest.identity, self.identity
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"{self._store}: holds checkpoints of another run: {name} is {there.get(name)!r} there and "
                    f"{here.get(name)!r} here; choose another train.checkpoint.folder or remove this one"
                )

    def _read(
        self, manifest: Manifest | None, model: nn.Module, optimizer: Optimizer | None, *, with_optimizer: bool = True
    ) -> dict[str, Any] | None:
        if manifest is None:
            return None
        place = self._store.place(manifest.step)
        if isinstance(optimizer, OwnState):
            tensors = optimizer.tensors(model, with_optimizer=with_optimizer)
            self._together.do(lambda: read_into(place, tensors))
            optimizer.take(model, tensors)  # only after nobody has failed
        else:
            self._together.do(lambda: read_tensors(place, model, optimizer))
        if self._store.is_fetched_by(self.world):
            self._store.release(manifest.step)
        return manifest.state


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def _store(folder: str, scratch: Path | None, world: World) -> LocalStore | RemoteStore:
    if not is_remote(folder):
        return LocalStore(Path(folder.removeprefix("file://")).expanduser())
    assert scratch is not None, f"{folder} needs a scratch folder on this machine"
    return RemoteStore(folder, scratch=scratch, node=world.rank - world.local_rank)
