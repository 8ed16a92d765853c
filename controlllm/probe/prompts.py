"""The prompts to look at, as token ids: lines of a text, rows of JSON lines, or conversations."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config import ProbeConfig
from controlllm.errors import UserError

SHOWN = 16
"""Characters of a token in a figure."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how each of them is shown."""

    where: str
    """For people: the file's name and the row."""
    ids: list[int]
    tokens: list[str]
    cut: int
    """Tokens that were too many."""


def read_prompts(config: ProbeConfig, tokenizer: Any) -> list[Prompt]:
    """The first `config.items` of them. UserError names file and row of what cannot be read, is empty or too many."""
    found: list[Prompt] = []
    for where, row in _rows(config.prompts):
        if len(found) == config.items:
            break
        ids = _ids(row, where, tokenizer)
        kept = ids[: config.tokens]
        found.append(
            Prompt(where.rpartition("/")[2], kept, [visible(tokenizer.decode([i])) for i in kept], len(ids) - len(kept))
        )
    if not found:
        raise UserError(_none(config))
    return found


def check_prompts(config: ProbeConfig) -> None:
    """What can be known of a recipe's prompts before there is a tokenizer. UserError as `read_prompts`."""
    if config.prompts == "-":
        raise UserError("prompts: a recipe has no standard input; name a file, or write the prompts")
    count = 0
    for where, row in _rows(config.prompts):
        count += 1
        if not row:
            raise UserError(f"{where} is empty: it has no token")
    if not count:
        raise UserError(_none(config))


def _none(config: ProbeConfig) -> str:
    name = config.prompts if isinstance(config.prompts, str) else "the list"
    return f"prompts: {name} has no prompt; give it one per line"


def visible(text: str, *, most: int = SHOWN) -> str:
    """A token as one short word: spaces at its ends and line breaks are seen, what has no shape is named."""
    stripped = text.strip(" ")
    if not stripped:
        text = "·" * len(text)
    else:
        ahead = len(text) - len(text.lstrip(" "))
        text = "·" * ahead + stripped + "·" * (len(text) - ahead - len(stripped))
    text = text.replace("\n", "↵").replace("\t", "⇥")
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _rows(prompts: str | list[str]) -> Iterator[tuple[str, Any]]:
    """Text or a parsed row, and where it stands."""
    if isinstance(prompts, list):
        yield from ((f"prompt {number}", text) for number, text in enumerate(prompts, start=1))
        return
    lines = _lines(prompts)
    name = "standard input" if prompts == "-" else prompts
    as_json = Path(prompts).suffix in (".jsonl", ".json")
    if prompts == "-":
        as_json = next((line for _, line in lines if line.strip()), "").startswith("{")
    for number, line in lines:
        where = f"{name}: row {number}"
        if line.strip():
            yield where, _parsed(line, where) if as_json else line


def _lines(prompts: str) -> list[tuple[int, str]]:
    file = Path(prompts)
    if prompts != "-" and not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise UserError(f"--prompts {prompts}: {what}; give a .txt with a prompt per line, a .jsonl, or - for stdin")
    raw = sys.stdin.buffer.read() if prompts == "-" else file.read_bytes()
    return list(_decoded(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), prompts))


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: row {number} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _parsed(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); name a file of plain lines .txt") from None
    if not isinstance(row, dict) or not row.keys() & {"prompt", "messages"}:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has neither 'prompt' nor 'messages'; found: {found or 'nothing'}")
    return row.get("messages", row.get("prompt"))


def _ids(row: Any, where: str, tokenizer: Any) -> list[int]:
    """A conversation as the chat template writes it, up to the answer that is to come, if one is."""
    if isinstance(row, str):
        ids = tokenizer(row)["input_ids"]
    elif isinstance(row, list) and row and all(isinstance(turn, dict) and "role" in turn for turn in row):
        from controlllm.data.render import chat_text

        try:
            text = chat_text(row, tokenizer, prompt=row[-1]["role"] != "assistant")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        raise UserError(f"{where}: prompt must be a text, messages a list of turns with role and content")
    if not ids:
        raise UserError(f"{where} is empty: it has no token")
    return ids
