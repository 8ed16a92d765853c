"""The workflow itself, locally, on a tiny model: real Flyte, real stages, a real vLLM engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]
STAGES = ["ingest model", "ingest data", "prepare", "train", "consolidate", "benchmark", "smoke", "report"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A recipe with its own store and outputs, which the tests of this file share in order."""
    folder = tmp_path_factory.mktemp("flow")
    recipe = yaml.safe_load(RECIPE.format(model=tiny_base, output=folder / "runs"))
    recipe["smoke"] = {"prompts": 2, "max_new_tokens": 6}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def pyflyte(place, *arguments, **environment):
    settings = {"CONTROLLLM_CACHE": str(place / "cache"), "TMPDIR": str(place), "OMP_NUM_THREADS": "2", **environment}
    program = Path(sys.executable).with_name("pyflyte")
    command = [str(program), "run", "workflows/finetune.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})


def finetune(place, recipe="tiny.yaml", **environment):
    return pyflyte(place, "finetune", "--config", place / recipe, **environment)


def changed(place, name, **sections):
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    for section, values in sections.items():
        recipe[section] = values and recipe[section] | values
    (place / name).write_text(yaml.safe_dump(recipe))
    return name


def states(done) -> dict[str, str]:
    """Stage → cached or computing, from the log; a stage that runs twice counts as its last."""
    found = {}
    for line in done.stderr.splitlines():
        for stage in STAGES:
            for state in ("cached", "computing"):
                if line[2:].startswith(f"{stage:<13} {state}"):
                    found[stage] = state
    return found


def test_first_run_makes_everything(place):
    done = finetune(place)
    assert done.returncode == 0, done.stderr[-4000:]
    assert states(done) == dict.fromkeys(STAGES, "computing")
    home = place / "runs" / "tiny"
    assert "<svg" in (home / "report.html").read_text()
    assert json.loads((home / "model" / "config.json").read_text())["architectures"] == ["ControlLlamaForCausalLM"]
    assert str(home / "report.html") in done.stderr.replace("\n", "")
    smoke = json.loads(next((place / "cache" / "smoke").glob("*/smoke.json")).read_text())
    assert smoke["passed"]
    assert smoke["agreement"] == 1.0


def test_second_run_makes_nothing(place):
    done = finetune(place)
    assert done.returncode == 0, done.stderr[-4000:]
    assert states(done) == dict.fromkeys(STAGES, "cached")


def test_changed_rate_trains_again_and_says_why(place):
    done = finetune(place, changed(place, "faster.yaml", train={"lr": 0.002}, smoke=None))
    assert done.returncode == 0, done.stderr[-4000:]
    assert [stage for stage, state in states(done).items() if state == "cached"] == STAGES[:3]
    assert "because train.lr (0.001 → 0.002) changed" in done.stderr


def test_removed_outputs_and_parents_are_made_again_with_a_line(place):
    for stage in ("prepare", "consolidate"):
        shutil.rmtree(place / "cache" / stage)
    done = finetune(place, changed(place, "faster.yaml", train={"lr": 0.002}, smoke=None))
    assert done.returncode == 0, done.stderr[-4000:]
    found = states(done)
    assert {stage for stage, state in found.items() if state == "computing"} == {"prepare", "consolidate"}
    assert done.stderr.count("its stored output is not here any more") == 2


def test_one_stage_alone(place):
    base = next((place / "cache" / "ingest-model").glob("*/config.json")).parent
    data = next((place / "cache" / "ingest-data").glob("*/probes")).parent
    config = '{"new": ["puzzles"], "old": ["chat"], "dtype": "float32"}'
    done = pyflyte(place, "benchmark", "--model", base, "--data", data, "--config", config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert states(done) == {"benchmark": "computing"}


def test_two_processes_by_cluster_profile_that_do_not_wait_for_their_data(place):
    packing = {"streaming": True, "unit_rows": 16}
    recipe = changed(place, "two.yaml", benchmark={"old": ["chat"]}, pack=packing, smoke=None)
    done = finetune(place, recipe, CONTROLLLM_PROFILE="two-processes")
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [json.loads(f.read_text()) for f in (place / "cache" / "train").glob("*/train.json")]
    assert 2 in [run["processes"] for run in runs]


@pytest.mark.parametrize(("sections", "says"), [
    ({"train": {"stepz": 3}}, "unknown key 'train.stepz'; did you mean 'steps'?"),
    pytest.param({"control": {"num_expanded": 3}}, "3 does not divide the model's 4 layers", marks=pytest.mark.slow),
    ({"model": {"name": "./nowhere"}}, "nowhere"),
    pytest.param(
        {"pack": {"context_length": 16, "overlong": "error"}}, "do not fit into pack.context_length 16",
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_mistakes_are_one_line(place, sections, says):
    done = finetune(place, changed(place, "wrong.yaml", **sections))
    assert done.returncode == 1
    assert says in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stdout + done.stderr
