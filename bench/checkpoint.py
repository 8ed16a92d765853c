"""Checkpoints against their bars: what a save holds up, what verifying costs, and how large they are.

python bench/checkpoint.py [--megabytes 240] [--rounds 5] [--folder DIR]

stall: a save in the background, until training goes on / the same save waited for (bar 0.15).
verify: size and hash of every file, read back from the page cache / that save, fsync included (bar 0.05).
size: the files of a checkpoint with E = 8 of 32 blocks / those of one with everything trained, each with AdamW's state
(bar 0.25). A Llama with Llama-3-8B's proportions, scaled down: 32 blocks, vocabulary 31.3 × hidden, untied head.
Medians over the rounds; the folder's disk decides the first two, so they are measured where checkpoints are to lie.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from controlllm.config import CheckpointConfig, ControlConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.train.checkpoint import Checkpoints
from controlllm.train.checkpoint_files import LocalStore, verify
from controlllm.train.distributed import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=240, help="of trained weights, float32; AdamW adds twice that")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary folder when left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        times(Path(name) / "times", options.megabytes, options.rounds)
        sizes(Path(name))


def times(folder: Path, megabytes: int, rounds: int) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(round(megabytes / 4.194304))))
    optimizer = stepped(model)
    store = checkpoints(folder)
    store.save(model, optimizer, {"step": 0}, wait=True)  # makes the buffers
    stalls, saves, checks = [], [], []
    for step in range(1, rounds + 1):
        saves.append(seconds(lambda step=step: store.save(model, optimizer, {"step": 2 * step}, wait=True)))
        stalls.append(seconds(lambda step=step: store.save(model, optimizer, {"step": 2 * step + 1})))
        store.wait()
        local = LocalStore(folder)
        checks.append(seconds(lambda step=step, local=local: whole(local, 2 * step + 1)))
    save, stall, check = (statistics.median(found) for found in (saves, stalls, checks))
    print(
        f"{megabytes} MB trained, {sum(f.stat().st_size for f in folder.rglob('*.safetensors')) / 1e6:,.0f} MB on disk"
    )
    print(f"save {save:.3f} s ({min(saves):.3f} to {max(saves):.3f})")
    print(f"stall {stall:.3f} s / save = {stall / save:.3f} (bar 0.15)")
    print(f"verify {check:.3f} s / save = {check / save:.3f} (bar 0.05)")


def sizes(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 128  # Llama-3-8B: 4096, 14336, 128256, 32 heads, 8 of keys and values
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, vocab_size=hidden * 128256 // 4096,
        num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    settings = ControlSettings.resolve(ControlConfig(num_expanded=8), num_layers=32)
    ours = bytes_of(folder / "ours", expand_model(LlamaForCausalLM(config), settings))
    full = bytes_of(folder / "full", LlamaForCausalLM(config))
    print(f"size E = 8 of 32: {ours / 1e6:.1f} MB / full {full / 1e6:.1f} MB = {ours / full:.3f} (bar 0.25)")


def bytes_of(folder: Path, model: nn.Module) -> int:
    checkpoints(folder).save(model, stepped(model), {"step": 1}, wait=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep=1), world=World(), identity={})


def whole(store: LocalStore, step: int) -> None:
    verify(store.place(step), store.manifest(step))


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
