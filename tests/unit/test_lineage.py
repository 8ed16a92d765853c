"""From an artifact to its roots, what is not as recorded, and the same as a page, PROV-JSON and OpenLineage."""

import json
import re
import shutil
from datetime import datetime
from uuid import UUID

import pytest

from controlllm.cli import main
from controlllm.lineage import trace
from controlllm.lineage.layers import layered, needed
from controlllm.lineage.openlineage import events_of
from controlllm.lineage.page import page_of
from controlllm.lineage.prov import prov_of
from controlllm.lineage.tree import tree_of
from controlllm.origin import origin
from controlllm.promote import link
from controlllm.store import read_lineage, run_stage

pytestmark = pytest.mark.usefixtures("store")
EVIL = "<script>alert(1)</script>"
PLANTED = "planted-secret-0123"


def output(stage, config, files, **parents):
    def build(folder):
        for name, value in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text)

    named = {name.replace("_", " "): path for name, path in parents.items()}
    return run_stage(stage, config=config, parents=named, build=build).path


@pytest.fixture
def run(tmp_path):
    """A run of five stages, with a name that is markup."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}
    model = {"model": {"name": "/home/someone/base", "revision": None, "source": {"a": 1}}}
    base = output("ingest model", model, {"config.json": config, "model.safetensors": "w"})
    manifest = {"source": f"https://me:{PLANTED}@host/data/{EVIL}.jsonl", "files": [{"stamp": {"size": 12}}]}
    data = output(
        "ingest data", {"source": {"puzzles": "ab12"}, "mix": {"decontaminate": "exact"}},
        {"manifests/puzzles.json": manifest}, ingest_model=base,
    )  # fmt: skip
    counts = dict.fromkeys(("rows", "filtered_rows", "bad_rows", "tokens", "target_tokens", "padding"), 1)
    shards = output("prepare", {"datasets": {"puzzles": {"seed": 7}}}, {"stats.json": counts},
                    ingest_model=base, ingest_data=data)  # fmt: skip
    facts = {"steps": 2, "tokens": 9, "trained_parameters": 1, "total_parameters": 2, "processes": 1}
    trained = output("train", {"train": {"seed": 3, "lr": 0.1}, "note": EVIL},
                     {"train.json": facts, "metrics.jsonl": '{"step": 2, "loss": 1.5}\n'},
                     ingest_model=base, prepare=shards)  # fmt: skip
    tuned = output("consolidate", {"control": None}, {"config.json": config, "model.safetensors": "t"},
                   ingest_model=base, train=trained)  # fmt: skip
    folder = tmp_path / "runs" / "demo"
    link(folder / "model", tuned)
    return folder


def states(graph):
    return {node.stage: node.state for node in graph.nodes.values()}


def test_a_run_is_followed_to_its_data_and_its_base(run):
    graph = trace(run)
    assert set(states(graph)) == {
        "run", "consolidate", "train", "prepare", "ingest data", "ingest model", "data", "base model",
    }  # fmt: skip
    assert graph.problems() == []
    train = next(node for node in graph.nodes.values() if node.stage == "train")
    assert train.seeds == {"train.seed": 3}
    assert train.metrics == {"loss": 1.5}
    assert train.made_by["controlllm"]
    assert re.fullmatch(r"[0-9a-f]{40}", train.made_by["commit"])
    assert {edge.role for edge in graph.parents(train.id)} == {"ingest model", "prepare"}
    assert any(name.startswith("train/") for name in train.code)
    assert train.versions["torch"]


@pytest.mark.parametrize("what", ["name", "folder", "model", "stage", "file"])
def test_any_artifact_of_it_is_one(run, what, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    target = {"name": "demo", "folder": run, "model": run / "model", "stage": (run / "model").resolve(),
              "file": run / "model" / "config.json"}[what]  # fmt: skip
    assert "base model" in states(trace(target))


def test_a_changed_parent_is_marked_and_its_file_named(run):
    trained = read_lineage(run / "model")["parents"]["train"]
    folder = (run / "model").resolve().parents[1] / "train" / trained["key"]
    (folder / "metrics.jsonl").write_text("{}\n")
    assert trace(run).problems() == ["train: metrics.jsonl was changed since it was made"]
    (folder / "metrics.jsonl").unlink()
    assert trace(run).problems() == ["train: metrics.jsonl is missing since it was made"]


def test_a_parent_that_was_made_again_otherwise_is_marked(run):
    trained = read_lineage(run / "model")["parents"]["train"]
    file = (run / "model").resolve().parents[1] / "train" / trained["key"] / "lineage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"content": "0" * 16}))
    (problem,) = trace(run).problems()
    assert problem.startswith(f"train: was made again since: its content was {trained['content']}")


def test_a_lineage_that_was_edited_is_marked(run):
    file = (run / "model").resolve() / "lineage.json"
    made = json.loads(file.read_text())
    made["files"]["config.json"]["hash"] = "0" * 32
    file.write_text(json.dumps(made))
    assert any("its lineage.json was changed" in line for line in trace(run).problems())


def test_what_was_removed_is_still_known(run, store):
    shutil.rmtree(store / "train")
    shutil.rmtree(store / "prepare")
    found = states(trace(run))
    assert (found["train"], found["prepare"], found["ingest data"]) == ("gone", "gone", "whole")


def test_a_model_that_was_copied_elsewhere_carries_its_lineage(run, monkeypatch, tmp_path):
    copy = shutil.copytree((run / "model").resolve(), tmp_path / "copy")
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "another"))
    graph = trace(copy)
    assert states(graph) == {"consolidate": "whole"} | dict.fromkeys(
        ("train", "prepare", "ingest data", "ingest model"), "gone"
    ) | dict.fromkeys(("data", "base model"), "outside")  # fmt: skip


def test_a_checkpoint_with_only_its_config_leads_to_its_training(run, tmp_path):
    trained = read_lineage(run / "model")["parents"]["train"]
    (tmp_path / "bare").mkdir()
    about = {"base_model": "base", "training": {key: trained[key] for key in ("key", "content")}}
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"lineage": about}))
    assert states(trace(tmp_path / "bare"))["train"] == "whole"


def test_nothing_known_says_so(run, store, monkeypatch, tmp_path):
    file = (run / "model").resolve() / "lineage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ancestors": {}}))
    shutil.rmtree(store / "train")
    shutil.rmtree(store / "lineage")
    assert "train: is not here, and nothing is known of it" in trace(run).problems()


def test_no_page_or_file_holds_what_is_private_or_runs_anything(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "environment-secret-9")
    trained = read_lineage(run / "model")["parents"]["train"]
    file = (run / "model").resolve().parents[1] / "train" / trained["key"] / "lineage.json"
    made = json.loads(file.read_text())
    made["inputs"]["note"] = f"{EVIL} environment-secret-9 hf_{'a' * 30}"
    file.write_text(json.dumps(made))
    graph = trace(run)
    from rich.console import Console

    console = Console(width=400, record=True, file=(tmp_path / "sink").open("w"))
    console.print(tree_of(graph))
    texts = [page_of(graph), prov_of(graph), events_of(graph), console.export_text()]
    for text in texts:
        for secret in (PLANTED, "environment-secret-9", "hf_aaa", "/home/someone", str(tmp_path)):
            assert secret not in text
    assert "<script" not in texts[0]
    assert "http" not in re.sub(r"https://host", "", texts[0])


def test_prov_is_as_the_specification_has_it(run):
    document = json.loads(prov_of(trace(run)))
    kinds = {"prefix", "entity", "activity", "agent", "wasGeneratedBy", "used", "wasDerivedFrom", "wasAssociatedWith"}
    assert set(document) == kinds
    name = re.compile(r"controlllm:[A-Za-z0-9_.-]+")
    for kind in ("entity", "activity", "agent"):
        assert all(name.fullmatch(id) for id in document[kind])
        assert all(
            re.fullmatch(r"(prov|controlllm):[A-Za-z0-9_.-]+", key) for each in document[kind].values() for key in each
        )
    ends = {"wasGeneratedBy": ("prov:entity", "prov:activity"), "used": ("prov:activity", "prov:entity"),
            "wasDerivedFrom": ("prov:generatedEntity", "prov:usedEntity"),
            "wasAssociatedWith": ("prov:activity", "prov:agent")}  # fmt: skip
    places = {"prov:entity": "entity", "prov:generatedEntity": "entity", "prov:usedEntity": "entity",
              "prov:activity": "activity", "prov:agent": "agent"}  # fmt: skip
    for kind, keys in ends.items():
        assert document[kind]
        for id, relation in document[kind].items():
            assert id.startswith("_:")
            assert all(relation[key] in document[places[key]] for key in keys)
    for activity in document["activity"].values():
        assert datetime.fromisoformat(activity["prov:startTime"]) <= datetime.fromisoformat(activity["prov:endTime"])
    assert len(document["activity"]) == 5


def test_open_lineage_events_have_the_fields_of_the_specification(run):
    events = [json.loads(line) for line in events_of(trace(run)).splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 5
    assert [event["job"]["name"] for event in events[::2]] == [
        "ingest model", "ingest data", "prepare", "train", "consolidate",
    ]  # fmt: skip
    for event in events:
        assert {"eventTime", "producer", "schemaURL", "run", "job", "inputs", "outputs"} <= set(event)
        assert datetime.fromisoformat(event["eventTime"]).tzinfo
        assert UUID(event["run"]["runId"])
        datasets = [*event["inputs"], *event["outputs"]]
        assert all(dataset["namespace"] and dataset["name"] for dataset in datasets)
        facets = [event["run"]["facets"], event["job"]["facets"], *(d["facets"] for d in datasets)]
        assert all({"_producer", "_schemaURL"} <= set(facet) for each in facets for facet in each.values())
    trained = events[7]
    assert trained["run"]["facets"]["controlllm_stage"]["seeds"] == {"train.seed": 3}
    assert {dataset["name"].partition("/")[0] for dataset in trained["inputs"]} == {"ingest model", "prepare"}
    assert events[6]["run"]["runId"] == trained["run"]["runId"]
    assert trained["outputs"][0]["name"] in {dataset["name"] for dataset in events[9]["inputs"]}


def test_layers_go_down_and_an_implied_line_is_left_out():
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert needed(edges) == [("a", "b"), ("b", "c"), ("d", "c")]
    layers, ways = layered(["c", "b", "a", "d"], edges)
    level = {node: number for number, layer in enumerate(layers) for node in layer}
    assert [level[node] for node in "abcd"] == [0, 1, 2, 1]  # d right above what is made from it
    assert all(
        [level[point] for point in way] == list(range(level[way[0]], level[way[-1]] + 1)) for way in ways.values()
    )


def test_the_command_writes_what_it_is_asked_for(run, tmp_path, capsys):
    page, prov, events = (tmp_path / name for name in ("page.html", "prov.json", "events.jsonl"))
    assert main(["lineage", str(run), "--html", str(page), "--prov", str(prov), "--openlineage", str(events)]) == 0
    assert capsys.readouterr().out.split() == [str(page), str(prov), str(events)]
    assert page.read_text().count("<svg") == 1
    assert main(["lineage", str(run), "--json"]) == 0
    assert {node["stage"] for node in json.loads(capsys.readouterr().out)["nodes"]} >= {"train", "data"}
    assert main(["lineage", str(run)]) == 0
    assert "all as recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("nothing", [], "no such run, folder or file"),
        (".", [], "is neither a run, a stage's folder, a model nor a report"),
        ("broken", [], "is damaged"),
        ("foreign", [], "is no lineage of a controlllm stage"),
        ("demo", ["--html", "missing/page.html"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(run, target, options, says, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    for name, text in (("broken", "{"), ("foreign", "{}")):
        run.parents[1].joinpath(name).mkdir()
        run.parents[1].joinpath(name, "lineage.json").write_text(text)
    assert main(["lineage", target, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    assert says in line


def test_what_a_shared_folder_knows_names_what_changed(tmp_path, monkeypatch, capsys):
    """As two pods with stores of their own."""
    origin.cache_clear()
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f00")
    for number in (1, 2):
        monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / f"pod{number}"))
        output("train", {"train": {"lr": number}}, {"a": "b"})
    assert "is not known without CONTROLLLM_LINEAGE" in capsys.readouterr().err
    monkeypatch.setenv("CONTROLLLM_LINEAGE", str(tmp_path / "shared"))
    for number in (3, 4):
        monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / f"pod{number}"))
        made = output("train", {"train": {"lr": number}}, {"a": "b"})
    assert "because train.lr (3 → 4) changed" in capsys.readouterr().err
    assert read_lineage(made)["why"] == "because train.lr (3 → 4) changed"
    assert read_lineage(made)["made by"]["execution"] == "f00"
    origin.cache_clear()


def test_a_shared_folder_that_cannot_be_written_costs_no_output(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONTROLLLM_LINEAGE", str(tmp_path / "file"))
    assert output("train", {"train": {"lr": 1}}, {"a": "b"}).is_dir()
    assert "lineage of train was not written down: CONTROLLLM_LINEAGE: " in capsys.readouterr().err


def test_a_removed_output_is_made_again_with_a_line(store, capsys):
    made = output("train", {"train": {"lr": 1}}, {"a": "b"})
    shutil.rmtree(made)
    assert output("train", {"train": {"lr": 1}}, {"a": "b"}) == made
    assert "computing its stored output is not here any more" in capsys.readouterr().err


def test_a_secret_is_in_no_lineage(store, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "environment-secret-9")
    for address in (f"s3://me:{PLANTED}@bucket/a", "environment-secret-9"):
        output("prepare", {"source": address, "api_key": "k-1"}, {"a": "b"})
    said = "".join(file.read_text() for file in store.rglob("*.json")) + capsys.readouterr().err
    assert PLANTED not in said
    assert "environment-secret-9" not in said
    assert "k-1" not in said
