"""A stage output that another machine made, taken into this machine's store."""

import shutil
from pathlib import Path

from filelock import FileLock

from controlllm.fingerprint import sync
from controlllm.store import find_lineage, read_lineage, store_root


def adopt(folder: Path) -> Path:
    """Its stage finds it then, and so does the returned path; what the store has, maybe by another machine, is left as
    it is.

    Raises UserError when the folder is no stage's output. Files are verified when they are asked for.
    """
    lineage = read_lineage(folder)
    home = store_root() / lineage["stage"].replace(" ", "-")
    home.mkdir(parents=True, exist_ok=True)
    final, partial = home / lineage["key"], home / f".{lineage['key']}.adopted"
    with FileLock(home / f".{lineage['key']}.lock"):
        if find_lineage(final) is not None:
            return final
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        for file in (*partial.rglob("*"), partial):
            sync(file)
        partial.rename(final)
        sync(home)
    return final
