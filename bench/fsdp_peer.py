"""FSDP2 over two processes (gloo): this trainer against transformers' Trainer with accelerate's FSDP2, side by side.

python bench/fsdp_peer.py [--cases full-float32 control-bf16 ...] [--rounds 3] [--steps 6] [--hidden 512 ...]

Both load the same base, train the same parameters in float32 masters, see the same rows (one document each, all of it
learned) in the same order, log every step, and lose the same. A round runs each side once, in processes of its own
that run alone, the order changing. Speed: tokens/s from the end of one step to the end of the next, median of the
steps after the first two. Memory: the resident set's peak of a process over these steps, and from its start.

In bf16 the Trainer sums gradients in bfloat16, ours in float32: half its traffic, and 0.4 % of rounding in each sum.
--reduce float32 (the default) lets it sum as ours does, --reduce bfloat16 leaves it as it comes.

accelerate shards only when it sees GPUs: on a CPU fsdp_version 2 silently becomes DDP. `sharded` is that Trainer told
that it has several GPUs, upon which it runs its own FSDP2 on the CPU; `as it comes` (--as-it-comes) is DDP.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from launch import in_processes, peak_resident, reset_peak
from random_training import NEVER, RandomRows, add_sizes, llama_config, stored_model, trainer_of

from controlllm.config import Method, ModelConfig, TrainConfig

METHODS = {"full": Method(), "control": Method.model_validate({"control": {"num_expanded": 2}})}
CASES = [f"{method}-{precision}" for method in METHODS for precision in ("float32", "bf16")]
PROCESSES, WARM, LR = 2, 2, 1e-4
MEASURED = ("seconds", "cpu", "peak", "grown", "peak_of_all")


def main() -> None:
    options = parse()
    if options.child:
        side, case = options.child
        print(json.dumps(SIDES[side](case, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base = Path(folder) / "base"
        parameters = save_base(base, options)
        print("the Trainer as it comes" if options.as_it_comes else f"in bf16 the Trainer sums in {options.reduce}")
        print(
            f"{parameters / 1e6:.0f} M parameters, {options.layers} layers of {options.hidden}; {PROCESSES} processes "
            f"with {options.tokens} tokens a step each, {options.steps} steps, {options.rounds} rounds",
            flush=True,
        )
        for case in options.cases:
            compare(case, base, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, layers=8, hidden=768, intermediate=2048, heads=12, kv_heads=4, vocabulary=16384, tokens=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help=f"that count, after {WARM} that do not")
    parser.add_argument("--as-it-comes", action="store_true", help="leave the Trainer as it comes on a CPU: DDP")
    parser.add_argument("--reduce", choices=["float32", "bfloat16"], default="float32", help="of the Trainer, in bf16")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def save_base(folder: Path, options: argparse.Namespace) -> int:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(options))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def compare(case: str, base: Path, options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in sorted(SIDES, reverse=number % 2 == 1):
            ranks = in_processes(PROCESSES, "--base", str(base), "--child", side, case)
            worst = {key: max(rank[key] for rank in ranks) for key in MEASURED}
            found[side].append(ranks[0] | worst)
    apart = max(abs(a - b) for a, b in zip(*(found[side][0]["losses"] for side in SIDES), strict=True))
    print(f"\n{case}: losses of {WARM + options.steps} steps differ by at most {apart:.1e}")
    for side, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in MEASURED}
        megabytes = {key: f"{middle[key] / 1e6:,.0f} MB" for key in ("peak", "grown", "peak_of_all")}
        print(f"{side} ({runs[0]['way']}): {PROCESSES * options.tokens / middle['seconds']:,.0f} tokens/s, CPU time "
              f"{middle['cpu']:.2f} s a step and process; resident peak of the steps {megabytes['peak']}, "
              f"{megabytes['grown']} above the libraries; of all the run {megabytes['peak_of_all']}")  # fmt: skip
    pairs = list(zip(found["ours"], found["peer"], strict=True))
    ratio = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in MEASURED}
    speeds = [b["seconds"] / a["seconds"] for a, b in pairs]
    print(f"ratio {case}: tokens/s {statistics.median(speeds):.3f} ({min(speeds):.3f} to {max(speeds):.3f}; bar 1.0), "
          f"CPU time {ratio['cpu']:.3f}; peak {ratio['peak']:.3f} (bar below 1), above the libraries "
          f"{ratio['grown']:.3f}, of all the run {ratio['peak_of_all']:.3f}", flush=True)  # fmt: skip


class Stamps:
    """The ends of steps, and the memory's peaks above what the process holds now: before the base is loaded."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.libraries = peak_resident()
        self.before = 0

    def mark(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))
        if len(self.ends) == WARM:
            self.before = peak_resident()
            reset_peak()

    def result(self, losses: list[float], way: str) -> dict[str, Any]:
        counted = self.ends[WARM - 1 :]
        wall, cpu = (statistics.median(b[k] - a[k] for a, b in pairwise(counted)) for k in (0, 1))
        peak = peak_resident()
        before = max(peak, self.before)
        return {"seconds": wall, "cpu": cpu, "peak": peak, "grown": peak - self.libraries, "peak_of_all": before,
                "losses": losses, "way": way}  # fmt: skip


