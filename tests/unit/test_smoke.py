"""What the smoke test sees of two engines' answers, and what it says when the server fails; starts no vLLM."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_served import llama, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from controlllm import vllm_process
from controlllm.benchmark.beginnings import in_batches
from controlllm.config import SmokeConfig
from controlllm.errors import UserError
from controlllm.fingerprint import PACKAGE
from controlllm.smoke import checks, prompts, reference, stage
from controlllm.smoke.asked import Answered
from controlllm.smoke.comparison import compare, told
from controlllm.smoke.greedy import Greedy
from controlllm.smoke.page import render
from controlllm.smoke.server import server

CONFIG = SmokeConfig(prompts=3, max_new_tokens=8, endpoint=False)
ASKED = [[3, 4, 5, 6, 7], [9, 8], list(range(60, 100)), [3, 4, 5, 6, 8]]
FACTS: dict[str, Any] = {
    "engine": "vllm 0", "model_class": "X", "layers": "vLLM's own", "tokens": 1, "tokens_per_second": 1.0,
    "first_token_seconds": 0.1, "memory": {"resident": 1, "gpu": None, "kv_cache": 1, "kv_cache_tokens": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tied"), llama(), sites=[1, 3])


@pytest.fixture(scope="module")
def ours(model: Path) -> list[Greedy]:
    return _answers(model)


def _answers(model: Path) -> list[Greedy]:
    return reference.answers(model, ASKED, max_new_tokens=16, advance=lambda done, note="": None)


def test_batches_give_the_greedy_tokens_of_generate(model: Path, ours: list[Greedy]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert len(in_batches(ASKED, reference.ROWS)) == 1
    for asked, answer in zip(ASKED, ours, strict=True):
        out = loaded.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=16, pad_token_id=0)
        assert answer.tokens == out[0, len(asked) :].tolist()
        assert answer.finish == ("stop" if answer.tokens[-1] == 0 else "length")


def test_log_probabilities_are_those_of_a_pass_over_the_whole_text(model: Path, ours: list[Greedy]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for asked, answer in zip(ASKED, ours, strict=True):
        with torch.no_grad():
            chances = loaded(torch.tensor([asked + answer.tokens])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        expected, tokens = chances.topk(2)
        assert [[token for token, _ in place] for place in answer.likely] == tokens.tolist()
        found = torch.tensor([[value for _, value in place] for place in answer.likely])
        assert torch.allclose(found, expected, atol=1e-4)
        assert answer.logprobs == [place[0][1] for place in answer.likely]


def test_twins_matter(ours: list[Greedy], tmp_path: Path) -> None:
    """Else equal tokens would say nothing about the twins' KV cache."""
    plain = _answers(save(tmp_path, llama(), sites=[]))
    assert [answer.tokens for answer in plain] != [answer.tokens for answer in ours]
    assert len({token for answer in ours for token in answer.tokens}) > 10


# Comparison


def _greedy(tokens: list[int], *, off: float = 0.0, finish: str = "length") -> Greedy:
    likely = [[(token, -0.25 + off), (token + 1, -1.5)] for token in tokens]
    return Greedy(tokens, [-0.25 + off] * len(tokens), likely, finish)


def _words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def test_agreement_counts_places_and_what_only_one_engine_gave() -> None:
    found = compare([_greedy([1, 2, 3, 4]), _greedy([5, 6])], [_greedy([1, 2, 9, 4]), _greedy([5, 6, 7])], words=_words)
    assert found.agreement == 5 / 7
    assert found.equal_prompts == 0
    assert [(one["prompt"], one["token"]) for one in found.differences] == [(1, 3), (2, 3)]
    first, second = found.differences
    assert first["vllm"]["top"] == [
        {"token": 9, "text": "9", "logprob": -0.25},
        {"token": 10, "text": "10", "logprob": -1.5},
    ]
    assert first["transformers"]["margin"] == 1.25
    assert second["transformers"] is None
    assert told(first) == ("prompt 1 differs first at token 3: transformers '3' (margin 1.2), vLLM '9' (margin 1.2)")
    assert told(second).endswith("transformers nothing, vLLM '7' (margin 1.2)")


