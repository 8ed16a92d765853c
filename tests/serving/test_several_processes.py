"""Expanded models in vLLM over several processes, as graphs, and as anybody starts it; each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, engines, expected, trained

from controlllm.vllm_engine import ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETTINGS: dict[str, Any] = {
    "sites": [0, 1, 2, 3],
    "layout": "hybrid",  # copies are layers 1 and 4, pairs 2 and 5, of 6
    "interpolation": "prog",
    "norm_relaxation": "learned",
}
GREEDY = {"do": "generate", "prompts": PROMPTS}
STEPS = [GREEDY, {"do": "facts"}, {"do": "turn", "scale": 0.5}, GREEDY]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # the engine's process imports this
    engine = LLM(sys.argv[1], dtype="float32", max_model_len=128, kv_cache_memory_bytes=1 << 27, block_size=32,
                 skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p} for p in json.loads(sys.argv[2])], sampling, use_tqdm=False)
    print("tokens", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def _checked(folder: Path, *, environment: dict[str, str] | None = None, **engine: Any) -> dict[str, Any]:
    """The facts, after tokens at two values of the dial were those of transformers."""
    model = trained("Llama", **SETTINGS)
    model.save_pretrained(folder / "model")
    with engines(folder / "vllm.log", VLLM_ALLOW_INSECURE_SERIALIZATION="1", **environment or {}) as ask:
        whole, facts, _, half = ask(folder / "model", *STEPS, **engine)
    assert [only for (only,) in whole] == expected(model, PROMPTS)
    assert [only for (only,) in half] == expected(trained("Llama", **SETTINGS, alpha_scale=0.5), PROMPTS)
    return facts


def test_tensor_parallel(tmp_path: Path) -> None:
    facts = _checked(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")
    first, second = facts["shapes"]
    assert first == second
    for branch in ("frozen", "expanded"):
        assert first[f"model.layers.2.{branch}.self_attn.qkv_proj.weight"] == [3 * 32, 64]  # one head of two
        assert first[f"model.layers.2.{branch}.mlp.down_proj.weight"] == [64, 48]
    assert first["model.layers.2.interpolation.map_delta"] == [64, 64]


def test_traced(tmp_path: Path) -> None:
    """The whole decoder is one graph, and the dial turns in it; Inductor is left out."""
    _checked(tmp_path, enforce_eager=False, environment={"VLLM_CPU_CI_ENV": "1"})


@pytest.mark.parametrize("apart", ["0", "1"], ids=["one process", "engine apart"])
def test_as_anybody_starts_it(apart: str, tmp_path: Path) -> None:
    """Nothing of ours is imported: the entry point makes the checkpoint known in every process. Nor is it eager."""
    model = trained("Qwen3", **SETTINGS)
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": apart}
    command = [sys.executable, str(script), str(tmp_path / "model"), json.dumps(PROMPTS)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=850)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("tokens "))
    assert json.loads(line.removeprefix("tokens ")) == expected(model, PROMPTS)
