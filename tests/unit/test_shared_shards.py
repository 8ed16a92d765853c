"""One store, many builders: on one machine, killed at any instant, on a full disk, read-only, on S3."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from s3_server import make_bucket, running_s3

from controlllm.cli import main
from controlllm.config import DatasetConfig, PackConfig
from controlllm.data import remote
from controlllm.data.build import make_job, prepare_dataset
from controlllm.data.job import Job
from controlllm.data.location import file_system
from controlllm.data.manifest import list_source
from controlllm.data.prepared import write_index
from controlllm.data.shard_store import ShardStore
from controlllm.data.shelf import Shelf, StoredShelf
from controlllm.errors import UserError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["controlllm.data.build", "transformers.tokenization_utils_fast"])


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "chat.jsonl"
    write(file)
    return file


def write(file):
    random_words = random.Random(0)
    with file.open("w") as stream:
        for number in range(240):
            answer = "so " * random_words.randint(1, 40)
            chat = [{"role": "user", "content": f"{number:04}?"}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": chat}) + "\n")


@pytest.fixture
def job(tiny_base, source):
    return job_of(tiny_base, source)


@pytest.fixture
def prepare(job):
    return lambda shards: make(job[0], job[1], shards)


@pytest.fixture
def reference(prepare, tmp_path):
    """What one builder makes alone."""
    return prepare(tmp_path / "alone").units


def job_of(base, source) -> tuple[Any, Any]:
    pack = PackConfig(context_length=512, unit_rows=24)
    manifest = list_source(str(source), unit_rows=pack.unit_rows)
    dataset = DatasetConfig(name="a", source=str(source), format="messages")
    return make_job(dataset, manifest, tokenizer_folder=base, pack=pack), manifest


def make(job: Any, manifest: Any, shards: Any) -> Any:
    return prepare_dataset(job, manifest, shards=shards, workers=1)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def hidden(folder):
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


# Processes of one machine


def _together(barrier, log, told, *where):
    real = Job.build

    def logged(job, number, *args):
        with log.open("a") as stream:
            stream.write(f"{number}\n")
        return real(job, number, *args)

    Job.build = logged  # type: ignore[assignment] - in a process of its own
    barrier.wait()
    told.put(make(*where).units)


def test_eight_processes_make_every_shard_once(job, reference, tmp_path):
    barrier, told = PROCESSES.Barrier(8), PROCESSES.Queue()
    args = (barrier, tmp_path / "log", told, *job, tmp_path / "shards")
    builders = [PROCESSES.Process(target=_together, args=args) for _ in range(8)]
    for builder in builders:
        builder.start()
    made = [told.get(timeout=600) for _ in builders]
    for builder in builders:
        builder.join()
    assert all(units == reference for units in made)
    built = Counter((tmp_path / "log").read_text().split())
    assert built == Counter(str(number) for number in range(len(reference)))
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "alone")
    assert hidden(tmp_path / "shards") == []


WHERE = ("data/shard_store.py", "data/shard.py", "data/claims.py", "tempfile.py")


def _counted(at, told, *where):
    """Prepares, and is killed at an instant of the code that writes shards; tells how many instants there were."""
    count = 0

    def watch(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename.endswith(WHERE):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    make(*where)
    sys.setprofile(None)
    told.send(count)


def _run(target: Any, *args: Any) -> tuple[Any, Any]:
    """The process, after it ended, and what it told."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=target, args=(args[0], there, *args[1:]))
    process.start()
    there.close()
    process.join()
    return process, here.recv() if here.poll() and process.exitcode == 0 else None


def test_a_builder_killed_at_any_instant_leaves_nothing_half_made(job, reference, prepare, tmp_path):
    _, instants = _run(_counted, None, *job, tmp_path / "counted")
    left = Counter()
    for trial, at in enumerate(sorted(random.Random(1).sample(range(1, instants), 20))):
        folder = tmp_path / str(trial)
        killed, _ = _run(_counted, at, *job, folder)
        assert killed.exitcode == -signal.SIGKILL
        store = ShardStore(folder)
        seen = [store.facts(key) for key in store.keys()]  # noqa: SIM118 - a method of ours
        assert all(facts in reference for facts in seen)
        left.update("claim" if name.endswith(".claim") else "folder" for name in hidden(folder))
        finished = prepare(folder)
        assert (finished.units, finished.computed) == (reference, len(reference) - len(seen))
        assert bytes_of(folder) == bytes_of(tmp_path / "alone")
        assert not [name for name in hidden(folder) if name.endswith(".claim")]
    assert left["folder"] > 5  # in the middle of a unit


