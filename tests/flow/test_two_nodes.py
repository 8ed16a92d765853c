"""Training as a PyTorchJob of two nodes on loopback: one is lost, the job is tried again and goes on."""

import json
from pathlib import Path

import pytest
import yaml
from backend import Backend, pods
from backend.engine import wait_for
from conftest import RECIPE
from launching import controlllm, launch

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.timeout(3600)]
POD = {"image": "cpu", "cpu": "1", "memory": "4Gi"}
STEPS = 80


@pytest.fixture(scope="module")
def volume(tmp_path_factory, tiny_base):
    """What both nodes see: recipe, profile, cache and checkpoints."""
    folder = tmp_path_factory.mktemp("volume")
    recipe = yaml.safe_load(RECIPE.format(model=tiny_base, output=folder / "runs"))
    recipe["train"] |= {"steps": STEPS, "checkpoint": {"every": 2}}
    recipe["mix"]["datasets"][0]["rows"] = 120
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    profile = {
        "cache": str(folder / "cache"),
        "checkpoints": str(folder / "checkpoints"),
        "volumes": [{"name": "shared", "mount": str(folder), "claim": "shared"}],
        **dict.fromkeys(("light", "data", "serve"), POD),
        "train": POD | {"nodes": 2, "processes_per_node": 1, "gpus_per_process": 0, "retries": 2},
    }
    (folder / "two.yaml").write_text(json.dumps(profile))
    return folder


@pytest.fixture(scope="module")
def backend(volume):
    with Backend.running(volume / "backend", {"OMP_NUM_THREADS": "1"}) as running:
        done = controlllm(running, "cluster", "register", "-p", volume / "two.yaml", "-v", "1", "-i", "cpu=x/cpu:1")
        assert done.returncode == 0, done.stderr[-3000:]
        yield running


@pytest.fixture(scope="module")
def inputs(volume):
    """Of the training task: base and shards, made here."""
    from controlllm.config import load_config
    from controlllm.pipeline import run

    config = load_config(volume / "tiny.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(volume / "made"))
        run(config, until="prepare")
    base = next((volume / "made" / "ingest-model").glob("*/config.json")).parent
    shards = next((volume / "made" / "prepare").glob("*/lineage.json")).parent
    parts = {name: getattr(config, name) for name in ("model", "mix", "validation", *_METHODS)}
    return {"base": base, "shards": shards, "config": config.train, **parts}


_METHODS = ("control", "lora", "ia3", "prompt", "partial", "quantization")


def test_a_lost_node_is_tried_again_and_training_goes_on(backend, volume, inputs):
    from tasks.train import train

    name = launch(backend, "stage-train", train, **inputs)
    wait_for(lambda: len(_steps(volume)) >= 2, seconds=1200)
    (attempt,) = backend.executions[name].attempts
    assert len(attempt.pods) == 2
    pods.kill(attempt.pods[1])
    record = backend.wait(name, seconds=1800)
    assert record.message.closure.phase == 4, record.message.closure.error.message

    (node,) = record.nodes.values()
    assert [task.closure.phase for task in node.tasks] == [5, 3]  # failed, succeeded
    made = Path(record.outputs.literals["o0"].scalar.blob.uri)
    summary = json.loads((made / "train.json").read_text())
    assert summary["processes"] == 2
    assert summary["resumed"]
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))  # none lost, none twice


def test_a_mistake_is_not_tried_again(backend, inputs):
    from tasks.train import train

    wrong = inputs["model"].model_copy(update={"attention": "flex_attention"})  # has no backward pass on a CPU
    record = backend.wait(launch(backend, "stage-train", train, **inputs | {"model": wrong}), seconds=900)
    (node,) = record.nodes.values()
    assert len(node.tasks) == 1
    assert "model.attention flex_attention" in record.message.closure.error.message


def _steps(volume) -> list[Path]:
    return list((volume / "checkpoints").glob("*/*/manifest.json"))
