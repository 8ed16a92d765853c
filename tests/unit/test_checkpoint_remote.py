"""Checkpoints in a bucket of a real S3 server."""

import resource

import pytest
from s3_server import make_bucket, running_s3
from saved_steps import big, restored, small, write

from controlllm.data.location import file_system
from controlllm.errors import UserError
from controlllm.train.checkpoint_files import MANIFEST


@pytest.fixture(scope="module")
def server():
    with running_s3() as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    return make_bucket(server, monkeypatch, tmp_path)


def keys(uri):
    system, path = file_system(uri)
    return sorted(key.removeprefix(f"{path}/") for key in system.find(path))


def test_a_bucket_is_like_a_folder(bucket, tmp_path, capsys):
    uri, scratch = f"s3://{bucket}/runs/a", tmp_path / "scratch"
    assert restored(uri, scratch=scratch) is None
    write(uri, 1, 2, 3, best=(1,), keep=1, scratch=scratch)
    assert {key.partition("/")[0] for key in keys(uri)} == {"step-00000001", "step-00000003"}
    assert restored(uri, scratch=scratch) == (3, 3)
    system, path = file_system(f"{uri}/step-00000003")
    system.pipe_file(f"{path}/extra", b"x")
    assert restored(uri, scratch=scratch) == (1, 1)
    assert "step-00000003 is passed over: extra does not belong to it" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        restored(uri, scratch=scratch, identity={})
    assert [p for p in scratch.rglob("*") if p.is_file()] == []


def test_a_step_without_manifest_does_not_exist_in_a_bucket(bucket, tmp_path, capsys):
    uri, scratch = f"s3://{bucket}/run", tmp_path / "scratch"
    write(uri, 1, 2, scratch=scratch)
    system, path = file_system(f"{uri}/step-00000002")
    system.rm_file(f"{path}/{MANIFEST}")
    assert restored(uri, scratch=scratch) == (1, 1)
    assert capsys.readouterr().err == ""
    write(uri, 3, scratch=scratch)
    assert {key.partition("/")[0] for key in keys(uri)} == {"step-00000001", "step-00000003"}


def test_what_arrives_altered_is_passed_over(bucket, tmp_path, capsys):
    uri, scratch = f"s3://{bucket}/run", tmp_path / "scratch"
    write(uri, 1, 2, scratch=scratch)
    system, path = file_system(f"{uri}/step-00000002")
    name = next(key for key in keys(f"{uri}/step-00000002") if key != MANIFEST)
    data = system.cat_file(f"{path}/{name}")
    system.pipe_file(f"{path}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    assert restored(uri, scratch=scratch) == (1, 1)
    assert f"{name} was altered: its hash does not fit" in capsys.readouterr().err


def test_a_save_that_cannot_be_sent_leaves_nothing(bucket, tmp_path, monkeypatch):
    uri, scratch = f"s3://{bucket}/run", tmp_path / "scratch"
    store = write(uri, 1, scratch=scratch)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(UserError, match=f"{uri}/step-00000002: no room for a checkpoint"):
            store.save(*big(), {"step": 2}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {key.partition("/")[0] for key in keys(uri)} == {"step-00000001"}
    assert [p for p in scratch.rglob("*") if p.is_file()] == []
    store.save(*small(3), {"step": 3}, wait=True)
    assert restored(uri, scratch=scratch) == (3, 3)
