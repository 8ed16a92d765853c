"""A vLLM engine in a process of its own: `python -m controlllm.smoke_worker ANSWER`, one JSON request on stdin."""

import json
import os
import signal
import sys
import threading
import time
from math import ceil
from pathlib import Path
from typing import Any

from controlllm.vllm_engine import BLOCK, open_llm

KV_CACHE_LIMIT = 1 << 30  # bytes; named so that vLLM does not measure. The number of blocks is what is taken.


def main(answer: Path) -> None:
    """Import vLLM, then wait for the request: the caller uses the machine meanwhile."""
    began = time.perf_counter()
    from vllm import __version__

    imported = time.perf_counter()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    asked = time.perf_counter()
    engine = _engine(request)
    loaded = time.perf_counter()
    tokens = _greedy(engine, request)
    answer.write_text(json.dumps({
        "tokens": tokens,
        "engine": f"vllm {__version__}",
        "model_class": engine.apply_model(lambda model: type(model).__name__)[0],
        "import": imported - began,
        "load": loaded - asked,
        "generate": time.perf_counter() - loaded,
    }))  # fmt: skip


def _engine(request: dict[str, Any]) -> Any:
    longest = max(map(len, request["prompts"])) + request["max_new_tokens"]
    return open_llm(
        request["model"],
        dtype="float32",
        longest=longest,
        gpus=0,
        max_num_seqs=len(request["prompts"]),
        block_size=BLOCK,
        num_gpu_blocks_override=len(request["prompts"]) * (ceil(longest / BLOCK) + 1) + 1,
        kv_cache_memory_bytes=KV_CACHE_LIMIT,
        skip_tokenizer_init=True,
    )


def _greedy(engine: Any, request: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams

    # What ends a text is said in the request, the same for both engines.
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=request["max_new_tokens"],
        stop_token_ids=request["stop"],
        ignore_eos=True,
        detokenize=False,
    )
    outputs = engine.generate([{"prompt_token_ids": p} for p in request["prompts"]], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _die_with_the_caller() -> None:
    """The caller holds stdin open for as long as it lives."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # nothing is left to save, and vLLM takes seconds to take itself down
