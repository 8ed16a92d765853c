"""Predicted against measured peak memory of a training step, on the CPU: what tensors take, by torch's own accounting.

python bench/memory.py [--cases control fsdp] [--hidden 512] [--tokens 1024] [--list]

Each case trains a random model for three steps in processes of its own. Measured is the third step: every allocation
and release of torch's CPU allocator (torch.profiler), from before the model is made. resting: weights, optimizer state
and DDP's buckets; kept: what the forward pass leaves for the backward pass; peak: the most at any moment. The resident
set, a second opinion, counts the whole process. The loss's chunks of the CPU are the GPU's.
"""

import argparse
import json
import resource
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from launch import in_processes

from controlllm.config import RunConfig
from controlllm.model_shape import Decoder, Shape
from controlllm.step_memory import Step

MIB = 1 << 20
FOUR = {"num_expanded": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "partial": {"partial": {"num_blocks": 4, "blocks": "top"}},
    "control": {"control": FOUR},
    "control-top": {"control": FOUR | {"sites": "top"}},
    "stack": {"control": FOUR | {"layout": "stack"}},
    "slerp": {"control": FOUR | {"interpolation": "slerp", "divergence": "cosine"}},
    "lora": {"lora": {"rank": 16}},
}
KINDS = ("nf4", "int8", "int8_torchao", "float8")
for _method, _kind in product(("control", "lora"), KINDS):
    METHODS[f"{_method}-{_kind}"] = METHODS[_method] | {"quantization": {"kind": _kind}}
# (stored, computed, how blocks are checkpointed)
NUMBERS = {"float32": ("float32", "float32"), "mixed": ("float32", "bf16"), "bf16": ("bfloat16", "bf16")}


def cases() -> dict[str, dict[str, Any]]:
    """Name → config beside model, data and sizes; the number of processes is in its name (-x2)."""
    found: dict[str, dict[str, Any]] = {}

    def add(method: str, numbers: str, *, processes: int = 1, note: str = "", **train: Any) -> None:
        dtype, precision = NUMBERS[numbers]
        name = "-".join(part for part in (method, numbers, note, f"x{processes}") if part)
        found[name] = METHODS[method] | {"model": {"dtype": dtype}, "train": {"precision": precision, **train}}

    for method, numbers in product(("full", "partial", "control", "control-top", "lora"), NUMBERS):
        add(method, numbers)
    for method, mode in product(("full", "control", "lora"), ("selective", "full")):
        add(method, "bf16", note=mode, activation_checkpointing=mode)
    for method, kind in product(("control", "lora"), KINDS):
        add(f"{method}-{kind}", "bf16")
    add("stack", "bf16")
    add("slerp", "bf16")
    add("control", "bf16", note="accumulated", global_batch_size=2)
    add("control", "bf16", note="kahan", precision="bf16_kahan")
    for method, accumulated in product(("full", "control"), (1, 2)):
        more = {"processes": 2, "global_batch_size": 2 * accumulated}
        note = "accumulated-" if accumulated > 1 else ""
        add(method, "bf16", note=f"{note}ddp", **more)
        for frozen in ("shard", "replicate")[: 1 if method == "full" else 2]:
            parallel = {"kind": "fsdp", "frozen": frozen}
            add(method, "bf16", note=f"{note}fsdp-{frozen}", parallel=parallel, **more)
    add("control", "bf16", processes=2, note="fsdp-kept", global_batch_size=2,
        parallel={"kind": "fsdp", "reshard_after_forward": False})  # fmt: skip
    add("control", "bf16", processes=2, note="fsdp-full", global_batch_size=2, activation_checkpointing="full",
        parallel={"kind": "fsdp"})  # fmt: skip
    return found


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    chosen = [name for name in cases() if all(part in name for part in options.cases)]
    if not chosen:
        raise SystemExit(f"no case has {' and '.join(options.cases)} in its name; --list shows all")
    if options.list:
        print("\n".join(chosen))
        return
    print(f"{options.layers} layers of {options.hidden} and {options.intermediate}, vocabulary {options.vocabulary}, "
          f"{options.tokens} tokens; MiB, predicted / measured")  # fmt: skip
    print(f"{'case':38} {'resting':>16} {'kept':>16} {'peak':>16} {'ratio':>6} {'resident':>9}  at")
    ratios = {}
    for name in chosen:
        measured, predicted = in_processes(processes_of(name), "--child", name)[0], prediction(name, options)
        ratios[name] = predicted["peak"] / measured["peak"]
        columns = " ".join(f"{predicted[k] / MIB:7.0f} /{measured[k] / MIB:7.0f}" for k in ("resting", "kept", "peak"))
        resident = measured["resident"] / MIB
        print(f"{name:38} {columns} {ratios[name]:6.3f} {resident:9.0f}  {predicted['moment']}", flush=True)
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    print(f"worst ratio {ratios[worst]:.3f} ({worst}); {len(ratios)} cases between {min(ratios.values()):.3f} and "
          f"{max(ratios.values()):.3f}")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocabulary": 8192}
    for name, size in (sizes | {"tokens": 1024}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"default {size}")
    parser.add_argument("--cases", nargs="*", default=[], help="only cases whose name has all of these in it")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_config(name: str, options: argparse.Namespace) -> RunConfig:
    case = cases()[name]
    return RunConfig.model_validate(
        {k: v for k, v in case.items() if k not in ("model", "train")}
        | {"name": "bench", "mix": {"datasets": [{"name": "puzzles"}]}, "pack": {"context_length": options.tokens}}
        | {"model": {"name": "random"} | case["model"], "train": {"global_batch_size": 1} | case["train"]}
    )


