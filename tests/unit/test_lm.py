"""One model behind lm-evaluation-harness, whatever runs it: the same scores, and a line when it cannot run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from controlllm.benchmark import workers
from controlllm.benchmark.engine import Pair
from controlllm.benchmark.lm import backend_of, open_lm
from controlllm.benchmark.workers import Start, Workers
from controlllm.config import BenchmarkConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
TEXTS = ["one two three", "a", "Once upon a time there was a king who had no bread, and so he went to sea.", "42"]
CONFIG = BenchmarkConfig(dtype="float32", batch_size=3, backend="hf")


def ask(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


PAIRS = [ask("loglikelihood", text, end) for text in TEXTS for end in (" yes", " no way", "y")]
ROLLING = [ask("loglikelihood_rolling", text * 3) for text in TEXTS]
PROMPTS = [
    ask("generate_until", text, {"until": until, "max_gen_toks": size})
    for text in TEXTS
    for until, size in ((["\n"], 12), ([], 20), (["e", "<|im_start|>"], 16))
]


def answers(folder: Path, **changes):
    """(log-likelihoods, greedy hits, rolling, texts), and how many were counted."""
    counted = []
    config = CONFIG.model_copy(update=changes)
    with open_lm(folder, config, config.backend, lambda n, note="": counted.append(n)) as lm:
        pairs = lm.loglikelihood(PAIRS)
        found = [chance for chance, _ in pairs], [hit for _, hit in pairs], lm.loglikelihood_rolling(ROLLING)
        return (*found, lm.generate_until(PROMPTS)), counted


def save(folder: Path, model, tokenizer, **changes) -> Path:
    """With weights that say more than the last token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10) if "alpha" not in name else parameter.add_(0.5)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def expanded(tiny_model, tokenizer, tmp_path) -> Path:
    return save(tmp_path / "expanded", expand_model(tiny_model, ControlSettings(sites=[1, 3])), tokenizer)


def test_processes_give_what_one_gives(expanded):
    one, _ = answers(expanded)
    two, counted = answers(expanded, processes=2)
    assert two == one
    assert counted == sorted(counted)
    assert counted[-1] == len(PAIRS) + len(ROLLING) + len(PROMPTS)
    assert len(set(one[3])) > len(TEXTS)


ECHO = f"""#!{sys.executable}
import json, sys
for text in sys.stdin:
    line = json.loads(text)
    answers = [[pair["context"][0], True] for pair in line["pairs"]]
    print(json.dumps({{"batch": line["batch"], "pairs": 1, "answers": answers}}), flush=True)
"""


def stands_in(folder: Path, monkeypatch, script: str) -> None:
    """For the Python that runs a worker."""
    file = folder / "python"
    file.write_text(script)
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.setattr("tempfile.tempdir", str(folder))


def test_a_run_left_in_the_middle_mixes_up_nothing_and_nothing_stays(tmp_path, monkeypatch):
    stands_in(tmp_path, monkeypatch, ECHO)
    pool = Workers([Start("hf", {}, {}, room=2)] * 2, way_out="look")
    batches = [[Pair([number], [0])] for number in range(20)]
    next(iter(pool.run(batches[::-1])))
    processes = [worker.process for worker in pool._workers]
    assert sorted(pool.run(batches)) == [(number, [(number, True)]) for number in range(20)]
    processes += [worker.process for worker in pool._workers]
    assert sorted(pool.run(batches[:1])) == [(0, [(0, True)])]
    pool.close()
    assert len({process.pid for process in processes}) == 4
    assert not any(Path(f"/proc/{process.pid}").exists() for process in processes)
    assert {path.name for path in tmp_path.iterdir()} == {"python"}


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo 'x.UserError: no such thing' >&2; echo bye >&2; exit 1", "x.UserError: no such thing; look; its log is"),
        ("kill -9 $$", "SIGKILL, which is often too little memory; look"),
        ("sleep 60", "no answer in 0 minutes; look"),
    ],
)
def test_a_worker_that_ends_or_is_silent_is_one_line_and_a_log(script, cause, tmp_path, monkeypatch):
    stands_in(tmp_path, monkeypatch, f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.2 if "sleep" in script else 60)
    pool = Workers([Start("hf", {}, {}, room=1)] * 2, way_out="look")
    with pytest.raises(UserError) as error:
        list(pool.run([[Pair([2], [3] * 100_000)]] * 4))
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
    kept = Path(str(error.value).rsplit(" ", 1)[1])
    assert {path.name for path in tmp_path.iterdir()} == {"python", kept.name}


def test_the_backend_is_chosen_by_kind(tiny_base, monkeypatch):
    auto = BenchmarkConfig()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert backend_of("generate", auto, tiny_base, items=50) == "hf"
    assert backend_of("generate", auto, tiny_base, items=5000) == "vllm"
    assert [backend_of(kind, auto, tiny_base) for kind in ("generate", "code", "choice", "text")] == [
        "vllm", "vllm", "hf", "hf",
    ]  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend_of("generate", auto, tiny_base) == "hf"
    with pytest.raises(UserError, match=r"vllm is not installed.*or set benchmark\.backend to hf"):
        backend_of("choice", BenchmarkConfig(backend="vllm"), tiny_base)


def test_virtual_tokens_are_hf_s(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "config.json").write_text('{"prompt": {"kind": "prompt", "num_virtual_tokens": 3}}')
    assert backend_of("generate", BenchmarkConfig(), tmp_path) == "hf"
    with pytest.raises(UserError, match=r"virtual tokens, which vLLM has no place for; set benchmark\.backend to hf"):
        backend_of("generate", BenchmarkConfig(backend="vllm"), tmp_path)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("sites", [[1, 3], []], ids=["expanded", "plain"])
def test_vllm_gives_what_transformers_gives(sites, tokenizer, tmp_path):
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(head_dim=32, max_position_embeddings=128))
    model = expand_model(model, ControlSettings(sites=sites)) if sites else model
    folder = save(tmp_path / "model", model, tokenizer)
    chances, hits, rolling, texts = answers(folder)[0]
    found, counted = answers(folder, backend="vllm")
    assert found[0] == pytest.approx(chances, abs=1e-3)
    assert found[1] == hits
    assert found[2] == pytest.approx(rolling, abs=1e-3)
    assert found[3] == texts
    assert counted[-1] == len(PAIRS) + len(ROLLING) + len(PROMPTS)


@needs_vllm
@pytest.mark.slow
def test_what_vllm_cannot_run_is_one_line(tiny_base, tokenizer, tmp_path):
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"the vllm worker failed: .*; if vLLM cannot run this model, set") as error:
        answers(tmp_path, backend="vllm")
    assert "\n" not in str(error.value)
    Path(str(error.value).rsplit(" ", 1)[1]).unlink()
