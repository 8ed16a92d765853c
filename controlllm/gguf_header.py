"""A GGUF file's first facts, read in milliseconds without numpy: the `gguf` package would load it."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from controlllm.errors import UserError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
SHORT_LIST = 64


def read_header(file: Path, *endings: str) -> dict[str, Any]:
    """Metadata values whose keys end so (`.block_count`), up to where all are found; stops there."""
    size = file.stat().st_size
    found: dict[str, Any] = {}
    try:
        with file.open("rb") as stream:
            for key, value in _pairs(stream, file, size):
                found |= {ending: value for ending in endings if key.endswith(ending)}
                if len(found) == len(endings):
                    break
    except (struct.error, EOFError, KeyError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{file}: damaged or truncated GGUF file; get it again") from None
    return found


def _pairs(stream: BinaryIO, file: Path, size: int) -> Iterator[tuple[str, Any]]:
    if stream.read(4) != b"GGUF":
        raise UserError(f"{file}: not a GGUF file")
    version, _tensors, pairs = struct.unpack("<IQQ", stream.read(20))
    if version not in (2, 3):
        raise UserError(f"{file}: GGUF version {version} (or big-endian); versions 2 and 3 are read")
    for _ in range(pairs):
        key = _string(stream, size).decode()
        yield key, _value(stream, _unpack(stream, "<I"), size)


def _value(stream: BinaryIO, kind: int, size: int) -> Any:
    if kind == _STRING:
        return _string(stream, size).decode()
    if kind != _ARRAY:
        return _unpack(stream, _SCALARS[kind])
    item, count = _unpack(stream, "<I"), _unpack(stream, "<Q")
    if item in _SCALARS:
        _skip(stream, count * struct.calcsize(_SCALARS[item]), size)
    else:
        values = [_value(stream, item, size) for _ in range(count)]
        return values if count <= SHORT_LIST else None
    return None  # numbers in lists, and long lists, are of no interest here


def _string(stream: BinaryIO, size: int) -> bytes:
    length = _unpack(stream, "<Q")
    if length > size - stream.tell():
        raise EOFError
    return stream.read(length)


def _skip(stream: BinaryIO, length: int, size: int) -> None:
    if length > size - stream.tell():
        raise EOFError
    stream.seek(length, 1)


def _unpack(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]
