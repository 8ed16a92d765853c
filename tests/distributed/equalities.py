"""Every trainer, way of sharing and method on a tiny model: are its losses those of the native trainer alone (T5)?

`docs/equalities.md` is the table that this makes.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ranks import run
from tiny_training import METHODS, curves

from controlllm.config import load_config
from controlllm.errors import UserError
from controlllm.preflight import check
from controlllm.train.distributed import World

BOUND = 1e-5
STEPS = 5
TRAINERS = ("native", "transformers")
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"kind": "ddp"}),
    "ddp": (2, {"kind": "ddp"}),
    "fsdp": (2, {"kind": "fsdp"}),
    "fsdp, frozen replicated": (2, {"kind": "fsdp", "frozen": "replicate"}),
    "fsdp, CPU offload": (2, {"kind": "fsdp", "cpu_offload": True}),
    "hsdp": (2, {"kind": "fsdp", "replicas": 2}),
    "fsdp version 1": (2, {"kind": "fsdp", "version": 1}),
    "ZeRO-1": (2, {"kind": "deepspeed", "zero_stage": 1}),
    "ZeRO-2": (2, {"kind": "deepspeed", "zero_stage": 2}),
    "ZeRO-3": (2, {"kind": "deepspeed", "zero_stage": 3}),
    "ZeRO-3, CPU offload": (2, {"kind": "deepspeed", "zero_stage": 3, "cpu_offload": True}),
}
SHOWN = {
    "control": "Control LLM", "hybrid": "Control LLM, hybrid", "lora twins": "LoRA twins", "ia3 twins": "IA3 twins",
    "lora": "LoRA", "dora": "DoRA, rsLoRA", "ia3": "IA3", "prompt": "prompt tuning", "prefix": "prefix tuning",
    "q-control": "Control LLM, nf4", "qlora": "LoRA, nf4", "partial": "partial", "full": "full",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One combination."""

    trainer: str
    strategy: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.trainer} {self.strategy} {self.method}"

    @property
    def settings(self) -> dict[str, Any]:
        """Of `train`; two micro-batches a step on each of two processes."""
        return {"trainer": self.trainer, "parallel": STRATEGIES[self.strategy][1], "steps": STEPS, "lr": 2e-3}


@dataclass
class Found:
    """What came of the combinations."""

    apart: dict[Cell, float] = field(default_factory=dict)
    """Largest difference of a step's loss to the native trainer alone."""
    refused: dict[Cell, str] = field(default_factory=dict)
    """By `controlllm config check`."""


def cells(methods: tuple[str, ...]) -> list[Cell]:
    return [Cell(*which) for which in product(TRAINERS, STRATEGIES, methods)]


def refusal(recipe: Path, cell: Cell) -> str | None:
    """What `controlllm config check` says of it, if it does not let it pass."""
    changes = {"control": None, **METHODS[cell.method]}
    changes |= {"train.trainer": cell.trainer, "train.parallel": STRATEGIES[cell.strategy][1]}
    try:
        config = load_config(recipe, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
        check(config, serving=False)
    except UserError as error:
        return re.sub(r"^(override '.*?'|.*?\.yaml(:\d+)*): ", "", str(error))
    return None


def measure(base: Path, recipe: Path, folder: Path, methods: tuple[str, ...]) -> Found:
    """Run all that are not refused; those that use DeepSpeed in processes of their own, which it leaves changed."""
    found = Found()
    for cell in cells(methods):
        if line := refusal(recipe, cell):
            found.refused[cell] = line
    runs = [cell for cell in cells(methods) if cell not in found.refused]
    expected = _losses([Cell("native", "one process", method) for method in methods], 1, base, folder / "expected")
    for size, zero in ((1, False), (2, False), (2, True)):
        some = [c for c in runs if STRATEGIES[c.strategy][0] == size and c.strategy.startswith("ZeRO") == zero]
        for cell, losses in _losses(some, size, base, folder / f"{size}-{zero}").items():
            alone = expected[Cell("native", "one process", cell.method)]
            found.apart[cell] = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    return found


def _losses(wanted: list[Cell], size: int, base: Path, folder: Path) -> dict[Cell, list[float]]:
    folder.mkdir(parents=True)
    named = [(cell.name, cell.method, cell.settings) for cell in wanted]
    first = run(_curves, size, str(base), str(folder), named, timeout=1200)[0]
    return {cell: [row["loss"] for row in first[cell.name]] for cell in wanted}


def _curves(world: World, *args: Any) -> Any:
    return curves(world, *args)


def table(found: Found) -> str:
    """As Markdown: = where equal within the bound, a note's number where refused."""
    methods = [m for m in SHOWN if any(cell.method == m for cell in (*found.apart, *found.refused))]
    notes: dict[str, int] = {}
    lines = [
        "| trainer, sharing | " + " | ".join(SHOWN[m] for m in methods) + " |",
        "| --- " * (len(methods) + 1) + "|",
    ]
    for trainer, strategy in product(TRAINERS, STRATEGIES):
        row = []
        for method in methods:
            cell = Cell(trainer, strategy, method)
            if line := found.refused.get(cell):
                row.append(f"[{notes.setdefault(line, len(notes) + 1)}]")
            else:
                row.append("=" if found.apart[cell] <= BOUND else f"{found.apart[cell]:.0e}")
        lines.append(f"| {trainer}, {strategy} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"{number}. {line}" for line, number in notes.items())])
