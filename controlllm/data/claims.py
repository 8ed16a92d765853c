"""Who builds what: a file made exclusively, kept young by its owner; an old one belongs to a builder that is gone."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

YOUNG_SECONDS = 60.0
REFRESH_SECONDS = 10.0
UNSIGNED_SECONDS = 2.0
"""Age of a claim without a name in it, whose owner was killed while it made it."""


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process may go on; works wherever a file can be made exclusively, NFS included.

    A claim saves work, no more: without it two builders would write the same bytes.
    """
    if not _take(file):
        yield False
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(file, done), daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        done.set()
        keeper.join()
        with suppress(FileNotFoundError):
            file.unlink()


def is_abandoned(file: Path) -> bool:
    """Too old, or of a process of this machine that has ended."""
    age = time.time() - file.stat().st_mtime
    host, _, process = file.read_text().partition(" ")
    if age > (YOUNG_SECONDS if process else UNSIGNED_SECONDS):
        return True
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _take(file: Path) -> bool:
    with suppress(FileNotFoundError):
        if is_abandoned(file):
            file.unlink()
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(f"{socket.gethostname()} {os.getpid()}")
    except OSError:  # a full disk: a claim of nobody would be waited for
        file.unlink()
        raise
    return True


def _keep(file: Path, done: threading.Event) -> None:
    while not done.wait(REFRESH_SECONDS):
        with suppress(FileNotFoundError):
            os.utime(file)
