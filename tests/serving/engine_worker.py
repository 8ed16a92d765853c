"""vLLM engines, one after another, in a process that imports vLLM once: `engine_worker.py FD`, jobs as lines on stdin.

A job is {model, engine: settings, steps}; what each step gives is answered as one line of JSON on the file descriptor.
"""

import gc
import json
import os
import sys
import traceback
from functools import partial
from typing import Any

Json = dict[str, Any]


def main(descriptor: int) -> None:
    with os.fdopen(descriptor, "w") as answers:
        for line in sys.stdin:
            try:
                answer: Any = run(json.loads(line))
            except Exception as error:  # noqa: BLE001 - the test asks what was said
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            gc.collect()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def run(job: Json) -> list[Any]:
    from controlllm.vllm_engine import open_llm

    settings = {"num_gpu_blocks_override": 65, "kv_cache_memory_bytes": 1 << 28, "skip_tokenizer_init": True}
    engine = open_llm(job["model"], dtype="float32", longest=256, gpus=0, **settings | job["engine"])
    try:
        return [STEPS[step.pop("do")](engine, **step) for step in job["steps"]]
    finally:
        engine.llm_engine.engine_core.shutdown()


def generate(
    engine: Any, prompts: list[list[int]], seen: list[int] | None = None, **sampling: Any
) -> list[list[list[int]]]:
    """For each prompt the tokens of its n answers; `seen` receives how many of its own tokens were cached."""
    from vllm import SamplingParams

    greedy = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "detokenize": False}
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(inputs, SamplingParams(**greedy | sampling), use_tqdm=False)
    if seen is not None:
        seen += [output.num_cached_tokens for output in outputs]
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def turn(engine: Any, scale: float) -> None:
    from controlllm.vllm_plugin import set_alpha_scale

    engine.apply_model(partial(set_alpha_scale, scale=scale))
    engine.reset_prefix_cache()


def facts(engine: Any) -> Json:
    cache = _scheduler(engine).kv_cache_config
    return {
        "classes": engine.apply_model(class_of),
        "shapes": engine.apply_model(shapes_of),
        "layers": [name for group in cache.kv_cache_groups for name in group.layer_names],
        "blocks": cache.num_blocks,
        "bytes": sum(tensor.size for tensor in cache.kv_cache_tensors),
    }


def class_of(model: Any) -> str:
    return type(model).__name__


def shapes_of(model: Any) -> dict[str, list[int]]:
    """Of the parameters here; of linear maps what they say, because on a CPU vLLM packs their weights away."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    linear = {name: module for name, module in model.named_modules() if hasattr(module, "input_size_per_partition")}
    return shapes | {
        f"{name}.weight": [module.output_size_per_partition, module.input_size_per_partition]
        for name, module in linear.items()
    }


def preempted(engine: Any, **generation: Any) -> Json:
    """What `generate` gives, and how often a request lost its blocks meanwhile."""
    scheduler, victims = _scheduler(engine), []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *more, **named: (
        victims.append(request) or preempt(request, *more, **named)
    )
    return {"tokens": generate(engine, **generation), "times": len(victims)}


def cached(engine: Any, **generation: Any) -> Json:
    """What `generate` gives the second time, and how many tokens of prompts were found in the cache."""
    generate(engine, **generation)
    found: list[int] = []
    tokens = generate(engine, **generation, seen=found)
    return {"tokens": tokens, "found": sum(found)}


def _scheduler(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler


STEPS = {"generate": generate, "turn": turn, "facts": facts, "preempted": preempted, "cached": cached}

if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # nothing is left to save
