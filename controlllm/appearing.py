"""A folder that has its name only once all is in it and on the disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controlllm.errors import UserError
from controlllm.fingerprint import sync


@contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` that is renamed to it; gone where something goes wrong."""
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        partial.replace(final)
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_present(final: Path) -> None:
    """UserError where a new folder cannot have this name."""
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final}: exists and is not empty; give another folder or remove it")
