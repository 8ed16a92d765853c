"""Where files are: paths, installed packages, HDFS, S3, Google storage; names with globs, and what tells a change."""

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from controlllm.data.sources import GYM, package_folder
from controlllm.errors import UserError

if TYPE_CHECKING:  # types.py imports pyarrow, for which `config check` does not wait
    from controlllm.data.types import Stamp

REMOTE = ("hdfs", "webhdfs", "s3", "gs")
KNOWN = f"hf://, {', '.join(kind + '://' for kind in REMOTE)}, file://, pkg://, {GYM}, a path"
MANIFEST_NAME = "controlllm-manifest.json"
_MAGIC = re.compile(r"[*?\[]")
_PASSWORD = re.compile(r"(hdfs|webhdfs|s3|gs)://[^/@\s]*:[^/\s]*@")
_SECRETS = {
    "s3": "put the keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "webhdfs": "put it into WEBHDFS_PASSWORD",
}


def kind_of(uri: str) -> str:
    """`hdfs`, `s3`, ...; `file` for a plain path."""
    kind, separator, _ = uri.partition("://")
    if not separator:
        return "file"
    if kind not in (*REMOTE, "hf", "file", "pkg", GYM.removesuffix("://")):
        raise UserError(f"{shown(uri)}: this kind of source is not known; known: {KNOWN}")
    if _PASSWORD.match(uri):
        address = shown(uri).removeprefix(f"{kind}://").partition("/")[0]
        way_out = _SECRETS.get(kind, "leave it out")
        raise UserError(f"{kind}://{address}: a password in an address ends in logs; {way_out}")
    return kind


def is_remote(uri: str) -> bool:
    return kind_of(uri) in REMOTE


def shown(text: str) -> str:
    """Without what must not stand in a log: user and password, and the query of a URL."""
    text = re.sub(r"\b(?!hf:|pkg:)(\w+)://[^/\s]*@", r"\1://", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)


def local_path(uri: str) -> Path | None:
    """The file on this machine, None for a remote one."""
    if is_remote(uri):
        return None
    if uri.startswith("pkg://"):
        package, _, inside = uri.removeprefix("pkg://").partition("/")
        return package_folder(package, uri) / inside
    return Path(uri.removeprefix("file://")).expanduser()


def list_files(source: str) -> list[str]:
    """The files of a source by name, sorted: `pkg://` and remote ones as such, local ones as absolute paths.

    `*`, `?`, `[...]` match within a name (no leading dot unless it is written), `**` any depth of folders.
    """
    root, path = _split(source)
    if not _MAGIC.search(path) or _is_there(root, path):
        files = [path]
        _require_file(root, path, source)
    else:
        base, pattern = _fixed_part(path)
        files = sorted(_glob(root, base, pattern.split("/")))
        if not files:
            raise UserError(f"{shown(source)}: no such file (looked in {shown(root + base)})")
    return [root + file for file in files]


def relative_names(source: str, files: list[str]) -> list[str]:
    """Names of the files below the folder that the source writes without a glob."""
    root, path = _split(source)
    base = _fixed_part(path)[0] if files != [root + path] else path.rpartition("/")[0]
    return [file.removeprefix(root).removeprefix(base).lstrip("/") for file in files]


def stamp(uri: str) -> "Stamp":
    """Size, and ETag or modification time, of one file."""
    from controlllm.data.remote import info_of
    from controlllm.data.types import Stamp

    path = local_path(uri)
    if path is not None:
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{shown(uri)}: {error.strerror}") from None
        return Stamp(found.st_size, str(found.st_mtime_ns))
    info = info_of(uri)
    if info is None:
        raise UserError(f"{shown(uri)}: no such file")
    keys = ("ETag", "etag", "md5Hash", "modification_time", "modificationTime", "mtime")
    version = next((str(info[key]).strip('"') for key in keys if info.get(key)), "")
    return Stamp(int(info["size"]), version)


