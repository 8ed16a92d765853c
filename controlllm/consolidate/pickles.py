"""Files of torch and pickles, read without running anything: objects are stand-ins, tensors are ranges of the file.

A pickle names the functions that make its objects. Here none of them is looked up: what makes tensors and containers
has a counterpart of ours, objects of libraries that checkpoints hold become `Record`s, and any other name is refused.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from controlllm.consolidate.tensors import NAMES
from controlllm.control.tensor_files import StoredTensor
from controlllm.errors import UserError

LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "numpy", "collections", "argparse", "pathlib", "enum")
"""Whose objects a checkpoint may hold."""
_BUILTINS = {name: getattr(__import__("builtins"), name) for name in (
    "set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray", "complex",
)}  # fmt: skip
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LARGEST_PICKLE = 2**30


class Record:
    """In the place of an object: what it was made of."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_kwargs: Any) -> "Record":
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...


@dataclass(frozen=True)
class _Storage:
    file: Path
    dtype: torch.dtype
    start: int
    numel: int


class _Dict(dict[Any, Any]):
    """Whose attributes do not count, such as the versions that torch hangs on a state dict."""

    def __setstate__(self, state: Any) -> None: ...


def read_pickle(file: Path) -> Any:
    """UserError where it is no pickle, or asks for what no checkpoint holds."""
    if file.stat().st_size > LARGEST_PICKLE:
        raise UserError(f"{file}: has {file.stat().st_size} bytes, which is too large for a checkpoint's description")
    return _load(file, io.BytesIO(file.read_bytes()), None)


def read_torch(file: Path, *, offset: int = 0, length: int | None = None) -> Any:
    """What `torch.save` wrote into a file or a part of it; tensors as StoredTensors. UserError as `read_pickle`."""
    length = file.stat().st_size - offset if length is None else length
    with file.open("rb") as stream:
        window = _Window(stream, offset, length)
        try:
            archive = zipfile.ZipFile(window)
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            data = archive.read(entries["data.pkl"])
        except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, OSError):
            raise UserError(f"{file}: is no whole file of torch.save; copy it again") from None
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise UserError(f"{file}: was written on a big-endian machine, which is not read")

        def storage(identity: Any) -> _Storage:
            _, dtype, key, _, numel = identity
            info = entries[f"data/{key}"]
            start = _data_start(window, info)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * dtype.itemsize:
                raise UserError(f"{file}: its tensors are compressed or cut off; copy it again")
            return _Storage(file, dtype, offset + start, numel)

        return _load(file, io.BytesIO(data), storage)


def _data_start(window: "_Window", info: zipfile.ZipInfo) -> int:
    """Behind the entry's own header, whose length the directory does not know."""
    window.seek(info.header_offset)
    header = window.read(30)
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _load(file: Path, stream: io.BytesIO, storage: Callable[[Any], _Storage] | None) -> Any:
    try:
        return _Unpickler(stream, file, storage).load()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error}); copy it again") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, file: Path, storage: Callable[[Any], _Storage] | None):
        super().__init__(stream)
        self._file, self._storage = file, storage

    def persistent_load(self, identity: Any) -> Any:
        if self._storage is None or not isinstance(identity, tuple) or len(identity) != 5:
            raise pickle.UnpicklingError("a persistent id that is no storage")
        return self._storage(identity)

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as older protocols call it
        if module == "builtins" and name in _BUILTINS:
            return _BUILTINS[name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (made := _MAKERS.get(f"{module}.{name}")) is not None:
            return made
        if module.partition(".")[0] not in LIBRARIES or "." in name:
            raise UserError(
                f"{self._file}: asks for {module}.{name}, which no checkpoint needs: it may run code, and is not read"
            )
        return type(name, (Record,), {"__module__": module})


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_rest: Any) -> Any:
    shape, expected = tuple(size), 1
    for length, step in zip(reversed(shape), reversed(tuple(stride)), strict=True):
        if length > 1 and step != expected:
            return Record("a tensor whose numbers do not lie in their order")
        expected *= length
    if offset < 0 or offset + expected > storage.numel or storage.dtype not in NAMES:
        raise UserError(f"{storage.file}: a tensor reaches beyond its data; copy it again")
    return StoredTensor(storage.file, NAMES[storage.dtype], shape, storage.start + offset * storage.dtype.itemsize)


def _of_type(make: Any, kind: Any, args: Any, *_state: Any) -> Any:
    """A tensor with attributes, which do not count."""
    return make(*args) if make is _tensor or make is _parameter else Record(kind)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


_MAKERS: dict[str, Any] = {
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    "_codecs.encode": lambda text, _encoding: text.encode("latin1"),  # bytes, in older protocols
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": lambda *_factory: {},
}


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, stream: Any, start: int, length: int):
        super().__init__()
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
