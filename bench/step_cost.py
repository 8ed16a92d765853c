"""A training step of Control LLM against full and partial fine-tuning of the same base: time, FLOPs and peak memory.

python bench/step_cost.py [--num-expanded 2 4 8] [--precision bf16] [--profile] [--batched-twins]

FLOPs are those of controlllm/control/cost.py: forward and backward without elementwise work, so without the optimizer.
Times are given of the whole step and without the optimizer. All variants live in one process and take turns; each one's
fastest turn counts. Memory is the peak of a process of its own per variant, above what it held before the model.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from controlllm.config import ControlConfig, TrainConfig
from controlllm.control.cost import StepFlops, config_flops, control_step, full_step, partial_step
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.train.optim import make_optimizer

MEBIBYTE = 1 << 20 if sys.platform == "darwin" else 1 << 10
"""In the unit of ru_maxrss."""


class Variant(NamedTuple):
    """What is trained: everything (full), the blocks at the sites (partial), or their twins (control)."""

    method: str
    sites: tuple[int, ...] = ()


class Turn(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float
    optimizer: float


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    if options.child:
        method, *sites = options.child.split(",")
        print(peak_memory(Variant(method, tuple(map(int, sites))), options))
        return
    variants = chosen(options)
    size = f"{options.layers} layers of {options.hidden} and {options.intermediate}"
    print(f"{size}, {options.batch} × {options.seq} tokens")
    print(f"{options.precision}, divergence {options.divergence}, {torch.get_num_threads()} threads")
    # Before this process grows: a child's ru_maxrss starts at what its parent held.
    memory = {name: in_child(variant) for name, variant in variants.items()}
    turns = take_turns({name: Step(variant, options) for name, variant in variants.items()}, options.rounds)
    report(variants, turns, memory, options)
    if options.profile:
        for name, variant in variants.items():
            profile(name, Step(variant, options))
    if options.batched_twins:
        batched_twins(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 16, "hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocabulary": 512}
    for name, size in (sizes | {"batch": 2, "seq": 512, "rounds": 7}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"default {size}")
    parser.add_argument("--num-expanded", type=int, nargs="+", default=[4], help="numbers of sites; default 4")
    parser.add_argument("--divergence", default="mse", choices=["none", "mse", "cosine", "dot"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"], help="bf16: autocast")
    parser.add_argument("--batched-twins", action="store_true", help="one bmm for block and twin against two products")
    parser.add_argument("--profile", action="store_true", help="the ten operators that take longest, by variant")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> dict[str, Variant]:
    variants = {"full": Variant("full")}
    for count in options.num_expanded:
        for placement in ("evenly", "top"):
            control = ControlConfig(num_expanded=count, sites=placement)
            sites = tuple(ControlSettings.resolve(control, num_layers=options.layers).sites)
            variants[f"partial {count} {placement}"] = Variant("partial", sites)
            variants[f"control {count} {placement}"] = Variant("control", sites)
    return variants


def settings(variant: Variant, options: argparse.Namespace) -> ControlSettings:
    return ControlSettings(sites=list(variant.sites), divergence=options.divergence)


def base_config(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        max_position_embeddings=options.seq, use_cache=False,
    )  # fmt: skip


class Step:
    """A training step of one variant, as the trainer takes it."""

    def __init__(self, variant: Variant, options: argparse.Namespace):
        self.model: Any = LlamaForCausalLM(base_config(options)).train()
        if variant.method == "control":
            self.model = expand_model(self.model, settings(variant, options))
        if variant.method == "partial":
            self.model.requires_grad_(False)
            for site in variant.sites:
                self.model.model.layers[site].requires_grad_(True)
        self.optimizer = make_optimizer(self.model, TrainConfig())
        self.ids: Tensor = torch.randint(0, options.vocabulary, (options.batch, options.seq))
        self.precision: str = options.precision

    def __call__(self) -> Turn:
        began = time.perf_counter()
        with self.autocast():
            loss = forward_with_loss(self.model, self.ids, labels=self.ids).loss
        forward = time.perf_counter()
        assert loss is not None
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Turn(forward - began, backward - forward, time.perf_counter() - backward)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, Turn]:
    """The fastest forward, backward and optimizer of each, over rounds in changing order."""
    turns: dict[str, list[Turn]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turn = steps[name]()
            if number:  # the first makes the optimizer's state
                turns[name].append(turn)
    return {name: Turn(*map(min, zip(*taken, strict=True))) for name, taken in turns.items()}


def peak_memory(variant: Variant, options: argparse.Namespace) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(variant, options)
    for _ in range(2):  # the first makes the optimizer's state
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def in_child(variant: Variant) -> int:
    """Peak memory in a process of its own, whose allocator gives back at once what is freed."""
    child = ",".join([variant.method, *map(str, variant.sites)])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, "--child", child]
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603


def report(variants: dict[str, Variant], turns: dict[str, Turn], memory: dict[str, int], options: Any) -> None:
    full, full_flops = turns["full"], flops(variants["full"], options).total
    print(f"full fine-tuning: forward {full.forward:.2f} s, backward {full.backward:.2f} s, "
          f"optimizer {full.optimizer:.2f} s, {full_flops / (full.forward + full.backward) / 1e9:.0f} GFLOP/s, "
          f"{memory['full'] / MEBIBYTE:.0f} MiB")  # fmt: skip
    print(f"{'ratios to full':20} {'FLOPs':>7} {'step':>7} {'/FLOPs':>7} {'no opt.':>8} {'/FLOPs':>7} "
          f"{'memory':>7} {'to partial':>10}")  # fmt: skip
    for name, variant in variants.items():
        ratio = flops(variant, options).total / full_flops
        whole = sum(turns[name]) / sum(full)
        passes = sum(turns[name][:2]) / sum(full[:2])
        partial = memory.get(name.replace("control", "partial"), memory[name])
        print(f"{name:20} {ratio:7.3f} {whole:7.3f} {whole / ratio:7.3f} {passes:8.3f} {passes / ratio:7.3f} "
              f"{memory[name] / memory['full']:7.3f} {memory[name] / partial:10.3f}")  # fmt: skip


def flops(variant: Variant, options: argparse.Namespace) -> StepFlops:
    tokens = options.batch * options.seq
    base = config_flops(base_config(options), seq=options.seq, tokens=tokens, targets=tokens - options.batch)
    if variant.method == "full":
        return full_step(base)
    if variant.method == "partial":
        return partial_step(base, variant.sites)
    return control_step(base, settings(variant, options))


def profile(name: str, step: Step) -> None:
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        step()
    print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=10)}")


class Stacked(torch.autograd.Function):
    """inputs (2, tokens, n) of block and twin, weights (2, m, n), of which the second is trained."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weights)
        return torch.bmm(inputs, weights.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        inputs, weights = ctx.saved_tensors
        return torch.bmm(gradient, weights), None, gradient[1].mT @ inputs[1]


def batched_twins(options: argparse.Namespace, rounds: int = 30) -> None:
    """One bmm for a block and its twin at its best, inputs and weights stacked already, against two products."""
    tokens, hidden, inner = options.batch * options.seq, options.hidden, options.intermediate
    qkv = hidden + 2 * hidden * options.kv_heads // options.heads
    print(f"one bmm / two products, {tokens} tokens, forward and backward")
    shapes = {"qkv": (hidden, qkv), "o": (hidden, hidden), "gate, up": (hidden, 2 * inner), "down": (inner, hidden)}
    for name, (n, m) in shapes.items():
        one, two = products(tokens, n, m, torch.bfloat16 if options.precision == "bf16" else torch.float32)
        seconds = [(timed(one), timed(two)) for _ in range(rounds)]
        fastest, slower = map(min, zip(*seconds, strict=True))
        print(f"{name:20} {fastest / slower:7.3f}")


def products(tokens: int, n: int, m: int, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], None]]:
    inputs, gradient = (torch.randn(2, tokens, size, dtype=dtype) for size in (n, m))
    weights = torch.randn(2, m, n, dtype=dtype)
    trained = weights[1].requires_grad_()
    together, alone = inputs.requires_grad_(), [part.detach().requires_grad_() for part in inputs]

    def one() -> None:
        Stacked.apply(together, weights, trained).backward(gradient)  # type: ignore[union-attr]

    def two() -> None:
        torch.autograd.backward([alone[0] @ weights[0].mT, alone[1] @ trained.mT], list(gradient))

    return one, two


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
