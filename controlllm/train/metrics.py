"""What is written down while training: `metrics.jsonl`, and from there the trackers. The file is the truth.

A line is the mean of a window of steps. All but the wall's facts (seconds, speed, memory) is a function of the steps
alone, so that a resumed run writes the lines that an uninterrupted one would have written.
"""

import json
import os
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from torch import nn

from controlllm.config import MetricsConfig
from controlllm.control.expand import control_blocks, settings_of
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.curves import History, RunFacts
from controlllm.train.distributed import World
from controlllm.train.trackers import Trackers
from controlllm.train.trained import whole

FILE = "metrics.jsonl"
MEANS = ("loss", "cross_entropy", "divergence", "grad_norm")
Row = dict[str, Any]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over the global batch."""

    step: int
    """From 1."""
    lr: float
    loss: float
    """Per target token, as are its parts."""
    cross_entropy: float
    divergence: float | None
    grad_norm: float
    """Before clipping."""
    tokens: int
    targets: int
    seconds: float
    data_seconds: float = 0.0
    """Of these, waiting for data."""
    flops: float | None = None
    """Useful ones, of all processes."""
    skipped: bool = False
    """Left out, because its loss or gradient was not finite."""


class Metrics:
    """The same calls on every process, because some figures are of all of them; only the main one writes.

    step: of the checkpoint that the run goes on from, 0 for a new run; state: what `state` gave for it. peak: FLOP/s of
    one device at most. UserError for a damaged file, and for a tracker that cannot be reached by a new run.
    """

    def __init__(
        self,
        folder: Path,
        config: MetricsConfig,
        *,
        world: World,
        run: RunFacts,
        model: nn.Module | None = None,
        peak: float | None = None,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        self.config, self.world, self.model, self.peak = config, world, model, peak
        state = state or {"window": _empty(), "tokens_seen": 0, "lines": 0}
        self.window, self.tokens_seen, self.lines = dict(state["window"]), state["tokens_seen"], state["lines"]
        self.memory = 0
        self.note = ""
        """Of the last step, for the progress bar."""
        self.file: TextIO | None = None
        self.trackers: Trackers | None = None
        if world.is_main:
            self._open(folder, run, step, carried=unpacked(state.get("written", "")))

    def step(self, record: StepRecord) -> None:
        """One optimizer step; every `config.every` steps, a line."""
        self.tokens_seen += record.tokens
        _add(self.window, record)
        self.memory = max(self.memory, _memory(self.world.device))
        self.note = self._noted(record)
        if record.step % self.config.every == 0:
            self._write_window()

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """A validation: one line at once."""
        self._write({"step": step, **values})

    def state(self) -> dict[str, Any]:
        """For the checkpoint of the last step: what the open window holds, and the lines, which a run that goes on in
        another place has not. What was written is on the disk then.
        """
        state = {"window": dict(self.window), "tokens_seen": self.tokens_seen, "lines": self.lines}
        if self.file and self.trackers:
            os.fsync(self.file.fileno())
            self.trackers.wait()
            state["written"] = packed(Path(self.file.name).read_bytes())
        return state

    def close(self, *, finished: bool = True) -> None:
        """Write the open window of a run that is finished; that of a stopped one waits in its checkpoint."""
        if finished and self.window["steps"]:
            self._write_window()
        if self.file and self.trackers:
            self.file.close()
            self.trackers.close()

    def _open(self, folder: Path, run: RunFacts, step: int, carried: str) -> None:
        file = folder / FILE
        here, there = _read(file) if step else [], _parsed(file, carried)
        found = max(here, there, key=len)
        written = max(file.read_bytes().count(b"\n") if file.exists() else 0, len(there))
        # A finished run has written its open window, too: that line is made again.
        closed = step - self.window["steps"]
        rows = [row for row in found if row["step"] <= (closed if "loss" in row else step)]
        if step and not rows:
            console.print(f"  {file}: no lines of the first {step} steps; goes on without them", style="yellow")
        fresh = file.with_name(f"{FILE}.new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(fresh, file)  # at no time are there fewer lines than the checkpoint stands for
        self.lines = max(self.lines, len(rows))
        first = self.lines - len(rows)
        self.file = file.open("a")
        history = History(rows, first=first, known=first + written, step=step)
        self.trackers = Trackers(self.config, folder, run, history)

    def _write_window(self) -> None:
        slowest = torch.tensor([self.window["data_seconds"], self.memory], dtype=torch.float64).to(self.world.device)
        data_seconds, memory = self.world.max(slowest).tolist()
        window = self.window
        row = {name: window[name] for name in ("step", "lr")} | {"seconds": round(window["seconds"], 4)}
        row |= {name: _mean(window, name) for name in MEANS}
        row |= {"tokens": window["tokens"], "targets": window["targets"], "tokens_seen": self.tokens_seen}
        row |= self._speed(window["seconds"]) | {"data_seconds": round(data_seconds, 4)}
        row["memory_gb"] = round(memory / 1e9, 3)
        if alpha := alphas(self.model) if self.model is not None else {}:
            row["alpha"] = alpha
        if window["skipped"]:
            row["skipped"] = window["skipped"]
        self.window = _empty()
        self._write(row)

    def _speed(self, seconds: float) -> Row:
        seconds = max(seconds, 1e-9)
        row: Row = {"tokens_per_second": round(self.window["tokens"] / seconds, 1)}
        if self.window["flops"]:
            each = self.window["flops"] / seconds / self.world.size
            row["tflops"] = float(f"{each / 1e12:.4g}")
            if self.peak:
                row["mfu"] = float(f"{each / self.peak:.4g}")
        return row

    def _write(self, row: Row) -> None:
        if self.file and self.trackers:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.trackers.log(self.lines, row)
        self.lines += 1

    def _noted(self, record: StepRecord) -> str:
        seconds = max(record.seconds, 1e-9)
        parts = [f"loss {record.cross_entropy:.3f}", f"{record.tokens / seconds:,.0f} tok/s"]
        if record.flops and self.peak:
            parts.append(f"MFU {record.flops / seconds / self.world.size / self.peak:.0%}")
        return " · ".join(parts)


@torch.no_grad()
def alphas(model: Any) -> dict[str, float]:
    """The weight of the twin's output by the site's layer in the base model; of a gate, where its input is zero.

    Every process of a sharded model calls this. Sites whose weight is always 1 are left out.
    """
    settings = settings_of(model)
    found = {}
    for site, block in zip(settings.paired_sites if settings else [], control_blocks(model), strict=True):
        for name in block.interpolation.alpha_parameters:
            parameter: Any = block.interpolation.get_parameter(name)
            logits = whole(parameter).float()
            # A router has a logit for the frozen block, too.
            weight = torch.sigmoid(logits) if logits.numel() == 1 else torch.softmax(logits, dim=0)[1:]
            found[str(site)] = weight.item()
    return found


def _empty() -> Row:
    """Sums, and means so far with the weight behind each."""
    means = dict.fromkeys(MEANS, 0.0) | {f"weight_of_{name}": 0 for name in MEANS}
    counts = dict.fromkeys(("steps", "skipped", "tokens", "targets"), 0)
    return {"step": 0, "lr": 0.0, **means, **counts, "seconds": 0.0, "data_seconds": 0.0, "flops": 0.0}


def _add(window: Row, record: StepRecord) -> None:
    window |= {"step": record.step, "lr": record.lr, "steps": window["steps"] + 1}
    for name in ("tokens", "targets", "seconds", "data_seconds"):
        window[name] += getattr(record, name)
    window["flops"] += record.flops or 0.0
    if record.skipped:
        window["skipped"] += 1
        return
    for name, weight in zip(MEANS, (record.targets, record.targets, record.tokens, 1), strict=True):
        if (value := getattr(record, name)) is not None and weight:
            window[f"weight_of_{name}"] += weight
            # A running mean (West 1979), which of one value is that value to the last bit.
            window[name] += (value - window[name]) * (weight / window[f"weight_of_{name}"])


def _mean(window: Row, name: str) -> float | None:
    """None where no step had a value."""
    return window[name] if window[f"weight_of_{name}"] else None


def _memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or what this process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def packed(text: bytes) -> str:
    """Text inside JSON, in less than half of its size."""
    return b64encode(zlib.compress(text, level=1)).decode()


def unpacked(text: str) -> str:
    return zlib.decompress(b64decode(text)).decode(errors="replace") if text else ""


def _read(file: Path) -> list[Row]:
    """All whole lines; the last may have been cut off by a kill. UserError for any other that is damaged."""
    return _parsed(file, file.read_text(errors="replace")) if file.exists() else []


def _parsed(file: Path, text: str) -> list[Row]:
    return [_row(file, number, line) for number, line in enumerate(text.split("\n")[:-1], start=1)]


def _row(file: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        row = error.msg
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise UserError(
            f"{file} line {number} is damaged: looked for an object with a step, found {line[:40]!r}; put the right "
            "file back, or take it away to go on with the lines that the checkpoint holds"
        )
    return row