def test_log_probabilities_count_only_before_the_first_difference() -> None:
    theirs = Greedy([1, 9, 3], [-0.26, -3.0, -8.0], [[(1, -0.26), (2, -2.0)]] * 3, "length")
    found = compare([_greedy([1, 2, 3])], [theirs], words=_words)
    assert found.logprob_difference == pytest.approx(0.01)


# Checks


def _summary(model: Path, ours: list[Greedy], theirs: list[Greedy], config: SmokeConfig = CONFIG) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [prompts.Prompt(tokenizer.decode(tokens), tokens, message=False) for tokens in ASKED]
    answered = Answered(theirs, [], None, [], FACTS)
    made = stage.summarise(asked, ours, answered, config, tokenizer=tokenizer, stop=[0])
    return made | {"seconds": 1.0, "parts": {}}


def _results(summary: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["result"] for one in summary["checks"]}


def test_equal_answers_pass(model: Path, ours: list[Greedy]) -> None:
    summary = _summary(model, ours, ours)
    assert summary["passed"]
    assert summary["agreement"] == summary["equal_prompts"] == 1.0
    ended = any(answer.finish == "stop" for answer in ours)
    assert _results(summary)["stops at EOS"] == ("passed" if ended else "not seen")
    assert _results(summary)["chat template"] == "not seen"


def _changed(ours: list[Greedy], **fields: Any) -> list[Greedy]:
    return [dataclasses.replace(ours[0], **fields), *ours[1:]]


def test_each_check_can_fail(model: Path, ours: list[Greedy]) -> None:
    first = ours[0]
    assert len(first.tokens) == 16
    cut = {name: getattr(first, name)[:3] for name in ("tokens", "logprobs", "likely")}
    other = [*first.tokens[:3], 127, *first.tokens[4:]]
    nothing = {"tokens": [0], "logprobs": [-0.1], "likely": [[(0, -0.1), (1, -3.0)]], "finish": "stop"}
    wrong = {
        "greedy tokens": [_changed(ours, **cut), _changed(ours, tokens=other)],
        "log-probabilities": [_changed(ours, logprobs=[value - 0.01 for value in first.logprobs])],
        "non-empty": [_changed(ours, **nothing)],
        "stops at EOS": [
            _changed(ours, tokens=[*first.tokens[:3], 0, *first.tokens[4:]]),
            _changed(ours, finish="stop"),
        ],
    }
    for name, all_theirs in wrong.items():
        for theirs in all_theirs:
            summary = _summary(model, ours, theirs)
            assert _results(summary)[name] == "failed", name
            assert not summary["passed"]
    lenient = CONFIG.model_copy(update={"min_agreement": 0.5})
    assert _summary(model, ours, _changed(ours, tokens=other), lenient)["passed"]


def test_an_answer_that_ends_in_one_engine_only_is_no_pass() -> None:
    ours, theirs = [_greedy([5, 6])], [_greedy([5, 6])]
    ours[0] = dataclasses.replace(ours[0], finish="stop")
    assert checks.stops(ours, theirs, [0])["result"] == "failed"
    assert checks.stops(theirs, theirs, [0])["result"] == "not seen"


