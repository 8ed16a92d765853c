"""Which errors another try may cure: Flyte tries those again, and no others."""

import errno
import subprocess

import pytest
import torch.distributed as dist

from controlllm.errors import Outage, RunError, UserError, is_passing
from controlllm.train.stopping import Stopped


def of(number: int) -> OSError:
    return OSError(number, "said by the system", "/corpora/part-0")


def caused_by(cause: BaseException) -> RuntimeError:
    error = RuntimeError("rank 3: it failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    Outage("s3://corpora: cannot be reached"),
    Stopped("SIGTERM", 12),
    of(errno.ECONNRESET),
    of(errno.EIO),
    of(errno.ESTALE),
    ConnectionResetError("peer went away"),
    TimeoutError("no answer"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error"),
    dist.DistNetworkError("The client socket has failed to connect"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:4711"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    caused_by(of(errno.EIO)),
], ids=lambda error: f"{type(error).__name__}: {error}"[:50])  # fmt: skip
def test_tried_again(error):
    assert is_passing(error)


@pytest.mark.parametrize("error", [
    UserError("train.lr: must be positive"),
    RunError("step 3: the loss is not finite"),
    of(errno.ENOSPC),
    of(errno.EACCES),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/corpora"),
    ValueError("shapes do not fit"),
    RuntimeError("CUDA out of memory"),
    RuntimeError("expected scalar type Float but found BFloat16"),
    caused_by(UserError("train.lr: must be positive")),
    KeyError("NCCL"),
    subprocess.CalledProcessError(1, ["git"]),
], ids=lambda error: f"{type(error).__name__}: {error}"[:50])  # fmt: skip
def test_not_tried_again(error):
    assert not is_passing(error)


def test_a_storage_that_does_not_answer_is_an_outage(monkeypatch):
    from controlllm.data import remote

    monkeypatch.setattr(remote, "TRIES", 1)
    with pytest.raises(Outage, match="cannot be reached"):
        remote.info_of("webhdfs://127.0.0.1:9/corpora")  # nobody listens on that port


def test_a_missing_file_there_is_none():
    from controlllm.data.remote import told

    with pytest.raises(UserError, match="no such file") as raised, told("s3://bucket/file"):
        raise FileNotFoundError
    assert not is_passing(raised.value)


def test_a_folder_that_the_storage_has_lost_is_no_outage():
    from flytekit.types.directory import FlyteDirectory

    from tasks.artifacts import local

    with pytest.raises(UserError, match=r"^memory://lost/folder: is not there any more; ") as lost:
        local(FlyteDirectory.from_source("memory://lost/folder"))
    assert not is_passing(lost.value)
