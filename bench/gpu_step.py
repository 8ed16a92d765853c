"""The trainer on one GPU: tokens/s, useful-FLOP utilisation (bar 45 %), peak memory against the prediction (bar 1.08).

python bench/gpu_step.py [--tokens 8192] [--experts 8] [--compile none|inductor] [--checkpointing auto] [--steps 8]
python bench/gpu_step.py --device cpu --layers 4 --hidden 256 --intermediate 704 --heads 4 --kv-heads 2 \
    --vocabulary 4096 --tokens 256 --experts 2          the same code, where there is no GPU

Llama-3-8B's shape with random weights, made on the device in bfloat16; E twins evenly (0 trains everything), bf16 with
float32 masters, packed documents, flash attention where it is installed (else each document by torch's own), Liger's
kernels where they are installed. Of the ways to checkpoint activations the first that is predicted to fit is taken; if
none does, layers are left out, E at a time. Useful FLOPs are train/flops.py's: no recomputation, no padding.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from launch import peak_resident, reset_peak
from random_training import NEVER, RandomRows, add_sizes, random_model, trainer_of

from controlllm.config import RunConfig
from controlllm.memory import predict
from controlllm.model_shape import Decoder, Shape
from controlllm.step_memory import CONTEXT, LIBRARIES, Device, Parts
from controlllm.train.attention import refuse_leaks
from controlllm.train.distributed import World
from controlllm.train.flops import peak_flops
from controlllm.train.native import Trainer
from controlllm.train.precision import autocast

WARM = 3
LLAMA3_8B = {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256}
ROOM = 0.95
"""Share of the device's memory that a prediction may take."""
PACKAGES = ("torch", "transformers", "flash-attn", "flash-attn-3", "liger-kernel", "triton")


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU here, so nothing is measured; --device cpu with small sizes runs the same code")
    config, predicted = fitting(options)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, options, Path(folder))
    result = facts(config, options) | found | judged(found, predicted, options.device)
    for name, value in result.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    if output := options.output or (options.device == "cuda" and Path(__file__).parent / "results" / "gpu_step.json"):
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, **LLAMA3_8B, tokens=8192)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--experts", type=int, default=8, help="E, default 8; 0 trains everything")
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document, about; default 1024")
    parser.add_argument("--rows", type=int, default=1, help="packed rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--checkpointing", choices=["auto", "none", "selective", "full"], default="auto")
    parser.add_argument("--compile", choices=["none", "inductor", "aot_eager"], default="none")
    parser.add_argument("--attention", default="auto", help="as model.attention")
    parser.add_argument("--steps", type=int, default=8, help=f"that count, after {WARM} that do not")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known")
    parser.add_argument("--output", type=Path, help="on a GPU bench/results/gpu_step.json when left out")
    return parser.parse_args()


def fitting(options: argparse.Namespace) -> tuple[RunConfig, Parts]:
    """The largest run of the asked one's kind that is predicted to fit; leaves its layers in `options`."""
    room = torch.cuda.mem_get_info()[1] * ROOM if options.device == "cuda" else float("inf")
    modes = ["none", "selective", "full"] if options.checkpointing == "auto" else [options.checkpointing]
    asked = options.layers
    for layers in range(asked, 0, -(options.experts or 1)):
        options.layers = layers
        for mode in modes:
            config = run_config(options, mode)
            predicted = predict(shape(options), config, device=options.device).device
            if predicted.total <= room:
                return config, predicted
    raise SystemExit(f"even {options.layers} layers are predicted to need more than {room / 1e9:.0f} GB")


def run_config(options: argparse.Namespace, mode: str) -> RunConfig:
    return RunConfig.model_validate({
        "name": "bench", "mix": {"datasets": [{"name": "random"}]}, "pack": {"context_length": options.tokens},
        "model": {"name": "random", "dtype": "bfloat16", "attention": attention_of(options)},
        "control": {"num_expanded": options.experts} if options.experts else None,
        "train": {
            "steps": WARM + options.steps, "global_batch_size": options.rows * options.accumulate,
            "micro_batch_size": options.rows, "precision": "bf16", "activation_checkpointing": mode,
            "compile": options.compile, "checkpoint": NEVER, "metrics": {"peak_tflops": options.peak_tflops},
        },
    })  # fmt: skip


