"""Tiny models as if trained, what transformers says of them, and a process in which vLLM runs them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.fingerprint import PACKAGE
from controlllm.vllm_engine import ENVIRONMENT

SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.3,  # logits far apart
    "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], list(range(60, 100))]
Tokens = list[list[int]]


def trained(family: str, changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An expanded model of transformers, its twins and interpolations moved."""
    config = getattr(transformers, f"{family}Config")(**SHAPE | (changes or {}))
    torch.manual_seed(0)
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    model = expand_model(base, ControlSettings(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                moved = 0.7 if name.endswith("_logit") else 0.1 * torch.randn_like(parameter)
                parameter.add_(moved)
    return model.eval()


def expected(model: Any, prompts: Tokens, *, tokens: int = 16) -> Tokens:
    """Greedy, one prompt at a time."""
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])  # (1, seq)
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    assert len({token for answer in answers for token in answer}) > 10, "these answers say nothing"
    return answers


class Engines:
    """Asks the process for one engine after another."""

    def __init__(self, process: Any, answers: Any):
        self.process, self.answers = process, answers

    def __call__(self, model: Path, *steps: dict[str, Any], **engine: Any) -> list[Any]:
        """What each step gives; ValueError says what vLLM said."""
        self.process.stdin.write(json.dumps({"model": str(model), "engine": engine, "steps": steps}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.answers.readline())
        if isinstance(answer, dict):
            raise ValueError(answer["error"])
        return answer


@contextmanager
def engines(log: Path, **environment: str) -> Iterator[Engines]:
    paths = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    reading, writing = os.pipe()
    with log.open("wb") as stream, os.fdopen(reading) as answers:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine_worker.py")), str(writing)],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths} | environment,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            yield Engines(process, answers)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of its engines
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
