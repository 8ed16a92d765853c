"""Reading files that are not on this machine: every read is whole, tried again where that may help, or one error."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, cast

from controlllm.data.file_systems import library_errors, remote_system
from controlllm.data.seekable import Seekable
from controlllm.errors import Outage, UserError

TRIES = 5
TOTAL_SECONDS = 180.0
"""After this long no further try is made."""
FIRST_WAIT_SECONDS = 0.5
BUFFER_BYTES = 1 << 22
PIECE_BYTES = 1 << 25
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ShortRead(OSError):
    """A server sent fewer or more bytes than were asked for."""


def info_of(uri: str) -> dict[str, Any] | None:
    """What the file system knows of a file or folder, None where there is none; any other trouble is a UserError.

    fsspec's own `exists` takes a server that is down for a file that is not there.
    """
    with told(uri):
        system, path = remote_system(uri)
        try:
            return system.info(path)
        except FileNotFoundError:
            return None


def open_remote(uri: str) -> BinaryIO:
    """A seekable reader of a remote file."""
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(uri), BUFFER_BYTES))


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file, all of them."""
    return retried(uri, lambda: _fetch(uri, start, end))


@lru_cache(1)
def fetched(uri: str, version: str, start: int, end: int) -> bytes:
    """A stretch of a remote file that is hashed and then decoded: fetched once. `version` is of the file's stamp."""
    return b"".join(read_range(uri, at, min(at + PIECE_BYTES, end)) for at in range(start, end, PIECE_BYTES))


@contextmanager
def told(uri: str) -> Iterator[None]:
    """What goes wrong in a library within becomes one line; an Outage where another try may help."""
    from controlllm.data.location import shown

    where = shown(uri)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except PermissionError as error:
        raise UserError(f"{where}: no permission to read it ({_line(error)})") from None
    except library_errors(uri.partition("://")[0]) as error:
        kind = UserError if _is_final(error) else Outage
        raise kind(f"{where}: cannot be reached: {_line(error)}") from None


def _line(error: BaseException) -> str:
    from controlllm.data.location import shown

    lines = shown(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def retried(uri: str, read: Callable[[], bytes]) -> bytes:
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

    errors = library_errors(uri.partition("://")[0])
    with told(uri):
        return Retrying(
            stop=stop_after_attempt(TRIES) | stop_after_delay(TOTAL_SECONDS),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=20),
            retry=retry_if_exception(lambda error: isinstance(error, errors) and not _is_final(error)),
            reraise=True,
        )(read)


def _is_final(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, _FINAL) or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _fetch(uri: str, start: int, end: int) -> bytes:
    if end <= start:
        return b""
    system, path = remote_system(uri)
    body = system.cat_file(path, start=start, end=end)
    if len(body) != end - start:
        raise ShortRead(f"asked for bytes {start} to {end} ({end - start}) and got {len(body)}")
    return body


class _RemoteFile(Seekable):
    def __init__(self, uri: str):
        from controlllm.data.location import stamp

        super().__init__(stamp(uri).size)
        self._uri = uri

    def readall(self) -> bytes:
        pieces = range(self._at, self._size, PIECE_BYTES)
        body = b"".join(read_range(self._uri, at, min(at + PIECE_BYTES, self._size)) for at in pieces)
        self._at += len(body)
        return body

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        body = read_range(self._uri, self._at, end)
        buffer[: len(body)] = body
        self._at += len(body)
        return len(body)
