"""The model under test as lm-evaluation-harness sees it, and what runs it.

`auto` lets vLLM write answers and transformers score given ones. bench/benchmark_backends.py with SmolLM2-135M in
bfloat16, 16 requests of each sort, in seconds on two cores that others used too (GPUs were not measured):

                              transformers   vLLM
    start                                2     53
    written answers                     85     16
    choices                              8      8
    choices after 5 examples            13     41   of several tokens: vLLM runs the examples again for each
    letters after 5 examples             5      2
    texts                               81      6   of uneven lengths in one padded batch
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlllm.benchmark import hf_engine
from controlllm.benchmark.engine import Pair
from controlllm.benchmark.harness import TokenLM
from controlllm.benchmark.workers import Start, Workers
from controlllm.config import BenchmarkConfig
from controlllm.errors import UserError
from controlllm.progress import Advance
from controlllm.tuned import has_virtual_tokens, stop_tokens
from controlllm.vllm_engine import ENVIRONMENT

GENERATED = ("generate", "code")  # kinds of tasks whose answers the model writes
VLLM_ROOM = 512  # requests that an engine may have at a time; it computes as many together as fit
VLLM_LENGTH = 4096  # tokens; an engine for longer ones is started when they come
# vLLM counts a token that is only looked at, where the model's length is full already.
LONGER = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
VLLM_ITEMS = 200  # answers; fewer are written before an engine has started
HF = "set benchmark.backend to hf"


@contextmanager
def open_lm(model: Path, config: BenchmarkConfig, backend: str, advance: Advance) -> Iterator[TokenLM]:
    """An lm_eval LM on hf or vllm (see `backend_of`); `advance` is told how many sequences are done.

    Nothing of a backend in processes of its own starts before the first sequence. UserError where it cannot run.
    """
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, shape = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    if backend == "vllm":
        length = resolve_max_length(shape, tokenizer)
        engine: Any = _VLLM(model, config, length=length, stop=stop_tokens(model, tokenizer))
    elif (processes := processes_of(config)) > 1:
        engine = _HFWorkers(model, config, processes, shared=hf_engine.shares_questions(shape))
    else:
        engine = hf_engine.open_engine(model, dtype=config.dtype, batch_size=config.batch_size)
    try:
        yield TokenLM(engine, tokenizer, shape, advance)
    finally:
        engine.close()


def backend_of(kind: str, config: BenchmarkConfig, model: Path | None = None, items: int | None = None) -> str:
    """hf or vllm; the same for a base and what was made of it. items: of the task, None where they are many.

    UserError where vLLM is asked for and not installed, or cannot run the model.
    """
    installed = importlib.util.find_spec("vllm") is not None
    virtual = model is not None and has_virtual_tokens(model)
    if config.backend == "vllm" and not installed:
        raise UserError(
            "benchmark.backend: vllm is not installed; pip install 'controlllm[serve-cpu]' (with a GPU: "
            f"'controlllm[serve]'), or {HF}"
        )
    if config.backend == "vllm" and virtual:
        raise UserError(f"benchmark.backend: {model} has virtual tokens, which vLLM has no place for; {HF}")
    if config.backend != "auto":
        return config.backend
    worth = kind in GENERATED and (items is None or items >= VLLM_ITEMS)
    return "vllm" if installed and worth and not virtual else "hf"


def processes_of(config: BenchmarkConfig) -> int:
    """Copies of the model under backend hf."""
    import torch

    return config.processes or torch.cuda.device_count() or 1


class _HFWorkers:
    """An `Engine`: copies of the model in transformers, a GPU each, or their part of the cores."""

    def __init__(self, model: Path, config: BenchmarkConfig, processes: int, *, shared: bool):
        self.name = f"transformers × {processes}"
        self.batch_size, self.shared = config.batch_size, shared
        arguments = {"model": str(model), "dtype": config.dtype, "batch_size": config.batch_size}
        starts = [Start("hf", arguments, environment, room=2) for environment in _environments(processes)]
        self.workers = Workers(
            starts, way_out="set benchmark.processes=1 to see more, or a smaller benchmark.batch_size"
        )
        self.run, self.close = self.workers.run, self.workers.close

    def plan(self, requests: Sequence[Any]) -> list[list[int]]:
        return hf_engine.plan(requests, self.batch_size, shared=self.shared)


class _VLLM:
    """An `Engine`: vLLM, an engine per GPU, or one over all of them where the model does not fit into one."""

    name = "vLLM"

    def __init__(self, model: Path, config: BenchmarkConfig, *, length: int, stop: list[int]):
        self.model, self.config, self.length, self.stop = model, config, length, stop
        self.longest, self.workers = 0, None

    def plan(self, requests: Sequence[Any]) -> list[list[int]]:
        """One at a time, but answers to one question side by side: the engine keeps what it computed of a question."""
        if not isinstance(requests[0], Pair):
            return [[place] for place in sorted(range(len(requests)), key=lambda p: -len(requests[p].tokens))]
        questions = hf_engine.group(requests, shared=True)
        return [[place for place, _ in question.continuations] for question in sorted(questions, key=len, reverse=True)]

    def run(self, batches: Sequence[Sequence[Any]]) -> Iterator[tuple[int, list[Any]]]:
        longest = max(request.longest for batch in batches for request in batch)
        if self.workers is None or longest > self.longest:
            self.close()
            self.longest = max(longest, min(VLLM_LENGTH, self.length + 1))
            self.workers = self._start()
        return self.workers.run(batches)

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()

    def _start(self) -> Workers:
        import torch

        gpus = torch.cuda.device_count()
        fits = gpus == 0 or _weight_bytes(self.model) < 0.7 * torch.cuda.get_device_properties(0).total_memory
        engines = max(gpus, 1) if fits else 1
        arguments = {"model": str(self.model), "dtype": self.config.dtype, "stop": self.stop}
        arguments |= {"longest": self.longest, "gpus": gpus // engines}
        environments = _environments(engines) if fits else [{}]
        starts = [Start("vllm", arguments, ENVIRONMENT | LONGER | own, room=VLLM_ROOM) for own in environments]
        return Workers(starts, way_out=f"if vLLM cannot run this model, {HF}")


def _environments(count: int) -> list[dict[str, str]]:
    """Of processes beside each other: GPUs in turn, else the cores in equal parts."""
    import torch

    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")
        return [{"CUDA_VISIBLE_DEVICES": names[number % gpus]} for number in range(count)]
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]


def _weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
