"""A few files of the package bigbench, whose archive of 358 MB is fetched once and not kept."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.store import store_root

VERSION = "1.0.0"
HASH = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS = (
    "social_iqa", "strategyqa", "logical_deduction/three_objects", "logical_deduction/five_objects",
    "logical_deduction/seven_objects", "goal_step_wikihow/goal_inference", "goal_step_wikihow/step_inference",
)  # fmt: skip
FILES = tuple(f"benchmark_tasks/{task}/task.json" for task in TASKS)


def fetched() -> Path:
    """The folder with the files, once `fetch` has run. UserError where it has not."""
    if not (folder := _folder()).is_dir():
        raise UserError(
            f"bigbench {VERSION} is not in the cache ({folder}); controlllm ingest fetches it, with a network"
        )
    return folder


def fetch() -> Path:
    """The folder with FILES, in the store; fetched with pip where it is not there. UserError where it cannot be had."""
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".bigbench.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bigbench.") as scratch:
                console.print(f"  fetching bigbench {VERSION} (358 MB, once; {len(FILES)} files of it are kept)")
                _unpack(_download(Path(scratch)), Path(scratch) / "files")
                (Path(scratch) / "files").rename(folder)
    return folder


def _folder() -> Path:
    return store_root() / "packages" / f"bigbench-{VERSION}"


def _download(scratch: Path) -> Path:
    """The package's archive, refused by pip where its hash is another."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"bigbench=={VERSION} --hash=sha256:{HASH}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--disable-pip-version-check", "--quiet"]
    made = subprocess.run(  # noqa: S603 - the client, and nothing of a user's in it
        [*_pip(), "download", *options, "--dest", str(scratch), "-r", str(wanted)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    archive = scratch / f"bigbench-{VERSION}.tar.gz"
    if made.returncode or not archive.is_file():
        said = [line for line in made.stderr.splitlines() if "ERROR" in line] or made.stderr.splitlines() or ["no file"]
        raise UserError(
            f"bigbench {VERSION} cannot be fetched: {said[0].removeprefix('ERROR: ')}; let pip reach a package index "
            "once, or leave the probes bigbench-* out"
        )
    return archive


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise UserError(f"bigbench {VERSION} is fetched with pip or uv, and neither is on the PATH; install one of them")


def _unpack(archive: Path, folder: Path) -> None:
    """FILES of the archive, and nothing else of it."""
    with tarfile.open(archive) as packed:
        for file in FILES:
            content = packed.extractfile(f"bigbench-{VERSION}/bigbench/{file}")
            assert content is not None
            (folder / file).parent.mkdir(parents=True)
            with (folder / file).open("wb") as out:
                shutil.copyfileobj(content, out)
