"""A checkpoint and its model card to a hub, in one commit: all of it is there, or nothing is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.card import card_of
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.record import Record, open_record
from controlllm.shareable import File, check_text, shared_files
from controlllm.whole import INDEX

CARD_LINES = 40
CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What is sent, checked."""

    repo: str
    files: list[File]
    card: str

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files) + len(self.card.encode())


def pack(
    target: Path, repo: str, *, license: str | None = None, base_model: str | None = None, anyway: bool = False
) -> Parcel:
    """The files of the run's model or the checkpoint, and its card. Nothing is sent.

    Raises UserError for a folder that is not fit to be shared, for a name that no repository has, and for a run whose
    gate failed, unless it is to be sent `anyway`.
    """
    _check_name(repo)
    record = open_record(target)
    if record.checkpoint is None:
        raise UserError(
            f"{target}: has no model to push; run controlllm consolidate RECIPE, or give the model's folder"
        )
    if not anyway:
        _check_gate(record, target)
    card = card_of(record, license=license, base_model=base_model, repo=repo)
    check_text(card, CARD)
    return Parcel(repo, shared_files(record.checkpoint), card)


def show(parcel: Parcel) -> str:
    """What would be sent: files, sizes, the beginning of the card."""
    rows = [(CARD, len(parcel.card.encode())), *((file.name, file.size) for file in parcel.files)]
    width = max(len(name) for name, _ in rows)
    listed = [f"{name:<{width}}  {size:>15,} bytes" for name, size in rows]
    lines = parcel.card.splitlines()
    more = [f"... {len(lines) - CARD_LINES} more lines"] if len(lines) > CARD_LINES else []
    total = f"{len(rows)} files, {parcel.bytes:,} bytes, for {parcel.repo}"
    return "\n".join([*listed, total, "", f"{CARD}:", *(f"  {line}" for line in lines[:CARD_LINES]), *more])


def send(parcel: Parcel, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Make the repository and the branch where they are missing, send everything, commit once; returns the address.

    The hub is HF_ENDPOINT or the Hugging Face Hub, the token HF_TOKEN or that of `hf auth login`. Weights that are
    there already are not sent again: a push that failed goes on where it stopped. Weights of an earlier push under
    other names are removed in the same commit, because a loader would find both.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set: unset it to push, or look with --dry-run at what would be sent")
    if get_token() is None:
        raise UserError("no token for the hub: run hf auth login, or set HF_TOKEN to one that may write")
    api: Any = HfApi(endpoint=endpoint)
    with _explained(parcel.repo, endpoint, revision):
        api.whoami()
        repo = api.create_repo(parcel.repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise UserError(f"{repo} is there and public: make it private on its page first, or leave out --private")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=revision)
        operations: list[Any] = [CommitOperationAdd(CARD, parcel.card.encode())]
        operations += [CommitOperationAdd(file.name, str(file.path)) for file in parcel.files]
        operations += [CommitOperationDelete(name) for name in _left_over(there, parcel)]
        with console.status(f"  sending {parcel.bytes:,} bytes to {endpoint}/{repo}"):
            made = api.create_commit(repo, operations, commit_message=message or "Model and card", revision=revision)
    return str(made.commit_url)


def _left_over(there: list[str], parcel: Parcel) -> list[str]:
    sent = {file.name for file in parcel.files}
    weights = (n for n in there if "/" not in n and (n == INDEX or n.endswith(".safetensors")))
    return sorted(set(weights) - sent)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(
            f"'{repo}' is no name of a repository: write owner/name with letters, digits, '-', '_' and '.', at most 96"
        ) from None


def _check_gate(record: Record, target: Path) -> None:
    gate = record.summary.get("gate") or {}
    if gate and not gate.get("passed", True):
        said = gate.get("sentence") or ", ".join(map(str, gate.get("failed", []))) or "see the report"
        raise UserError(f"{target}: its gate failed ({said}); --anyway pushes it all the same")


@contextmanager
def _explained(repo: str, endpoint: str, revision: str | None) -> Iterator[None]:
    """What the hub says, as one line with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        said = {
            401: "refuses the token: run hf auth login, or set HF_TOKEN to one that is valid",
            403: f"does not let this token write to {repo}: make one with the right to write there",
            404: f"knows no {repo}{f' with revision {revision}' if revision else ''} that this token may write to",
            413: "says that a file is too large: save the model in smaller pieces (max_shard_size)",
        }.get(code or 0, f"answered {code}: {(error.server_message or str(error)).splitlines()[0]}")
        raise UserError(f"{endpoint} {said}; nothing was committed, the same command tries again") from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[reportPrivateImportUsage] - its HTTP library's own
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{endpoint} cannot be reached ({said}); the same command tries again") from None
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:  # a card or an upload that the hub refuses, as its client says it
        said = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{endpoint}: {said}; nothing was committed, the same command tries again") from None
