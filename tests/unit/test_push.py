"""A push: nothing unfit leaves the machine, everything fit arrives at once. The client is real, the hub is local."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, hub
from huggingface_hub import constants
from safetensors.torch import load, load_file, save_file
from shared_run import make_run, summary

from controlllm.errors import UserError
from controlllm.push import pack, send, show


@pytest.fixture
def server(monkeypatch) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, store: Path) -> Path:
    return make_run(tmp_path, tiny_base)


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def test_everything_arrives_in_one_commit(run: Path, server: Hub) -> None:
    address = send(pack(run, "me/demo", license="apache-2.0"), message="First")
    assert address == f"{server.url}/me/demo@main"
    (commit,) = server.commits["me/demo@main"]
    assert commit["message"] == "First"
    sent = commit["added"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sent)
    assert "lineage.json" not in sent
    assert "license: apache-2.0" in base64.b64decode(sent["README.md"]).decode()
    assert 'from_pretrained("me/demo")' in base64.b64decode(sent["README.md"]).decode()
    there, here = load(server.objects[sent["model.safetensors"]]), load_file(run / "model" / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].equal(here[name]) for name in here)


def test_a_push_that_failed_leaves_nothing_and_goes_on(run: Path, server: Hub) -> None:
    parcel = pack(run, "me/demo")
    server.refuse["/commit/"] = 500
    with pytest.raises(UserError, match=r"answered 500: .*nothing was committed, the same command tries again"):
        send(parcel)
    assert not server.commits
    server.refuse.clear()
    server.asked.clear()
    send(pack(run, "me/demo"))
    assert not [line for line in server.asked if line.startswith("PUT")]  # the weights were there already
    assert len(server.commits["me/demo@main"]) == 1


def test_a_broken_upload_of_weights_commits_nothing(run: Path, server: Hub) -> None:
    server.refuse["/lfs/"] = 403
    with pytest.raises(UserError, match="nothing was committed"):
        send(pack(run, "me/demo"))
    assert not server.commits


def test_weights_of_an_earlier_push_go(model: Path, server: Hub) -> None:
    place = "me/demo@v2"
    old = {"model-00001-of-00001.safetensors": "0", "model.safetensors.index.json": "{}", "notes.txt": "mine"}
    server.commits[place] = [{"added": old, "deleted": [], "message": ""}]
    send(pack(model, "me/demo"), revision="v2")
    assert set(old) & set(server.files(place)) == {"notes.txt"}
    assert "POST /api/models/me/demo/branch/v2" in server.asked


def test_private_is_never_public(model: Path, server: Hub) -> None:
    send(pack(model, "me/new"), private=True)
    assert server.private["me/new"]
    server.private["me/demo"] = False
    with pytest.raises(UserError, match="me/demo is there and public"):
        send(pack(model, "me/demo"), private=True)
    assert "me/demo@main" not in server.commits


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("whoami", 401, "refuses the token"),
        ("repos/create", 403, "does not let this token write to me/demo"),
        ("tree/", 404, "knows no me/demo"),
        ("preupload", 400, "answered 400"),
    ],
)
def test_what_a_hub_refuses_is_one_line(part: str, status: int, said: str, model: Path, server: Hub) -> None:
    server.refuse[part] = status
    with pytest.raises(UserError, match=said) as caught:
        send(pack(model, "me/demo"))
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not server.commits


def test_wrong_and_missing_tokens(model: Path, server: Hub, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    with pytest.raises(UserError, match="refuses the token: run hf auth login") as caught:
        send(pack(model, "me/demo"))
    assert "bbb" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token for the hub: run hf auth login"):
        send(pack(model, "me/demo"))


def test_no_network(model: Path, server: Hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        send(pack(model, "me/demo"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        send(pack(model, "me/demo"))


def test_a_look_sends_nothing(run: Path, server: Hub) -> None:
    shown = show(pack(run, "me/demo"))
    size = (run / "model" / "model.safetensors").stat().st_size
    assert (
        f"model.safetensors {size:>25,} bytes".split()
        == next(line for line in shown.splitlines() if line.startswith("model.safetensors")).split()
    )
    assert "for me/demo" in shown
    assert "  license: other" in shown
    assert not server.asked


@pytest.mark.parametrize("repo", ["a/b/c", "me/de mo", "me/..", "", "me/" + "x" * 97, "--x"])
def test_names_that_no_repository_has(repo: str, model: Path) -> None:
    with pytest.raises(UserError, match="is no name of a repository"):
        pack(model, repo)


def test_a_failed_gate_stops_it(tiny_base: Path, tmp_path: Path, store: Path) -> None:
    run = make_run(tmp_path, tiny_base, numbers=summary(gate={"passed": False, "sentence": "chat fell by 12"}))
    with pytest.raises(UserError, match=r"its gate failed \(chat fell by 12\); --anyway"):
        pack(run, "me/demo")
    assert pack(run, "me/demo", anyway=True).files


def test_the_model_of_another_training_is_not_sent_with_this_report(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    (run / "model").rename(run / "refused")
    assert pack(run, "me/demo").files  # the one that the report is about
    older = Path(shutil.copytree((run / "refused").resolve(), tmp_path / "older"))
    _json(older, "lineage.json", parents={"train": {"stage": "train", "key": "0", "content": "0"}})
    (run / "model").symlink_to(older)
    with pytest.raises(UserError, match="is not the model of the report beside it"):
        pack(run / "model", "me/demo")


def _json(folder: Path, name: str, **values) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def _two_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00002.safetensors")


WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), "nor a checkpoint with a config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 9), "model.safetensors"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80"), "may be a pickle"),
    "code": (lambda f: (f / "modeling.py").write_text("1"), "is no part of a checkpoint"),
    "hidden": (lambda f: (f / ".env").write_text("A=1"), "is hidden"),
    "dead link": (lambda f: (f / "a.json").symlink_to("nowhere"), "is a link to nothing"),
    "two files": (_two_files, "has 2 files of weights and no model.safetensors.index.json"),
    "half an index": (
        lambda f: _json(f, "model.safetensors.index.json", weight_map={"x": "model.safetensors"}),
        "model.safetensors lacks the tensor x",
    ),
    "path": (lambda f: _json(f, "config.json", at="/home/me/base"), "holds a path of a machine, /home/me/base"),
    "path of Windows": (lambda f: _json(f, "config.json", at="C:\\Users\\me"), "holds a path of a machine"),
    "token": (lambda f: _json(f, "config.json", at=TOKEN), "holds a Hugging Face token"),
    "password": (lambda f: _json(f, "tokenizer_config.json", at="s3://me:pw@host/x"), "holds a password"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_unfit_stays_here(name: str, model: Path) -> None:
    damage, said = WRONG[name]
    damage(model)
    with pytest.raises(UserError, match=said) as caught:
        pack(model, "me/demo")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_links_are_followed_and_licences_sent(model: Path, tmp_path: Path) -> None:
    weights = (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(weights)
    (model / "LICENSE").write_text("terms")
    found = {file.name: file.path for file in pack(model, "me/demo").files}
    assert found["model.safetensors"] == weights
    assert "LICENSE" in found


def test_bytes_that_changed_since_the_stage_are_not_sent(run: Path) -> None:
    weights = (run / "model").resolve() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is not what the stage wrote"):
        pack(run, "me/demo")