def rows_of(options: argparse.Namespace) -> RandomRows:
    return RandomRows(PROCESSES * (WARM + options.steps), options.tokens, vocabulary=options.vocabulary)


def ours(case: str, options: argparse.Namespace) -> dict[str, Any]:
    # So that libraries are there when counting begins; the Trainer brings them by itself.
    import torch._dynamo  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from controlllm.train.distributed import processes

    name, precision = case.split("-")
    config = TrainConfig.model_validate({
        "steps": WARM + options.steps, "global_batch_size": PROCESSES, "precision": precision, "checkpoint": NEVER,
        "lr": LR, "parallel": {"kind": "fsdp"}, "schedule": {"kind": "constant"}, "optimizer": {"beta2": 0.999},
    })  # fmt: skip
    losses: list[float] = []
    with processes(timeout_seconds=300) as world, tempfile.TemporaryDirectory() as folder:
        stamps = Stamps()
        model, fill = stored_model(options.base, ModelConfig(name="random"), METHODS[name], world, config)
        trainer = trainer_of(
            model, rows_of(options).mix(), config, METHODS[name], world=world, folder=Path(folder), fill=fill
        )
        with trainer._surroundings(None) as show:
            while not trainer.finished:
                record, _ = trainer.train_step()
                show(record)
                stamps.mark()
                losses.append(record.loss)
        return stamps.result(losses, way_of(model))


def peer(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from controlllm.train.model import load_model

    name, precision = case.split("-")
    stamps = Stamps()

    class Mark(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.mark()

    sharding = {"version": 2, "reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=WARM + options.steps, per_device_train_batch_size=1, use_cpu=True,
            bf16=precision == "bf16", fsdp=True, fsdp_config=sharding, learning_rate=LR,  # type: ignore[arg-type]
            lr_scheduler_type="constant", optim="adamw_torch_fused", logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
        )  # fmt: skip
        assert dist.is_initialized() or arguments.world_size == PROCESSES
        if not options.as_it_comes:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        stamps.libraries = peak_resident()
        model = load_model(options.base, ModelConfig(name="random", attention="sdpa"), METHODS[name])
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows_of(options).rows]
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=batch_of, callbacks=[Mark()]  # type: ignore[arg-type]
        )  # fmt: skip
        plugin = trainer.accelerator.state.fsdp_plugin
        if precision == "bf16" and options.reduce == "float32" and plugin is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        answer = stamps.result(losses, way_of(trainer.model_wrapped))
    dist.destroy_process_group()
    return answer


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.from_numpy(row[name]) for row in rows]) for name in rows[0]}


def way_of(model: Any) -> str:
    from torch.distributed.fsdp import FSDPModule

    sharded = sum(isinstance(module, FSDPModule) for module in model.modules())
    return f"FSDP2 in {sharded} parts" if sharded else type(model).__name__


SIDES = {"ours": ours, "peer": peer}

if __name__ == "__main__":
    main()
