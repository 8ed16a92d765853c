"""Reading what the stages left behind."""

import json
from pathlib import Path
from typing import Any

from controlllm.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """UserError where it is missing or damaged."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: is damaged ({error.msg}); run the stage that makes it again") from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A JSON object per line."""
    try:
        return [json.loads(line) for line in read_text(file).split("\n") if line]
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: is damaged ({error.msg}); run the stage that makes it again") from None


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run the stage that makes it again") from None
