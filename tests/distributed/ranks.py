"""Several real processes over gloo in one test: `run(function, size, *args)` gives each rank's result."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

from ports import free_ports

PRELOADED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "controlllm.train.fit",
    "controlllm.train.hf",
    "peft",
    "deepspeed",
    "rouge_score.rouge_scorer",
    "sacrebleu.metrics.bleu",
]


def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = 600) -> list[Any]:
    """`function(world, *args)` in `size` new processes; RuntimeError with the traceback of the first that failed.

    The function must belong to a module; arguments and results must be picklable (tensors travel as files' bytes:
    return plain numbers, or save them).
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    (port,) = free_ports(1)
    workers = [
        context.Process(target=_work, args=(function, rank, size, port, pipes[rank][1], args), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for _, sender in pipes:
        sender.close()
    try:
        answers = [_receive(receiver, rank, timeout) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    for rank, (ok, value) in enumerate(answers):
        if not ok:
            raise RuntimeError(f"rank {rank} of {size}:\n{value}")
    return [value for _, value in answers]


def _receive(receiver: Any, rank: int, timeout: float) -> tuple[bool, Any]:
    if not receiver.poll(timeout):
        return False, f"rank {rank} has not answered in {timeout} s"
    try:
        return receiver.recv()
    except EOFError:
        return False, "the process is gone"


def _work(function: Callable[..., Any], rank: int, size: int, port: int, sender: Any, args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from controlllm.train.distributed import World

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    try:
        if size > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        sender.send((True, function(World(rank, size, rank), *args)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()