# Disks


def _limited(limit, told, *where):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        make(*where)
    except UserError as error:
        told.send(str(error))


def _nothing_half_written(folder, reference):
    store = ShardStore(folder)
    assert all(store.facts(key) in reference for key in store.keys())  # noqa: SIM118 - a method of ours
    assert hidden(folder) == []


def test_no_room_is_one_line_and_the_same_command_goes_on(job, reference, prepare, tmp_path):
    folder = tmp_path / "shards"
    sizes = sorted(unit["files"]["train"]["size"] for unit in reference)
    _, said = _run(_limited, sizes[-1] - 1, *job, folder)
    assert said.startswith(f"{folder}: no room for a shard (File too large); free some, or set CONTROLLLM_SHARDS to ")
    assert "\n" not in said
    _nothing_half_written(folder, reference)
    assert prepare(folder).units == reference


def test_a_full_disk(reference, prepare, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shards = folder / "shards"
        room = sum(unit["files"]["train"]["size"] for unit in reference) // 2
        (folder / "other").write_bytes(bytes((1 << 20) - room // 4096 * 4096))
        with pytest.raises(UserError, match=r"shards: no room for a shard \(No space left on device\)"):
            prepare(shards)
        _nothing_half_written(shards, reference)
        (folder / "other").unlink()
        assert prepare(shards).units == reference
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def ordinary_user():
    """Root may write everywhere: be nobody for a while."""
    root = os.getuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_a_folder_that_is_read_only_can_be_read(tiny_base, monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        home = Path(name)
        home.chmod(0o777)
        write(home / "chat.jsonl")
        job, manifest = job_of(tiny_base, home / "chat.jsonl")
        made = prepare_dataset(job, manifest, shards=home / "shards", workers=1)
        (home / "shards").chmod(0o555)
        (home / "prepared").mkdir(mode=0o777)
        (home / "prepared").chmod(0o777)
        monkeypatch.setenv("CONTROLLLM_SHARDS", str(home / "shards"))
        with ordinary_user():
            again = prepare_dataset(job, manifest, shards=home / "shards", workers=1)
            write_index(home / "prepared", "a", again.units, {}, link=True)
        assert (again.units, again.computed) == (made.units, 0)
        assert contents(Shelf.open(home / "prepared")) == contents(StoredShelf("a", made.units, str(home / "shards")))
        missing = made.units[1]["key"]
        ShardStore(home / "shards").remove(missing)
        with (
            ordinary_user(),
            pytest.raises(UserError, match=r"shards: lacks shards and is not writable; set CONTROLLLM"),
        ):
            prepare_dataset(job, manifest, shards=home / "shards", workers=1)


# S3


def contents(shelf):
    rows = [shelf.read(unit, row) for unit in range(shelf.units) for row in range(shelf.rows_of(unit))]
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


@pytest.fixture(scope="module")
def server():
    with running_s3() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """Where shards are to lie."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    name = make_bucket(server, monkeypatch, tmp_path)
    monkeypatch.setenv("CONTROLLLM_SHARDS", f"s3://{name}/shards")
    return f"s3://{name}/shards"


@pytest.fixture
def pod(monkeypatch, tmp_path):
    """Become a machine with a cache of its own."""
    return lambda name: monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / name))


def objects(bucket):
    system, path = file_system(bucket)
    return {info["name"].rpartition("/")[2]: info["LastModified"] for info in system.ls(path, detail=True)}


def change(bucket, name, how):
    system, path = file_system(bucket)
    whole = bytearray(system.cat_file(f"{path}/{name}"))
    system.pipe_file(f"{path}/{name}", bytes(how(whole)))


def flip(whole):
    whole[len(whole) // 2] ^= 1
    return whole


def test_what_one_pod_made_another_fetches(prepare, bucket, pod, reference):
    pod("one")
    first = prepare(bucket)
    assert (first.units, first.computed) == (reference, len(reference))
    before = objects(bucket)
    assert len(before) == 2 * len(reference)
    pod("two")
    second = prepare(bucket)
    assert (second.units, second.computed) == (reference, 0)
    assert objects(bucket) == before
    assert list(ShardStore(bucket).folder.glob("*.arrow")) == []  # only when it is read
    shelf = StoredShelf("a", second.units, bucket)
    read = contents(shelf)
    pod("one")
    assert read == contents(StoredShelf("a", first.units, bucket))


def test_half_a_shard_there_is_made_again(prepare, bucket, pod, reference):
    pod("one")
    prepare(bucket)
    first, second, third = (unit["key"] for unit in reference[:3])
    system, path = file_system(bucket)
    system.rm_file(f"{path}/{first}.json")
    system.rm_file(f"{path}/{second}.arrow")
    change(bucket, f"{third}.arrow", lambda whole: whole[:-10])
    pod("two")
    store = ShardStore(bucket)
    assert [store.facts(key) for key in (first, second, third)] == [None, None, None]
    assert first not in store.keys()  # noqa: SIM118 - a method of ours
    made = prepare(bucket)
    assert (made.units, made.computed) == (reference, 3)
    pod("three")
    assert prepare(bucket).computed == 0


def test_bytes_that_are_damaged_there_or_on_the_way_are_noticed(prepare, bucket, pod, reference, monkeypatch):
    pod("one")
    prepare(bucket)
    key = reference[0]["key"]
    pod("two")
    real, answers = remote.read_range, []

    def on_the_way(uri, start, end):
        body = real(uri, start, end)
        answers.append(uri)
        return bytes(flip(bytearray(body))) if uri.endswith(".arrow") and len(answers) == 2 else body

    monkeypatch.setattr("controlllm.data.shared_folder.read_range", on_the_way)
    assert ShardStore(bucket).path(key).read_bytes()  # at the second try
    assert len(answers) == 3
    change(bucket, f"{key}.arrow", flip)
    pod("three")
    with pytest.raises(UserError, match=rf"{bucket}/{key}.arrow: what arrives is not what was written; remove it"):
        ShardStore(bucket).path(key)
    change(bucket, f"{key}.json", flip)
    pod("four")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{bucket}/{key}.json: damaged; remove it"):
            prepare(bucket)
    ShardStore(bucket).remove(key)
    assert prepare(bucket).computed == 1


def test_the_cache_commands_there(prepare, bucket, pod, reference, capsys):
    def cache(*args, code=0):
        capsys.readouterr()
        assert main(["cache", *args]) == code
        return capsys.readouterr().out

    pod("one")
    prepare(bucket)
    pod("two")
    assert f"{len(reference)} shards" in cache("ls")
    assert len(cache("ls", "--json").splitlines()) == len(reference)
    assert cache("verify") == f"ok: {len(reference)} entries are what was written\n"
    assert list(ShardStore(bucket).folder.glob("*.arrow")) == []
    first, second, third = (unit["key"] for unit in reference[:3])
    change(bucket, f"{first}.arrow", flip)
    change(bucket, f"{second}.json", lambda whole: whole[:9])
    system, path = file_system(bucket)
    system.rm_file(f"{path}/{third}.arrow")
    pod("three")
    lines = sorted(cache("verify", code=1).splitlines())
    assert lines == sorted([
        f"{bucket}/{first}.arrow: is not what was written; remove it and run the stage again",
        f"{bucket}/{second}.json: damaged; remove it and run again",
        f"{bucket}/{third}.arrow: is missing; run the stage again",
    ])  # fmt: skip
    assert cache("prune", "--older-than", "1h", "--yes") == "0 entries, 0 B: removed\n"
    cache("prune", "--older-than", "0d", "--yes")
    assert ShardStore(bucket).files() == {}


def test_a_server_that_is_down_is_not_an_empty_store(prepare, bucket, pod, monkeypatch):
    pod("one")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"s3://.*: cannot be reached: "):
        prepare(bucket)
