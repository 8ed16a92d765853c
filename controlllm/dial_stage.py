"""The dial within a run: the scales that `report.dial` names, between the base and the tuned model."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from controlllm.benchmark import benchmark
from controlllm.benchmark.stage import refuse_failed
from controlllm.config import BenchmarkConfig
from controlllm.dial import compared, dialled
from controlllm.store import Output, content_hash, run_stage


def dial_stage(
    model: Path,
    data: Path,
    config: BenchmarkConfig,
    scales: Sequence[float],
    *,
    base_scores: Path,
    tuned_scores: Path,
) -> Output:
    """`dial.json`, as `controlllm dial` writes it; 0 and 1 are the scores of the base and of the tuned model."""

    def build(folder: Path) -> None:
        scores = {0.0: base_scores, 1.0: tuned_scores}
        with TemporaryDirectory() as scratch:
            for scale in sorted(set(scales) - set(scores)):
                made = benchmark(dialled(model, scale, Path(scratch, f"{scale:g}")), data, config).path
                refuse_failed(made)
                scores[scale] = made
        points = [{"alpha_scale": s, "probes": compared(base_scores, scores[s])} for s in sorted(scores)]
        result: dict[str, Any] = {"checkpoint": "model", "content": content_hash(model), "dtype": config.dtype}
        (folder / "dial.json").write_text(json.dumps(result | {"points": points}, indent=1))

    settings = {"scales": sorted(scales), "benchmark": config.model_dump(exclude={"batch_size", "gate", "processes"})}
    parents = {"model": model, "ingest data": data, "scores of the base": base_scores}
    return run_stage("dial", config=settings, parents=parents | {"scores of the tuned": tuned_scores}, build=build)
