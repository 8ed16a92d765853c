"""A vLLM engine with our defaults: in one place what it wants on a CPU and on GPUs. For a process of its own."""

import json
import os
from pathlib import Path
from typing import Any

from controlllm.errors import UserError

# Of the environment in which such a process starts.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait made generation 20 × slower on busy cores
}
BLOCK = 32  # tokens; vLLM on a CPU wants a multiple of 32
CPU_KV_CACHE = 2  # GiB, if VLLM_CPU_KVCACHE_SPACE says nothing; by itself vLLM takes nearly all of the memory
GPU_MEMORY = 0.85  # share; the rest is for log-probabilities of prompts, which vLLM does not plan for


def open_llm(model: str, *, dtype: str, longest: int, gpus: int, **more: Any) -> Any:
    """A vllm.LLM. longest: tokens of a request with its answer. gpus: those that it spans, 0 on a CPU.

    more: of vllm.EngineArgs, before our defaults. Sampling defaults are vLLM's, not the checkpoint's.
    """
    from vllm import LLM

    from controlllm.vllm_plugin import register

    register()
    look_at_the_model_class_here(model)
    settings = {"generation_config": "vllm", "enforce_eager": True, "disable_log_stats": True} | defaults(gpus) | more
    return LLM(model=model, dtype=dtype, max_model_len=longest, **settings)  # type: ignore[arg-type]


def defaults(gpus: int) -> dict[str, Any]:
    """Of vllm.EngineArgs, what fits the device. gpus: as in `open_llm`. UserError for a space that vLLM cannot read."""
    if gpus:
        return {"gpu_memory_utilization": GPU_MEMORY, "tensor_parallel_size": gpus}
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or str(CPU_KV_CACHE)
    if not space.isdecimal():
        raise UserError(f"VLLM_CPU_KVCACHE_SPACE: vLLM takes whole GiB, such as {CPU_KV_CACHE}; found {space!r}")
    return {"kv_cache_memory_bytes": int(space) << 30, "block_size": BLOCK}


def look_at_the_model_class_here(model: str) -> None:
    """vLLM imports itself again in another process to look at a model class, 15 s; this process has CUDA untouched."""
    from vllm import ModelRegistry

    for name in json.loads((Path(model) / "config.json").read_text())["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