def prediction(name: str, options: argparse.Namespace) -> dict[str, Any]:
    decoder = Decoder(
        options.hidden, options.intermediate, options.heads, options.kv_heads, options.hidden // options.heads,
        options.vocabulary, tied=False,
    )  # fmt: skip
    shape = Shape(options.layers, options.tokens, Path("random"), 0, decoder)
    step = Step(shape, run_config(name, options), processes=processes_of(name), device="cpu")
    moments = list(step.moments())
    largest = max(moments, key=lambda parts: parts.total)
    kept = next(parts for parts in moments if parts.moment == "start of the backward pass").bytes
    buckets = step.trained * step.numbers.trained if step.ddp else 0
    before = buckets + sum(kept.get(part, 0) for part in ("frozen weights", "trained weights", "optimizer state"))
    return {"resting": before, "kept": sum(kept.values()) - before, "peak": largest.total, "moment": largest.moment}


def processes_of(name: str) -> int:
    return int(name.rpartition("-x")[2])


def child(options: argparse.Namespace) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from controlllm.train.distributed import processes

    torch.manual_seed(0)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with processes(timeout_seconds=300) as world:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            train(run_config(options.child, options), options, world)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        print(json.dumps(timeline(record) | {"resident": grown * 1024}))


def train(config: RunConfig, options: argparse.Namespace, world: Any, *, steps: int = 3) -> None:
    """The trainer's step with its own parts, and marks in the profile."""
    import torch
    from torch.profiler import record_function
    from transformers import LlamaConfig, LlamaForCausalLM

    from controlllm.train import attention
    from controlllm.train.model import load_model, prepare, storage_dtype
    from controlllm.train.optim import make_optimizer
    from controlllm.train.parallel import parallelize
    from controlllm.train.precision import autocast

    attention.register()
    sizes = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        max_position_embeddings=options.tokens,
        attn_implementation="packed",  # type: ignore[call-arg] - of every config, and declared by none
    )  # fmt: skip
    torch.set_default_dtype(storage_dtype(config.model, config.method))
    model: Any = LlamaForCausalLM(sizes)
    torch.set_default_dtype(torch.float32)
    if config.quantization:  # quantised as it is read
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = load_model(Path(folder), config.model, config.method)
    else:
        model = prepare(model, config.method, seed=0)
    parallel = parallelize(model, world, config.train)
    optimizer = make_optimizer(model, config.train)
    ids = torch.randint(0, options.vocabulary, (1, options.tokens))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(options.tokens)[None]}
    batch |= {"cu_seq_lens_q": torch.tensor([0, options.tokens], dtype=torch.int32)}
    micro_batches = config.train.global_batch_size // world.size
    for _ in range(steps):
        with record_function("@start"):
            pass
        for number in range(micro_batches):
            with parallel.synchronised(number == micro_batches - 1):
                with autocast(config.train, world.device):
                    out = parallel(**batch, num_items_in_batch=options.tokens, num_tokens_in_batch=options.tokens)
                loss = out.loss
                del out
                with record_function("@kept"):
                    pass
                loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def timeline(record: Any) -> dict[str, int]:
    """Bytes at the beginning of the last step, kept at the end of its last forward pass, and the most within it."""
    events = []
    for event in record.profiler.kineto_results.events():
        if (name := event.name()) == "[memory]":
            events.append((event.start_ns(), event.nbytes(), ""))
        elif name.startswith("@"):
            events.append((event.start_ns(), 0, name))
    live = resting = kept = peak = 0
    for _, change, mark in sorted(events, key=lambda event: event[0]):
        live += change
        if mark == "@start":
            resting = peak = live
        if mark == "@kept":
            kept = live - resting
        peak = max(peak, live)
    return {"resting": resting, "kept": kept, "peak": peak}


if __name__ == "__main__":
    main()
