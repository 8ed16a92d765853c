"""Procedural puzzles as rows: everything that decides them stands in the URI and the number of rows."""

from collections.abc import Iterator
from importlib import metadata
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from controlllm.data.sources import GYM
from controlllm.data.types import Row, RowBatch, Unit
from controlllm.errors import UserError

DEFAULT_ROWS = 1000
_SEED = "#seed="


def puzzle_unit(source: str, *, rows: int | None, seed: int) -> Unit:
    """`reasoning-gym://gcd+chain_sum?max_terms=2`: kinds in turn, each with its options."""
    return Unit(f"{source}{_SEED}{seed}", "reasoning-gym", 0, 0, rows=DEFAULT_ROWS if rows is None else rows)


def puzzle_version() -> str:
    """What makes the puzzles besides the URI."""
    try:
        return f"reasoning-gym {metadata.version('reasoning-gym')}"
    except metadata.PackageNotFoundError:
        raise UserError(f"{GYM} needs reasoning-gym, which is not installed; pip install reasoning-gym") from None


def read_puzzles(unit: Unit, batch_rows: int) -> Iterator[RowBatch]:
    """Their rows: `kind`, `question`, `answer`; of kinds that are worked out, `solution`."""
    source, _, seed = unit.uri.partition(_SEED)
    assert unit.rows is not None
    rows = _puzzles(source.removeprefix(GYM).split("+"), rows=unit.rows, seed=int(seed))
    for start in range(0, unit.rows, batch_rows):
        end = min(start + batch_rows, unit.rows)
        numbers = np.arange(start + 1, end + 1, dtype=np.int64)
        yield RowBatch(source, numbers, dicts=[next(rows) for _ in range(start, end)])


def _puzzles(kinds: list[str], *, rows: int, seed: int) -> Iterator[Row]:
    """Item i of a kind is made from seed + i, so only distant seeds give other puzzles."""
    each = -(-rows // len(kinds))
    made = [_made(kind, size=each, seed=seed) for kind in kinds]
    names = [kind.partition("?")[0] for kind in kinds]
    for number in range(rows):
        item = made[number % len(kinds)][number // len(kinds)]
        row = {"kind": names[number % len(kinds)], "question": item["question"], "answer": item["answer"]}
        worked = item["metadata"].get("answer_cot")
        yield row | ({"solution": worked} if worked else {})


def _made(kind: str, *, size: int, seed: int) -> Any:
    import reasoning_gym

    name, _, options = kind.partition("?")
    try:
        numbers = {option: int(value) for option, value in parse_qsl(options)}
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **numbers)
    except (ValueError, TypeError, AssertionError) as error:  # as the library tells of an unknown name or option
        raise UserError(f"{GYM}{kind}: cannot be made: {error}") from None
