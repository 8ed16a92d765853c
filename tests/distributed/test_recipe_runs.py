"""Every recipe runs on a shrunken model, from ingest to consolidate, in the processes that its way of sharing needs."""

import json
import math
from pathlib import Path

import pytest
import torch
from ports import free_ports
from ranks import run
from shrunken import RECIPES, STEPS, recipes, run_them, shrunken
from transformers import AutoModelForCausalLM

import controlllm  # noqa: F401 - makes the architecture known
from controlllm.config import load_config

pytestmark = pytest.mark.distributed


def processes(name: str) -> int:
    """One, two that share, or 2 × 2 with replicas."""
    parallel = load_config(RECIPES / f"{name}.yaml").train.parallel
    return 1 if parallel.kind == "ddp" else 4 if parallel.kind == "fsdp" and parallel.shards else 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_recipe_runs(size, tokenizer, tmp_path):
    names = [name for name in recipes() if processes(name) == size]
    runs = {name: shrunken(name, tmp_path, tokenizer) for name in names}
    run(run_them, size, str(tmp_path / "stores"), runs, free_ports(len(names)))
    for name in names:
        _trained(name, runs[name], tmp_path / "stores" / name)


def _trained(name: str, overrides: list[str], store: Path) -> None:
    """It went through all steps, was validated, and what was trained is in the model that came out."""
    config = load_config(RECIPES / f"{name}.yaml", *overrides)
    (trained,) = (store / "train").glob("[!.]*")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS, name
    assert all(map(math.isfinite, losses)), name
    assert max(line.get("lr", 0) for line in lines) == pytest.approx(config.train.lr), name
    (validated, *_) = [line for line in lines if "validation_loss" in line]
    assert math.isfinite(validated["validation_loss"] + validated["retention_loss"]), name
    (folder,) = (store / "consolidate").glob("[!.]*")
    ids = torch.randint(2, 258, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tuned, base = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits
            for place in (folder, config.model.name)
        )
    assert torch.isfinite(tuned).all(), name
    assert not torch.equal(tuned, base), name
