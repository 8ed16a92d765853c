"""What a person sees of a validation: a line, and what the model wrote."""

import json
from collections.abc import Mapping
from pathlib import Path

from controlllm.progress import console

SHOWN = ("validation_loss", "rougeL", "bleu", "retention_loss", "retention_kl")


def show_validation(
    folder: Path, step: int, metrics: Mapping[str, float], *, samples: list[dict[str, str]], best: bool
) -> None:
    """A line, and `samples/step-00000040.jsonl` with prompt, reference and answer of every question."""
    found = " · ".join(f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
    console.print(f"  step {step:,}: {found}{' · best so far' * best}", markup=False)
    if samples:
        file = folder / "samples" / f"step-{step:08d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        file.write_text(lines, encoding="utf-8")  # a repeated step replaces it
