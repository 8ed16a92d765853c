"""A checkpoint beside a base model, on one page, without a training: the weekly look."""

import json
from pathlib import Path

from controlllm.compare import comparison_table, to_html
from controlllm.config import RunConfig
from controlllm.errors import UserError
from controlllm.statistics import compare_scores


def write_assessment(
    config: RunConfig, checkpoint: str, *, base_scores: Path, scores: Path, smoke: Path | None
) -> Path:
    """`<output>/<name>/assessment.html`, and the same numbers as assessment.json beside it; returns the page.

    checkpoint: as it is called on the page; empty is the run's promoted model.
    """
    found = compare_scores(base_scores, scores, margin=config.benchmark.margin)
    tuned = checkpoint or f"{config.name}'s model"
    parts = [comparison_table(found, f"{config.model.name} → {tuned}"), found["overall"]["sentence"]]
    if smoke is not None:
        parts.append(_smoke_line(json.loads((smoke / "smoke.json").read_text())))
    folder = Path(config.output) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "assessment.json", json.dumps(found, indent=1, allow_nan=False))
        return _replace(folder / "assessment.html", to_html(parts, f"{tuned}: {found['overall']['sentence']}"))
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written: {error.strerror}") from None


def _smoke_line(found: dict[str, object]) -> str:
    passed = "gives transformers' tokens" if found["passed"] else "does not give transformers' tokens"
    return f"smoke test: vLLM {passed} (agreement {found['agreement']:.1%})"


def _replace(file: Path, text: str) -> Path:
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(text, encoding="utf-8", errors="replace")
    return fresh.replace(file)
