"""Files that are elsewhere: a real HDFS, a real S3 server, and a server with faults."""

import json
import sys
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import Faulty, faulty_server
from hdfs_server import Hdfs, running_hdfs
from s3_server import make_bucket, running_s3

from controlllm.data import file_systems, remote
from controlllm.data.location import file_system, list_files, open_file, shown, stamp
from controlllm.data.manifest import list_source, read_unit, read_units, unit_hash
from controlllm.errors import UserError
from controlllm.transfer import transfer

ROWS = [{"n": i, "text": f"row {i} é" * 20} for i in range(3000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
NAMES = ["plain.jsonl", "with space.jsonl", 'it\'s "q" #1.jsonl', "ünïcode 二.jsonl"]


@pytest.fixture(scope="session")
def hdfs() -> Iterator[Hdfs]:
    with running_hdfs() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with running_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> str:
    """A bucket."""
    bucket = make_bucket(s3_server, monkeypatch, tmp_path)
    return f"s3://{bucket}"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with faulty_server(LINES) as server:
        yield server


@pytest.fixture
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that is waited for is not waited for long; else a busy machine has its time."""
    monkeypatch.setattr(file_systems, "TIMEOUT_SECONDS", 1.0 if request.param == "hang" else 60.0)
    return request.param


def _put(uri: str, content: bytes) -> None:
    system, path = file_system(uri)
    if not uri.startswith("s3:"):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
    with system.open(path, "wb") as file:
        file.write(content)


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=700)
    return sink.getvalue().to_pybytes()


def _all(source: str) -> list:
    manifest = list_source(source, unit_rows=400)
    stamps = {file.uri: file.stamp for file in manifest.files}
    hashes = [unit_hash(unit) for unit in manifest.units]
    assert len(set(hashes)) == len(hashes) or len(manifest.files) > 1
    batches = [batch for _, batches in read_units(manifest.units, stamps=stamps) for batch in batches]
    return [row for batch in batches for row in batch.rows()]


def _same_as_here(root: str, tmp_path) -> None:
    """Names of all kinds, globs, lines and row groups: what is read there equals what is read here."""
    for name in NAMES:
        assert open_file(f"{root}/names/{name}").read() == LINES
        assert _all(f"{root}/names/{name}") == ROWS
    assert list_files(f"{root}/names/*.jsonl") == sorted(f"{root}/names/{name}" for name in NAMES)
    assert list_files(f"{root}/**/w*.jsonl") == [f"{root}/names/with space.jsonl"]
    assert list_files(f"{root}/n?mes/[!a-v]*.jsonl") == [f"{root}/names/{n}" for n in (NAMES[1], NAMES[3])]
    assert _all(f"{root}/tables/*.parquet") == ROWS
    (tmp_path / "t.parquet").write_bytes(_parquet())
    there, here = (list_source(s, unit_rows=400).units for s in (f"{root}/tables/t.parquet", f"{tmp_path}/t.parquet"))
    assert [unit_hash(unit) for unit in there] == [unit_hash(unit) for unit in here]
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        list_files(f"{root}/names/none.jsonl")
    with pytest.raises(UserError, match=r"none/\*: no such file"):
        list_files(f"{root}/none/*")


def _fill(root: str) -> None:
    for name in NAMES:
        _put(f"{root}/names/{name}", LINES)
    _put(f"{root}/tables/t.parquet", _parquet())


@pytest.mark.parametrize("way", ["rpc", "web"])
def test_hdfs(hdfs, tmp_path, way):
    _fill(f"{hdfs.rpc}/{way}")
    _same_as_here(f"{getattr(hdfs, way)}/{way}", tmp_path)
    with pytest.raises(UserError, match=r"is a directory; name a file, or files as in .*names/\*.jsonl"):
        list_files(f"{getattr(hdfs, way)}/{way}/names")


def test_s3(s3, tmp_path):
    _fill(f"{s3}/folder")
    _same_as_here(f"{s3}/folder", tmp_path)


@pytest.mark.parametrize("kind", ["hdfs", "s3"])
def test_a_changed_file_is_noticed(kind, request):
    root = f"{request.getfixturevalue('hdfs').rpc}/changed" if kind == "hdfs" else request.getfixturevalue("s3")
    _put(f"{root}/a.jsonl", LINES)
    manifest = list_source(f"{root}/a.jsonl", unit_rows=1000)
    _put(f"{root}/a.jsonl", LINES.replace(b"row 1 ", b"row 8 "))
    assert stamp(f"{root}/a.jsonl").size == manifest.files[0].stamp.size
    with pytest.raises(UserError, match=r"a.jsonl: changed since it was listed .*; run again"):
        list(read_unit(manifest.units[0], stamp=manifest.files[0].stamp))


@pytest.mark.parametrize("kind", ["hdfs", "s3"])
def test_transfer_there(kind, request, tmp_path):
    root = (request.getfixturevalue("hdfs").rpc if kind == "hdfs" else request.getfixturevalue("s3")) + "/moved"
    (tmp_path / "sub").mkdir()
    for number in range(3):
        (tmp_path / "sub" / f"part {number}.jsonl").write_bytes(LINES[:-number] if number else LINES)
    transfer(f"{tmp_path}/**/*.jsonl", root)
    assert list_files(f"{root}/**/*") == [f"{root}/sub/part {number}.jsonl" for number in range(3)]
    stamps = [stamp(uri) for uri in list_files(f"{root}/**/*.jsonl")]
    (tmp_path / "sub" / "part 1.jsonl").write_bytes(LINES)
    transfer(f"{tmp_path}/**/*.jsonl", root)
    after = [stamp(uri) for uri in list_files(f"{root}/**/*.jsonl")]
    assert [a == b for a, b in zip(after, stamps, strict=True)] == [True, False, True]
    assert open_file(f"{root}/sub/part 1.jsonl").read() == LINES


@pytest.mark.parametrize("uri", ["hdfs://127.0.0.1:1/a/*.jsonl", "webhdfs://127.0.0.1:1/a.jsonl", "s3://none/a.jsonl"])
def test_a_server_that_is_down_is_one_line(uri, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=rf"{uri.partition('*')[0].rstrip('/')}.*: cannot be reached: ") as error:
        list_files(uri)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["reset", "500", "short", "long", "cut", "hang"], indirect=True)
def test_faults_that_pass_change_nothing(faulty, fault):
    faulty.faults = [fault] * 3
    assert open_file(faulty.uri).read() == LINES
    assert faulty.reads == 4
    faulty.faults = [fault]
    assert _all(faulty.uri) == ROWS


@pytest.mark.parametrize("fault", ["reset", "500", "short", "long", "cut", "hang", "403"], indirect=True)
def test_faults_that_stay_are_one_line(faulty, fault):
    faulty.always = fault
    with pytest.raises(UserError) as error:
        open_file(faulty.uri).read()
    text = str(error.value)
    assert text.startswith(f'webhdfs://127.0.0.1:{faulty.port}/data/it\'s "one" file.jsonl: ')
    assert "\n" not in text
    assert "someone" not in text
    assert faulty.reads == (1 if fault == "403" else remote.TRIES)


def test_no_secret_is_shown():
    assert shown("s3://key:secret@host/a?X-Signature=abc failed") == "s3://host/a failed"
    assert shown("webhdfs://me:pw@host:1/a b?.jsonl") == "webhdfs://host:1/a b?.jsonl"
    with pytest.raises(UserError, match=r"^webhdfs://host:1: a password .* put it into WEBHDFS_PASSWORD$"):
        file_system("webhdfs://me:pw@host:1/a")


@pytest.mark.parametrize(("kind", "module"), [("hdfs", "hdfs_native.fsspec"), ("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_one_line(kind, module, monkeypatch):
    file_systems._hdfs_class.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{kind}:// needs .*; pip install 'controlllm\[{kind}\]'"):
        list_files(f"{kind}://host/a.jsonl")