def attention_of(options: argparse.Namespace) -> str:
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    if options.attention != "auto":
        return options.attention
    if options.device == "cuda" and is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if options.device == "cuda" and is_flash_attn_2_available() else "packed"


def shape(options: argparse.Namespace) -> Shape:
    decoder = Decoder(
        options.hidden, options.intermediate, options.heads, options.kv_heads, options.hidden // options.heads,
        options.vocabulary, tied=False,
    )  # fmt: skip
    return Shape(options.layers, options.tokens, Path("random"), 0, decoder)


def measure(config: RunConfig, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds, speed and memory of the steps after the first few, all that the trainer does in them included."""
    world = World()
    torch.manual_seed(0)
    model = random_model(options, config.model, config.method, world.device)
    count = config.train.global_batch_size * (WARM + options.steps)
    rows = RandomRows(count, options.tokens, vocabulary=options.vocabulary, document=options.document)
    trainer = trainer_of(model, rows.mix(), config.train, config.method, world=world, folder=folder)
    with autocast(config.train, world.device):
        refuse_leaks(
            trainer.parallel, attention=config.model.attention, vocabulary=options.vocabulary, device=world.device
        )
    ends, flops, losses = [], 0.0, []
    with trainer._surroundings(None) as show:
        for number in range(WARM + options.steps):
            if number == WARM:
                forget_peak(world.device)
            record, _ = trainer.train_step()
            show(record)
            losses.append(record.loss)
            synchronise(world.device)
            ends.append(time.perf_counter())
            flops = record.flops or 0.0
    seconds = [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
    middle, peak = statistics.median(seconds), peak_flops(world.device, config.train.precision, config.train.metrics)
    tokens = options.tokens * config.train.global_batch_size
    return {
        "seconds of a step": middle, "fastest": min(seconds), "slowest": max(seconds), "tokens/s": tokens / middle,
        "useful TFLOP of a step": flops / 1e12, "useful TFLOP/s": flops / middle / 1e12,
        "useful-FLOP utilisation (bar 0.45)": flops / middle / peak if peak else "the device's peak is not known",
        "first and last loss": [losses[0], losses[-1]], **peaks(world.device), **sizes(trainer),
    }  # fmt: skip


def forget_peak(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device) if device.type == "cuda" else reset_peak()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device) -> dict[str, float]:
    """GB: what tensors took on a GPU at most, and the allocator with what it kept for itself; else the resident set."""
    if device.type == "cpu":
        return {"peak GB": peak_resident() / 1e9}
    tensors, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak GB": tensors / 1e9, "reserved GB": reserved / 1e9}


def sizes(trainer: Trainer) -> dict[str, float]:
    everything = sum(p.numel() for p in trainer.model.parameters())
    return {"parameters, M": everything / 1e6, "trained, M": sum(p.numel() for p in trainer.trained) / 1e6}


def judged(found: dict[str, Any], predicted: Parts, device: Device) -> dict[str, Any]:
    """Without what is not in tensors: a GPU's context, the CPU's libraries (then only roughly)."""
    beside = CONTEXT[device] if device == "cuda" else -LIBRARIES[device]
    expected = (predicted.total - beside) / 1e9
    largest = {name: f"{size / 1e9:.2f}" for name, size in predicted.bytes.items()}
    return {
        "predicted GB": expected, "at": predicted.moment, "of": largest,
        "peak / predicted (bar 1.08)": found["peak GB"] / expected,
    }  # fmt: skip


def facts(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU: no figure of a GPU"
    train = config.train
    return {
        "device": name, **{size: getattr(options, size) for size in (*LLAMA3_8B, "tokens", "experts", "document")},
        "attention": config.model.attention, "checkpointing": train.activation_checkpointing,
        "compile": train.compile, "rows": train.micro_batch_size, "accumulated": options.accumulate,
        "packages": installed,
    }  # fmt: skip


if __name__ == "__main__":
    main()
