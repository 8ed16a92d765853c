"""Every recipe is checked and fits the machines that docs/recipes.md says it is for; what a first user is told."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from shrunken import RECIPES, hub_cache, recipes

from controlllm.cli import main
from controlllm.config import ModelConfig, load_config
from controlllm.errors import UserError
from controlllm.ingest import ingest_model
from controlllm.preflight import check

DOCS = Path(__file__).parents[2] / "docs/recipes.md"
ROW = re.compile(r"^\| \[`([\w.-]+)`\].*?\| (?:(\d+) × )?(\d+) GB", re.MULTILINE)
MACHINES = {name: (int(count or 1), int(size)) for name, count, size in ROW.findall(DOCS.read_text(encoding="utf-8"))}
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache, with the config.json of the recipes' models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache(tmp_path / "hub")))
    return tmp_path / "hub"


def test_each_stands_in_the_docs():
    assert recipes() == sorted(MACHINES)


@pytest.mark.parametrize("name", recipes())
def test_no_machine_stands_in_a_recipe(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert not re.search(r"(?<![\w/.])/\w", text)
    assert len(text.splitlines()) <= 45
    parallel = load_config(RECIPES / f"{name}.yaml").train.parallel
    assert getattr(parallel, "replicas", None) is None  # that is the launcher's


@pytest.mark.parametrize("name", recipes())
def test_check_passes_with_and_without_the_model(name, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(RECIPES / f"{name}.yaml")
    check(config, serving=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache(tmp_path / "hub")))
    check(config, serving=False)
    if config.control:  # it was looked at, and not passed over
        with pytest.raises(UserError, match="num_expanded"):
            check(load_config(RECIPES / f"{name}.yaml", "control.num_expanded=1000"), serving=False)


@pytest.mark.parametrize("name", recipes())
def test_it_fits_its_machines(name, hub, capsys):
    """With a tenth to spare, which is how well memory is predicted."""
    processes, gigabytes = MACHINES[name]
    options = ["--processes", str(processes), "--device-memory", str(0.9 * gigabytes), "--json"]
    assert main(["memory", str(RECIPES / f"{name}.yaml"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_a_laptop_is_told_how_to_check_for_a_cluster(hub, store, tmp_path, monkeypatch, capsys):
    recipe = str(RECIPES / "llama3-70b-hsdp.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONTROLLLM_PROFILE", raising=False)
    assert main(["config", "check", recipe, "smoke=null"]) == 1
    assert "CONTROLLLM_PROFILE=multi-node" in capsys.readouterr().err
    monkeypatch.setenv("CONTROLLLM_PROFILE", "multi-node")
    assert main(["config", "check", recipe, "smoke=null"]) == 0
    assert capsys.readouterr().out.startswith("ok: llama3-70b-hsdp: meta-llama/")


def test_check_says_what_it_could_not_see(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["config", "check", str(RECIPES / "llama3-8b-chinese-cpt.yaml"), "smoke=null"]) == 0
    ok, more = capsys.readouterr().out.splitlines()
    assert ok.endswith("learns Llama-3-SynE in 10000000000 tokens")
    assert more.startswith("not checked: sites, context and memory")


def _answer(status: int) -> Any:
    """What the Hub's errors read of a response."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


SAID = {
    "gated": (errors.GatedRepoError("x", response=_answer(403)), "accept its terms.*HF_TOKEN"),
    "not found": (errors.RepositoryNotFoundError("x", response=_answer(401)), "check its spelling.*HF_TOKEN"),
    "revision": (errors.RevisionNotFoundError("x", response=_answer(404)), "model.revision"),
    "no network": (errors.LocalEntryNotFoundError("x"), f"hf download {LLAMA}"),
    "other": (errors.HfHubHTTPError("503 down\nmore", response=_answer(503)), r"\(503 down\)"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_model_that_cannot_be_had_is_one_line(case, store, tmp_path, monkeypatch):
    error, said = SAID[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=said) as told:
        ingest_model(ModelConfig(name=LLAMA))
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(f"model.name: '{LLAMA}' ")


def test_without_a_network_the_hubs_cache_is_enough(hub, tiny_base, store):
    snapshot = hub / f"models--{LLAMA.replace('/', '--')}" / "snapshots" / "0123"
    with pytest.raises(UserError, match="no weights"):
        ingest_model(ModelConfig(name=LLAMA))
    for file in tiny_base.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    folder = ingest_model(ModelConfig(name=LLAMA)).path
    assert (folder / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()
