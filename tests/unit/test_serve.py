"""What `controlllm serve` would run, what it refuses before, and how it ends; starts no vLLM."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_served import llama, save

from controlllm import serving as serving_module
from controlllm import vllm_process
from controlllm.cli import main
from controlllm.fingerprint import PACKAGE
from controlllm.serving import Serving, command, greeting


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "model", llama(), sites=[1, 3])


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def _complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 1) -> str:
    assert main(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# What is run


def test_the_command_is_vllms_with_our_defaults(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "_on_gpu", lambda: False)
    line = command(Serving(made, port=8123, max_model_len=64, extra=("--api-key", "k")))
    assert line[:4] == [sys.executable, "-m", "controlllm.vllm_server", str(made)]
    given = dict(zip(line[4:16:2], line[5:17:2], strict=True))
    assert given["--served-model-name"] == made.parent.name
    assert given["--dtype"] == "float32"
    assert given["--port"] == "8123"
    assert line[-3:] == ["--enforce-eager", "--api-key", "k"]


@pytest.mark.parametrize("space", ["1.5", "lots"])
def test_a_cache_that_vllm_cannot_read_is_one_line(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], space: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    assert main(["serve", str(made), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: VLLM_CPU_KVCACHE_SPACE: vLLM takes whole GiB, such as 2; found '{space}'\n"


def test_on_gpus_vllm_chooses(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "_on_gpu", lambda: True)
    line = command(Serving(made, tensor_parallel=2))
    assert line[line.index("--tensor-parallel-size") + 1] == "2"
    assert not {"--dtype", "--enforce-eager", "--kv-cache-memory-bytes", "--max-model-len"} & set(line)


def test_the_dial_goes_with_all_settings_of_the_checkpoint(made: Path) -> None:
    line = command(Serving(made, alpha=0.25))
    control = json.loads(line[line.index("--hf-overrides") + 1])["control"]
    assert control == json.loads((made / "config.json").read_text())["control"] | {"alpha_scale": 0.25}


def test_a_dry_run_prints_a_command_for_a_shell(
    made: Path, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert main(["serve", str(made), "--port", str(port), "--dry-run", "--", "--api-key", "two words"]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert line[0] == "env"
    assert "HF_HUB_OFFLINE=1" in line
    assert not [word for word in line if word.startswith("VLLM_CPU_OMP_THREADS_BIND")]
    assert line[-2:] == ["--api-key", "two words"]


def test_the_greeting_is_a_command_that_fits_the_model(made: Path, tmp_path: Path) -> None:
    words = shlex.split(greeting(Serving(made, host="0.0.0.0")).splitlines()[1])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == made.parent.name
    plain = save(tmp_path / "plain", llama(), sites=[], chat=False)
    assert "/v1/completions" in greeting(Serving(plain, host="::"))


# What is refused


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _shards(folder: Path) -> None:
    """Two files of weights and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _without_shard(folder: Path) -> None:
    _shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _foreign_tokenizer(folder: Path) -> None:
    read = json.loads((folder / "tokenizer.json").read_text())
    read["model"]["vocab"]["another"] = 128
    (folder / "tokenizer.json").write_text(json.dumps(read))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
    "missing shard": (
        _without_shard,
        r"model-00002-of-00002\.safetensors: is missing, which model\.safetensors\.index",
    ),
    "cut weights": (_cut, r"model\.safetensors: no whole safetensors file"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "wrong tokenizer": (_foreign_tokenizer, r"tokenizer\.json: has token 128, but the model has only 128"),
    "wrong config": (lambda f: _edit(f / "config.json", vocab_size=200), "vocab_size is 200, but .* has 128 rows"),
    "no architectures": (lambda f: _edit(f / "config.json", architectures=None), "names no architectures"),
    "virtual tokens": (lambda f: _edit(f / "config.json", prompt={"kind": "prompt"}), "which vLLM has no place for"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_checkpoint_is_one_line(spoilt: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = SPOILT[spoilt]
    spoil(model)
    for stage in ("serve", "smoke"):
        said = _complaint([stage, str(model)], capsys)
        assert re.search(expected, said), said


def test_a_whole_sharded_checkpoint_is_not_refused(model: Path, port: int) -> None:
    _shards(model)
    assert main(["serve", str(model), "--port", str(port), "--dry-run"]) == 0


def test_no_such_folder_and_a_runs_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _complaint(["serve", f"{made}l"], capsys)
    assert f"no such folder; did you mean {made}?" in said
    assert f"is a run's folder; give {made}" in _complaint(["smoke", str(made.parent)], capsys)
    assert "is a file" in _complaint(["serve", str(made / "config.json")], capsys)


def test_options_that_do_not_fit(made: Path, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = str(save(tmp_path / "plain", llama(), sites=[]))
    capsys.readouterr()
    assert "has no twins to turn down" in _complaint(["serve", plain, "--alpha", "0.5"], capsys)
    assert "--alpha" in _complaint(["serve", plain, "--alpha", "1.5"], capsys, code=2)
    assert "cannot be listened on" in _complaint(["serve", plain, "--host", "no.such.host.invalid"], capsys)
    assert "a checkpoint has no recipe" in _complaint(["smoke", plain, "smoke.prompts=2"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said = _complaint(["serve", plain, "--port", str(port)], capsys)
        assert f"--port {port}: is taken on 127.0.0.1; choose another" in said


# How it ends

SERVER = """
import http.server, os, signal, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[0] + ".pids", "w").write(f"{os.getpid()} {child.pid}")
os.read(0, 1)
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("up", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def _stand_in(folder: Path, script: str) -> dict[str, str]:
    """The environment in which `script` is what runs vLLM's server."""
    python = folder / "python"
    python.write_text(script)
    python.chmod(0o755)
    return os.environ | {vllm_process.PYTHON: str(python), "TMPDIR": str(folder), "PYTHONPATH": str(PACKAGE.parent)}


@pytest.fixture
def running(made: Path, port: int, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`controlllm serve` that is ready, and the processes below it."""
    environment = _stand_in(tmp_path, f"#!{sys.executable}\n{SERVER}")
    process = subprocess.Popen(
        [sys.executable, "-m", "controlllm.cli", "serve", str(made), "--port", str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == f"ready: http://127.0.0.1:{port}/v1 serves {made.parent.name}; Ctrl-C ends it\n"
    yield process, [int(pid) for pid in (tmp_path / "python.pids").read_text().split()]
    process.kill()
    process.wait()


def _gone(pid: int) -> bool:
    for _ in range(3000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_exit_code_is_passed_on(told: int, running: Any) -> None:
    process, below = running
    process.send_signal(told)
    assert process.wait(120) == 7
    assert all(map(_gone, below))


def test_a_server_that_ends_by_itself_leaves_nothing(running: Any) -> None:
    process, below = running
    os.kill(below[0], signal.SIGKILL)
    assert process.wait(120) == 128 + signal.SIGKILL
    assert all(map(_gone, below))


def test_a_server_that_does_not_come_up_is_one_line(
    made: Path, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = (
        "(EngineCore pid=9) ValueError: To serve at least one request with the model's max seq len (4096), (7.5 GiB KV "
        "cache is needed, which is larger than the available KV cache memory (2.0 GiB). Try increasing ..."
    )
    script = f'echo "{long}"\necho "RuntimeError: Engine core initialization failed"\nexit 1\n'
    environment = _stand_in(tmp_path, f"#!/bin/sh\n{script}")
    monkeypatch.setenv(vllm_process.PYTHON, environment[vllm_process.PYTHON])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["serve", str(made), "--port", str(port)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "a text of 4096 tokens needs 7.5 GiB of KV cache, and there are 2.0 GiB: set --max-model-len lower" in said
    assert Path(said.rsplit(" ", 1)[1]).read_text().startswith("(EngineCore pid=9)")
