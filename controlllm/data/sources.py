"""Rows of a source by name, for who needs few of them; training data are read in units (manifest.py)."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from controlllm.errors import UserError

if TYPE_CHECKING:  # types.py imports pyarrow, for which `config check` does not wait
    from controlllm.data.types import Row

GYM = "reasoning-gym://"
BIGBENCH = "bigbench"  # too large to install: bigbench.py fetches its few files that are read


def read_rows(source: str, *, rows: int | None = None, seed: int = 0) -> Iterator["Row"]:
    """The rows of a source, in order; the first bad one is a UserError.

    `seed` moves a procedural source to other items and does nothing to files.
    """
    from controlllm.data.manifest import list_source, read_unit

    for unit in list_source(source, unit_rows=1 << 16, rows=rows, seed=seed).units:
        for batch in read_unit(unit):
            if batch.bad:
                raise UserError(str(batch.bad[0]))
            yield from batch.rows()


def source_files(source: str) -> list[Path]:
    """The local files behind `pkg://package/path`, `file://path` or a plain path (relative as it is); globs allowed."""
    from controlllm.data.location import list_files, local_path

    files = [local_path(uri) for uri in list_files(source)]
    local = [file for file in files if file is not None]
    if len(local) < len(files):
        raise UserError(f"{source}: lies elsewhere; only files on this machine can be used here")
    if empty := [file for file in local if file.stat().st_size == 0]:
        raise UserError(f"{empty[0]}: the file is empty")
    here = Path.cwd()
    as_given = "://" in source or Path(source).expanduser().is_absolute()
    return local if as_given else [file.relative_to(here) for file in local]


def package_folder(package: str, source: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places and package == BIGBENCH:
        from controlllm.data.bigbench import fetched

        return fetched()
    if not places:
        raise UserError(f"{source}: the package '{package}' is not installed; pip install 'controlllm[demo]'")
    return Path(places[0])
