"""Checkpoints of what is trained: a folder is written under another name, hashed, synced and renamed.

Only complete folders have a manifest, every file is verified before it is read, and the newest that verifies is used.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlllm.control.schedule import scheduled_names
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file, sync
from controlllm.progress import console

MANIFEST = "manifest.json"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by parameter name; tied parameters once."""
    moved = set(scheduled_names(model))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name in moved}


def save_checkpoint(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Write `root/step-00000123`, then remove all but the `keep` newest."""
    final = root / f"step-{step:08d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.contiguous().cpu() for k, v in trained_tensors(model).items()}, partial / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
    files = {file.name: hash_file(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    for file in [*partial.iterdir(), partial]:
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(root)
    for old in checkpoints(root)[:-keep]:
        _remove(old)
    return final


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files are what the manifest says; damaged ones are named and passed over."""
    for folder in reversed(checkpoints(root)):
        if (problem := _problem(folder)) is None:
            return folder
        console.print(f"[yellow]![/] {folder} is passed over: {problem}")
    return None


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(root.glob("step-*")) if root.is_dir() else []


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what is trained and the optimizer's state; returns the number of steps done."""
    load_trained(folder / "model.safetensors", model)
    _load_optimizer(load_file(folder / "optimizer.safetensors"), model, optimizer)
    return json.loads((folder / MANIFEST).read_text())["step"]


def load_trained(file: Path, model: nn.Module) -> None:
    """Copy trained tensors into a model that is frozen the same way; names and shapes must agree exactly."""
    try:
        saved = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    wanted = trained_tensors(model)
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        where = "is missing in the file" if odd in wanted else "is not trained in this model"
        raise UserError(f"{file}: is of another run: tensor '{odd}' {where}")
    for name, tensor in saved.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{file}: tensor '{name}' has shape {list(tensor.shape)}, expected {list(wanted[name].shape)}"
            )
        wanted[name].copy_(tensor)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state
    return {
        f"{name}:{key}": value.contiguous().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in state.get(parameter, {}).items()
    }


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition(":")
        by_name.setdefault(name, {})[field] = value
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in by_name:
            # The step count of a fused optimizer lives with the parameter.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in by_name[name].items()}


def _problem(folder: Path) -> str | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if hash_file(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _remove(folder: Path) -> None:
    """Renamed first, so that a half-removed folder never looks like a checkpoint."""
    gone = folder.with_name(f".{folder.name}.removed")
    folder.rename(gone)
    shutil.rmtree(gone)
