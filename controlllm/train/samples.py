"""What the model wrote when it was validated."""

import json
from pathlib import Path


def write_samples(folder: Path, step: int, samples: list[dict[str, str]]) -> None:
    """`samples/step-00000040.jsonl`: prompt, reference and answer of every question. A repeated step replaces it."""
    file = folder / "samples" / f"step-{step:08d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples), encoding="utf-8")
