"""A conversation as a file: to train on, or to read."""

import json
import os
from collections.abc import Set
from pathlib import Path

from controlllm.chat.conversation import Conversation
from controlllm.errors import UserError
from controlllm.fingerprint import sync


def save(conversation: Conversation, file: Path, *, own: Set[Path]) -> Path:
    """Whole or not at all; `.jsonl` is a row of `messages` (of `text` without a chat template), `.md` is Markdown.

    own: files that may be written again. UserError for another ending, a file that exists, or nothing to save.
    """
    if file.suffix not in WRITTEN:
        raise UserError(f"/save: {file.name} must end in .jsonl, to train on, or .md, to read")
    if not conversation.turns:
        raise UserError("/save: nothing was said yet")
    place = file.expanduser().absolute()
    if place.exists() and place not in own:
        raise UserError(f"/save: {file} exists already; give another name")
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        fresh.write_text(WRITTEN[file.suffix](conversation), encoding="utf-8", errors="replace")
        sync(fresh)
        fresh.replace(place)
    except OSError as error:
        raise UserError(f"/save: {file} cannot be written: {error.strerror}") from None
    finally:
        fresh.unlink(missing_ok=True)
    return place


def _row(conversation: Conversation) -> str:
    chat = conversation.writer.has_template
    row = {"messages": conversation.messages()} if chat else {"text": conversation.text()}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _markdown(conversation: Conversation) -> str:
    if not conversation.writer.has_template:
        return conversation.text() + "\n"
    parts = [f"**{message['role'].capitalize()}**\n\n{message['content']}\n" for message in conversation.messages()]
    return "\n---\n\n".join(parts)


WRITTEN = {".jsonl": _row, ".md": _markdown}