def open_file(uri: str) -> BinaryIO:
    """A seekable reader; of a remote file, one that reads exactly what is asked or raises UserError."""
    from controlllm.data.remote import open_remote

    path = local_path(uri)
    if path is None:
        return open_remote(uri)
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{shown(uri)}: {error.strerror}") from None


def read_bytes(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file; of one on this machine, up to its end where that comes first."""
    from controlllm.data.remote import read_range

    if is_remote(uri):
        return read_range(uri, start, end)
    with open_file(uri) as file:
        file.seek(start)
        return file.read(end - start)


def file_system(uri: str) -> tuple[Any, str]:
    """fsspec's file system of a URI, and the path in it (`bucket/key`, or `/path`)."""
    from controlllm.data.file_systems import remote_system

    path = local_path(uri)
    if path is None:
        return remote_system(uri)
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem(), str(path.absolute())


def _split(source: str) -> tuple[str, str]:
    """What stays as it is (`hdfs://host:port`, `s3://bucket`, `pkg://package`, nothing), and the path with globs."""
    kind = kind_of(source)
    if kind == "file":
        return "", str(Path(source.removeprefix("file://")).expanduser().absolute())
    if kind not in (*REMOTE, "pkg"):
        raise UserError(f"{shown(source)}: names no file; known: file://, pkg://, a path, hdfs://, s3://, gs://")
    authority, slash, path = source.removeprefix(f"{kind}://").partition("/")
    return f"{kind}://{authority}", slash + path


def _fixed_part(path: str) -> tuple[str, str]:
    """`/data/2024/*.parquet` -> `/data/2024`, `*.parquet`."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])


def _glob(root: str, folder: str, parts: list[str]) -> Iterator[str]:
    """Files below `folder` that the pattern's parts match."""
    first, rest = parts[0], parts[1:]
    if first == "**":
        yield from _glob(root, folder, rest or ["*"])
    if rest and first != "**" and not _MAGIC.search(first):
        yield from _glob(root, f"{folder}/{first}", rest)
        return
    for name, is_folder in _names(root, folder):
        if first == "**":
            if is_folder and not name.startswith("."):
                yield from _glob(root, f"{folder}/{name}", parts)
        elif _matches(name, first):
            if rest and is_folder:
                yield from _glob(root, f"{folder}/{name}", rest)
            elif not rest and not is_folder:
                yield f"{folder}/{name}"


def _matches(name: str, pattern: str) -> bool:
    hidden = name.startswith(".") and not pattern.startswith(".")
    return fnmatch.fnmatchcase(name, pattern) and not hidden and name != MANIFEST_NAME


def _names(root: str, folder: str) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder; nothing where there is no such folder."""
    from controlllm.data.remote import told

    path = local_path(root + folder) if root else Path(folder or "/")
    if path is not None:
        if not path.is_dir():
            return []
        return sorted((entry.name, entry.is_dir()) for entry in os.scandir(path))
    with told(root + folder):
        system, inside = file_system(root + (folder or "/"))
        try:
            found = system.ls(inside, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in found)
    return sorted(name for name in names if name[0])


def _is_there(root: str, path: str) -> bool:
    """A name that looks like a glob may be a file's."""
    here = local_path(root + path) if root else Path(path)
    if here is not None:
        return here.exists()
    from controlllm.data.remote import info_of

    return info_of(root + path) is not None


def _require_file(root: str, path: str, source: str) -> None:
    from controlllm.data.remote import info_of

    here = local_path(root + path) if root else Path(path)
    if here is not None:
        there, is_folder = here.exists(), here.is_dir()
        looked = here.parent
    else:
        looked = shown(root + path.rpartition("/")[0])
        info = info_of(root + path)
        there, is_folder = info is not None, info is not None and info["type"] == "directory"
    if not there:
        raise UserError(f"{shown(source)}: no such file (looked in {looked})")
    if is_folder:
        folder = shown(root + path).rstrip("/")
        raise UserError(f"{folder}: is a directory; name a file, or files as in {folder}/*.jsonl")