def test_a_failed_check_is_one_line_and_a_page(
    model: Path, ours: list[Greedy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "smoke.html").write_text("page")
    theirs = _changed(ours, tokens=[*ours[0].tokens[:3], 127, *ours[0].tokens[4:]])
    with pytest.raises(UserError, match=r"smoke\.min_agreement: greedy tokens: .* prompt 1 differs first at") as error:
        stage._refuse(_summary(model, ours, theirs), tmp_path / "smoke.html")
    assert "\n" not in str(error.value)
    assert Path(str(error.value).rsplit(" ", 1)[1]).read_text() == "page"


def test_the_page_shows_differences_and_escapes_what_models_write(model: Path, ours: list[Greedy]) -> None:
    summary = _summary(model, ours, _changed(ours, tokens=[*ours[0].tokens[:3], 127, *ours[0].tokens[4:]]))
    summary["samples"][0]["vllm"] = "<script>alert(1)</script>"
    page = render(summary)
    HTMLParser().feed(page)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('<td class="said">') >= len(summary["checks"]) + 2
    assert not [word for word in ("http://", "https://", "src=") if word in page]


# Prompts


def test_the_projects_prompts_are_256_different_ones() -> None:
    own = prompts.own_prompts()
    assert len(own) == len(set(own)) == 256
    assert all(text.strip() == text and len(text) < 120 for text in own)
    assert sum(not text.isascii() for text in own) > 40


def test_prompts_are_the_projects_and_the_probes_in_turn(model: Path, tmp_path: Path) -> None:
    rows = {"a": [{"prompt": "w1"}, {"prompt": "w2"}], "b": [{"text": "w3"}], "c": [{"prompt": "w4"}]}
    (tmp_path / "probes").mkdir()
    for name, items in rows.items():
        (tmp_path / "probes" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tokenizer = AutoTokenizer.from_pretrained(model)
    chosen = prompts.choose(tokenizer, tmp_path, count=7, longest=None)
    assert [prompt.text for prompt in chosen if not prompt.message] == ["w1", "w4", "w2"]
    assert [prompt.message for prompt in chosen] == [True, False] * 3 + [True]
    own = prompts.choose(tokenizer, None, count=300, longest=None)
    assert len(own) == 256
    words = own[0].text.split()
    assert own[0].tokens[0] == 1  # <user>
    assert own[0].tokens[-2:] == [0, 2]  # <eos> <assistant>
    assert len(own[0].tokens) == len(words) + 3
    assert all(len(prompt.tokens) <= 9 for prompt in prompts.choose(tokenizer, None, count=256, longest=9))


# A server that fails


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """For the Python that runs the server."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setenv(vllm_process.PYTHON, str(python))


def _started(model: Path, *, seconds: float) -> None:
    with server(model, [], seconds=seconds) as vllm:
        vllm.open()
        vllm.wait()


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name leaves room for a socket's."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo '[rank0]: ValueError: no such thing'; echo bye; exit 1", "ValueError: no such thing; its log is"),
        ("echo 'x.ValidationError: 1 validation error for M'; echo ' too long'; exit 1", "for M too long; its log is"),
        (
            "echo '(EngineCore pid=7) ValueError: it says why'; echo '(APIServer pid=6) RuntimeError: Engine core "
            "initialization failed. See root cause above.'; exit 1",
            "failed: ValueError: it says why; its log is",
        ),
        ("echo words; exit 3", "failed: words; its log is"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "SIGKILL, which is often too little memory"),
    ],
)
def test_a_failing_server_is_one_line_and_a_log(
    script: str, cause: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(short, monkeypatch, script)
    with pytest.raises(UserError) as error:
        _started(short, seconds=60)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
    kept = Path(str(error.value).rsplit(" ", 1)[1])
    assert {path.name for path in short.iterdir()} == {"python", kept.name}


def test_a_silent_server_meets_its_deadline(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(short, monkeypatch, f"echo $$ > {short}/pid; exec sleep 60")
    with pytest.raises(UserError, match=r"smoke\.timeout_seconds: vLLM had not loaded the model after 0\.2 s; allow"):
        _started(short, seconds=0.2)
    assert _gone(int((short / "pid").read_text()))


def test_a_long_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(UserError, match="set TMPDIR to a shorter folder"), server(tmp_path, [], seconds=1):
        pass


def test_interruption_ends_the_server_and_its_children(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = short / "child"
    _stand_in(short, monkeypatch, f"sleep 60 & echo $! > {child}; wait")
    with pytest.raises(KeyboardInterrupt):
        _interrupted_when(child)
    assert _gone(int(child.read_text()))


def _interrupted_when(file: Path) -> None:
    with server(file.parent, [], seconds=60):
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


def test_the_server_dies_with_its_caller() -> None:
    code = "import time; from controlllm.vllm_server import die_with_the_caller as d; d(); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True, env=environment
    )
    assert process.stdin is not None
    threading.Timer(0.1, process.stdin.close).start()
    assert process.wait(300) == -signal.SIGKILL


def test_missing_vllm_says_what_to_install(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'controlllm\[serve-cpu\]'.*or set smoke=null"):
        stage.smoke_test(tmp_path, model=model, data=None, config=CONFIG)
