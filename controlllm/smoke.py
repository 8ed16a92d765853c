"""Stage 6: vLLM loads the tuned model and must give the tokens that transformers gives."""

import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from controlllm import vllm_process
from controlllm.config import SmokeConfig
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.store import Output, run_stage
from controlllm.tuned import has_virtual_tokens, stop_tokens
from controlllm.vllm_engine import ENVIRONMENT
from controlllm.vllm_process import cause_of, keep_log

TIMEOUT_SECONDS = 1800.0

Tokens = list[list[int]]


def smoke(model: Path, data: Path, config: SmokeConfig) -> Output:
    """`smoke.json` for prompts of the probes. UserError when too few tokens are equal."""
    return run_stage(
        "smoke",
        config={"smoke": config},
        parents={"model": model, "ingest data": data},
        build=lambda folder: smoke_test(folder, model=model, prompts=_prompts(data, config.prompts), config=config),
    )


def smoke_test(folder: Path, *, model: Path, prompts: list[str], config: SmokeConfig) -> None:
    """Greedy tokens of both engines, in float32, into `folder/smoke.json`. The prompts are rendered already."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "smoke: vLLM is not installed; pip install 'controlllm[serve-cpu]' (with a GPU: 'controlllm[serve]'), "
            "or set smoke=null to leave the smoke test out"
        )
    if has_virtual_tokens(model):
        raise UserError(f"smoke: {model} has virtual tokens, which vLLM has no place for; set smoke to null")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    request = {
        "model": str(model),
        "prompts": [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts],
        "stop": stop_tokens(model, tokenizer),
        "max_new_tokens": config.max_new_tokens,
    }
    with _vllm() as ask, console.status("  smoke: transformers generates, vLLM starts"):
        expected = _transformers_tokens(request)
        own_seconds = time.perf_counter() - began
        answer = ask(request)
    found = answer.pop("tokens")
    agreement = _agreement(expected, found)
    passed = agreement >= config.min_agreement
    parts = {name: round(answer.pop(name), 2) for name in ("import", "load", "generate")}
    summary = {
        "passed": passed,
        "agreement": agreement,
        **answer,
        "seconds": round(time.perf_counter() - began, 2),
        "parts": {"transformers": round(own_seconds, 2)} | parts,
        "samples": _samples(prompts, expected, found, tokenizer),
    }
    (folder / "smoke.json").write_text(json.dumps(summary, indent=1))
    if not passed:
        raise UserError(
            f"smoke.min_agreement: {agreement:.1%} of vLLM's greedy tokens are those of transformers, "
            f"{config.min_agreement:.1%} are wanted; {_first_difference(expected, found, tokenizer)}"
        )


def _prompts(data: Path, count: int) -> list[str]:
    """The first prompts of each probe, in turn."""
    files = sorted((data / "probes").glob("*.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()[:count]] for file in files]
    prompts = [row["prompt"] for turn in zip_longest(*rows) for row in turn if row and "prompt" in row]
    if not prompts:
        raise UserError("smoke: no benchmark probe has prompts; add one, or set smoke=null to leave the smoke test out")
    return prompts[:count]


def _transformers_tokens(request: dict[str, Any]) -> Tokens:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))  # vLLM's import has the other core; threads that wait for it spin
    try:
        return _generate(request, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()  # the model is gone: vLLM takes its place


def _generate(request: dict[str, Any], device: Any) -> Tokens:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).to(device).eval()
    stop = request["stop"]
    # Replaced as a whole: a checkpoint's penalties and sampling are not what is compared.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request["max_new_tokens"],
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
    )
    tokens: Tokens = []
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt], device=device)  # (1, seq)
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    return tokens


@contextmanager
def _vllm() -> Iterator[Any]:
    """Start vLLM and yield `ask(request) -> answer`. It imports while the caller works; nothing of it stays behind."""
    with tempfile.TemporaryDirectory(prefix="controlllm-smoke-") as scratch:
        log = Path(scratch, "worker.log")
        answer = Path(scratch, "answer.json")
        command = [vllm_process.python(), "-m", "controlllm.smoke_worker", str(answer)]
        with log.open("wb") as stream:
            process = vllm_process.start(command, environment=ENVIRONMENT, log=stream)

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died before it read: the log says why
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            try:
                if process.wait(TIMEOUT_SECONDS) != 0:
                    _fail(cause_of(log, process.returncode), log)
            except subprocess.TimeoutExpired:
                _fail(f"it gave no answer in {TIMEOUT_SECONDS / 60:.0f} minutes", log)
            return json.loads(answer.read_text())

        try:
            yield ask
        finally:
            vllm_process.end(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()


def _fail(cause: str, log: Path) -> NoReturn:
    raise UserError(f"smoke: vLLM failed: {cause}; its log is {keep_log(log, 'smoke')}")


def _agreement(expected: Tokens, found: Tokens) -> float:
    """Share of equal tokens, place by place; what only one engine gave is not equal."""
    pairs = [pair for both in zip(expected, found, strict=True) for pair in zip_longest(*both)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _samples(prompts: list[str], expected: Tokens, found: Tokens, tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "transformers": tokenizer.decode(ours, skip_special_tokens=True),
            "vllm": tokenizer.decode(theirs, skip_special_tokens=True),
            "equal": ours == theirs,
        }
        for prompt, ours, theirs in zip(prompts, expected, found, strict=True)
    ]


def _first_difference(expected: Tokens, found: Tokens, tokenizer: Any) -> str:
    for prompt, both in enumerate(zip(expected, found, strict=True), start=1):
        for place, (ours, theirs) in enumerate(zip_longest(*both), start=1):
            if ours != theirs:
                ours, theirs = ("nothing" if t is None else repr(tokenizer.decode([t])) for t in (ours, theirs))
                return f"prompt {prompt} differs first at token {place}: transformers {ours}, vLLM {theirs}"
    raise AssertionError("nothing differs")
