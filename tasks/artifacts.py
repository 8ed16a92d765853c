"""What passes between tasks: folders, and configs whose mistakes are one line."""

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import click
from flytekit import Cache, Deck, FlyteContextManager, HashMethod, current_context
from flytekit.exceptions.system import FlyteDownloadDataException, FlyteUploadDataException
from flytekit.exceptions.user import FlyteDataNotFoundException, FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory
from pydantic import ValidationError

from controlllm.config import RunConfig
from controlllm.errors import UserError, is_passing, one_line
from controlllm.fingerprint import code_version, content_of
from controlllm.progress import console, is_first_process, prepare_environment
from controlllm.recipe import Source
from controlllm.store import content_hash, find_lineage

# On this machine the stage store is the cache: it says why a stage runs, and notices a changed or removed output.
# On a cluster, where the store is a pod's own disk, Flyte's catalog is.
os.environ.setdefault("FLYTE_LOCAL_CACHE_ENABLED", "false")

prepare_environment()

TRANSFERS = (FlyteDownloadDataException, FlyteUploadDataException)
"""What flytekit raises when its storage fails."""

P = ParamSpec("P")
R = TypeVar("R")


def _content(directory: FlyteDirectory) -> str:
    return content_hash(Path(str(directory.path)))


Folder = Annotated[FlyteDirectory, HashMethod(_content)]
"""A stage's output: Flyte knows it by its content, so that equal folders are equal inputs."""


class Recipe(RunConfig):
    """A RunConfig as Flyte reads it: a mistake is one line for the person, not a traceback."""

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Any:
        from controlllm.mistakes import explain

        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            mistake = explain(error, RunConfig, tree=json.loads(json_data), source=Source())
            raise click.ClickException(mistake) from None


DECK: dict[str, Any] = {"enable_deck": True, "deck_fields": ()}
"""Of a task with pages of its own, and without flytekit's, which ask pip that need not be there."""

LOCAL_RUN = "CONTROLLLM_LOCAL_RUN"
"""Set in the processes that a local run starts."""
_inputs: list[Path] = []
"""Folders that tasks of this process were given: parents that are not in the store of a pod."""


def publish(path: Path) -> FlyteDirectory:
    """Here a folder stays where it is; on a cluster Flyte uploads it, and its pages go into the task's Deck."""
    if not is_local() and is_first_process():
        show(lambda: _decks(path))
    return FlyteDirectory(str(path), remote_directory=False if is_local() else None)


def local(directory: FlyteDirectory) -> Path:
    """The folder on this machine's disk. UserError where a storage has lost it."""
    try:
        folder = Path(str(directory.download()))
    except FlyteDataNotFoundException:
        folder = None
    if folder is None or not folder.is_dir():
        raise UserError(f"{directory.remote_source or folder}: is not there any more; {_made_again_by()}")
    if find_lineage(folder) is not None and folder not in _inputs:
        _inputs.append(folder)
    return folder


def _made_again_by() -> str:
    if is_local():
        return "name another folder, or run the stage that makes it"
    run = current_context().execution_id.name
    return f"if a stage of this run made it, controlllm runs rerun {run} --relaunch --again makes it again"


def show(make: Callable[[], Mapping[str, str]]) -> None:
    """Put pages into the task's Deck; one that cannot be made costs no stage, and is said."""
    try:
        for name, html in make().items():
            Deck(name, html)
    except Exception as error:  # noqa: BLE001 - hours of work are worth more than a page about them
        console.print(f"the task's page was not made: {one_line(error)}", markup=False)


def _decks(path: Path) -> Mapping[str, str]:
    from controlllm.decks import decks_of

    return decks_of(path, _inputs)


def is_local() -> bool:
    """Whether the task runs here, not in a pod; processes that it starts know it from LOCAL_RUN."""
    state = FlyteContextManager.current_context().execution_state
    return LOCAL_RUN in os.environ or state is None or state.is_local_execution()


def end_in_one_line(said: str) -> NoReturn:
    """End a local run as a command ends on a mistake."""
    print(f"error: {said}", file=sys.stderr)
    raise SystemExit(1) from None


def stage_cache(*stages: str) -> Cache:
    """Cached by the inputs and by what the stages run: their code and the libraries that matter."""
    return Cache(version=content_of([code_version(stage) for stage in stages]), serialize=True)


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """A mistake of the user ends a local run with one line and exit code 1; on a cluster Flyte shows the error, and
    tries again what another try may cure."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not is_local() and (is_passing(error) or isinstance(error, TRANSFERS)):
                raise FlyteRecoverableException(one_line(error)) from error
            if not is_local() or not isinstance(error, UserError | OSError) or "--debug" in sys.argv:
                raise
            if "RANK" in os.environ:  # one of several processes: the one that started them says it, once
                raise UserError(one_line(error)) from error
            end_in_one_line(one_line(error))

    return run
