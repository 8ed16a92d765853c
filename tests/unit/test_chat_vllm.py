"""Answers by vLLM in a process of its own: transformers' tokens, a live dial, and no process left."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chatting import generated, request, saved, talker, tokens, tuned_talker
from test_smoke import _gone

import controlllm
from controlllm.chat.opening import Wish, open_base, open_engine
from controlllm.chat.places import find_place
from controlllm.cli import main
from controlllm.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
IDS = [5, 77, 130, 9, 200, 41, 18]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.parametrize("layout", ["concat", "hybrid"])
def test_answers_dial_and_base(layout, tokenizer, tmp_path):
    folder = saved(tuned_talker(layout=layout), tokenizer, tmp_path / "model")
    place = find_place(folder, None)
    engine = open_engine(place, Wish("vllm"))
    try:
        assert engine.context == 2048
        assert engine.alpha == 1
        assert open_base(place, engine, Wish("vllm"), base=None) is engine
        want = generated(controlllm.load(folder).eval(), IDS)
        assert tokens(engine.answer(request(IDS))) == want
        assert tokens(engine.answer(request(IDS, base=True))) == generated(talker(), IDS) != want
        engine.set_alpha(0.5)
        half = generated(controlllm.load(folder, alpha_scale=0.5).eval(), IDS)
        assert tokens(engine.answer(request(IDS))) == half
        engine.set_alpha(1.0)
        stopped = engine.answer(request(IDS, room=1500, stop=frozenset()))
        begun = [token for token in stopped if token is not None and (stopped.close() or True)]
        assert begun == want[:1]
        assert tokens(engine.answer(request(IDS))) == want
        end = want[7]
        assert tokens(engine.answer(request(IDS, stop=frozenset({end})))) == want[: want.index(end)]
        long = IDS * 20
        first, again = engine.answer(request(long, room=2)), engine.answer(request([*long, 8, 9], room=2))
        assert len(tokens(first)) == len(tokens(again)) == 2
        assert again.reused >= 96
    finally:
        engine.close()
    assert _gone(engine._process.pid)


def test_it_ends_with_a_chat_that_is_killed(tokenizer, tmp_path):
    folder = saved(tuned_talker(), tokenizer, tmp_path / "model")
    command = [sys.executable, "-m", "controlllm.cli", "chat", str(folder), "--backend", "vllm"]
    chat = subprocess.Popen([*command, "--max-new-tokens", "4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert chat.stdin
    assert chat.stdout
    chat.stdin.write(b"one\n")
    chat.stdin.flush()
    until = time.monotonic() + 300
    while not (workers := _children(chat.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers
    os.kill(chat.pid, signal.SIGKILL)  # also while vLLM is being imported
    chat.wait()
    assert all(map(_gone, workers))


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"vllm_worker" in command:
            found.append(int(folder.name))
    return found


def test_what_vllm_refuses_is_one_line(tokenizer, tmp_path, capsys):
    import json

    folder = saved(talker(), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["chat", str(folder), "--backend", "vllm", "--prompt", "x"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --backend vllm: it failed: ")
    assert "--backend transformers needs no vLLM; its log is " in line


def test_where_vllm_is_not_installed_that_is_said_first(tokenizer, tmp_path, monkeypatch):
    folder = saved(talker(), tokenizer, tmp_path / "model")
    monkeypatch.delenv("CONTROLLLM_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--backend vllm: vLLM is not installed; pip install 'controlllm\[serve"):
        open_engine(find_place(folder, None), Wish("vllm"))
