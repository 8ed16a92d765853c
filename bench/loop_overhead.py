"""What the trainer's loop costs beside the mathematics: its step against a bare forward, backward, clip and step.

python bench/loop_overhead.py [--rounds 9] [--method control|full] [--threads 1] [--hidden 512 ...]

Both sides train the same model object on the same packed batches with the same loss, in turn, one step each. Ours is
all that `train` does between two checkpoints: reading and collating rows, counting, guards, the watchdog's threads,
FLOPs, alphas, metrics to a file and the progress line, every step. Bare has its batches made beforehand and looks at
nothing. Medians over the rounds, of CPU time of all the process's threads and of wall time (bar: 1.03).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_training import NEVER, RandomRows, add_sizes, random_model, trainer_of

from controlllm.config import Method, ModelConfig, TrainConfig
from controlllm.train.distributed import World
from controlllm.train.native import Trainer
from controlllm.train.precision import autocast

METHODS = {"control": Method.model_validate({"control": {"num_expanded": 2}}), "full": Method()}
WARM = 2


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = TrainConfig.model_validate(
        {"steps": WARM + options.rounds, "global_batch_size": 1, "precision": options.precision, "checkpoint": NEVER}
    )
    method = METHODS[options.method]
    model = random_model(options, ModelConfig(name="random"), method, torch.device("cpu"))
    rows = RandomRows(WARM + options.rounds, options.tokens, vocabulary=options.vocabulary, document=200)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, rows.mix(), config, method, world=World(), folder=Path(folder))
        trained = sum(p.numel() for p in trainer.trained) / 1e6
        total = sum(p.numel() for p in model.parameters()) / 1e6
        times = measure(trainer, options.rounds)
    print(f"{total:.1f} M parameters, {trained:.1f} M trained ({options.method}), {options.tokens} tokens a step, "
          f"{options.precision}, {options.threads} threads, {options.rounds} rounds")  # fmt: skip
    for clock in ("CPU", "wall"):
        report(clock, times["ours"][clock], times["bare"][clock])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocabulary=8192, tokens=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--method", choices=METHODS, default="control")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def measure(trainer: Trainer, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by side and clock. As many steps of the trainer as there are rounds, after a few that are not counted."""
    optimizer = torch.optim.AdamW(trainer.trained, lr=1e-5, fused=True)
    times: dict[str, dict[str, list[float]]] = {side: {"CPU": [], "wall": []} for side in ("ours", "bare")}
    with trainer._surroundings(None) as show:
        for number in range(WARM + rounds):
            (batch,) = trainer.share.of(trainer.step)
            given, counts = batch.arguments(), {"targets": batch.targets, "tokens": batch.tokens}

            def ours() -> None:
                record, _ = trainer.train_step()
                show(record)

            def bare(given: dict[str, Any] = given, counts: dict[str, int] = counts) -> None:
                bare_step(trainer, optimizer, given, **counts)

            sides = {"ours": ours, "bare": bare}
            for side in sorted(sides, reverse=number % 2 == 1):
                cpu, wall = clocked(sides[side])
                if number >= WARM:
                    times[side]["CPU"].append(cpu)
                    times[side]["wall"].append(wall)
    return times


def bare_step(trainer: Trainer, optimizer: Any, given: dict[str, Any], *, targets: int, tokens: int) -> None:
    with autocast(trainer.config, trainer.world.device):
        out = trainer.model(**given, num_items_in_batch=targets, num_tokens_in_batch=tokens)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clocked(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the process's CPU time, and of the wall's clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def report(clock: str, ours: list[float], bare: list[float]) -> None:
    each = [a / b for a, b in zip(ours, bare, strict=True)]
    a, b = statistics.median(ours), statistics.median(bare)
    print(f"{clock}: bare {b:.3f} s, trainer {a:.3f} s a step: ratio {a / b:.3f} (by round: median "
          f"{statistics.median(each):.3f}, {min(each):.3f} to {max(each):.3f}; bar 1.03)")  # fmt: skip


if __name__ == "__main__":
    main()
