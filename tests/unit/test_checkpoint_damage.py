"""Checkpoints that are missing, foreign or altered: passed over or refused with one line, and nothing is silent."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from saved_steps import IDENTITY, checkpoints, restored, small, write
from torch import nn

from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.train.checkpoint_files import MANIFEST, Damaged, LocalStore, Manifest, verify


def shard(folder):
    return next(folder.glob("*.safetensors"))


def sealed(folder, **changes):
    """A manifest that fits what lies in the folder: what only someone who means it can make."""
    manifest = json.loads((folder / MANIFEST).read_text())
    stated = {f.name: [f.stat().st_size, hash_file(f)] for f in folder.iterdir() if f.name != MANIFEST}
    facts = {name: manifest[name] for name in ("step", "state", "identity", "processes", "best")}
    (folder / MANIFEST).write_bytes(Manifest(**facts | {"files": stated} | changes).dump())


def flipped(file, at, bit=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def edited(folder, old, new):
    file = folder / MANIFEST
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def as_link(path):
    target = path.rename(path.parent.parent / f"elsewhere-{path.name}")
    path.symlink_to(target)


def folder_as_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def swapped(folder):
    other = folder.parent / "step-00000001"
    shard(folder).write_bytes(shard(other).read_bytes())


def whole_of_another(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


def without_seal(folder):
    facts = json.loads((folder / MANIFEST).read_text())
    del facts["seal"]
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1, sort_keys=True))


DAMAGES = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "no shard": (lambda f: shard(f).unlink(), "safetensors is missing"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "manifest.json is missing"),
    "truncated shard": (lambda f: os.truncate(shard(f), 700), "has 700 bytes instead of"),
    "empty shard": (lambda f: os.truncate(shard(f), 0), "has 0 bytes instead of"),
    "longer shard": (lambda f: shard(f).open("ab").write(b"x"), "bytes instead of"),
    "truncated manifest": (lambda f: os.truncate(f / MANIFEST, 50), "manifest.json is no JSON"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "manifest.json is no JSON"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "manifest.json is no JSON"),
    "manifest of another form": (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json was altered"),
    "manifest edited": (lambda f: edited(f, '"tokens": 20', '"tokens": 21'), "its seal does not fit"),
    "manifest laid out anew": (lambda f: edited(f, "\n", "\n "), "manifest.json was altered"),
    "manifest without seal": (without_seal, "its seal does not fit"),
    "another step": (whole_of_another, "manifest.json is of step 1"),
    "a step that was renamed": (lambda f: (shutil.rmtree(f), (f.parent / "step-00000001").rename(f)), "is of step 1"),
    "shard of another step": (swapped, "was altered: its hash does not fit"),
    "one bit": (lambda f: flipped(shard(f), -1), "was altered: its hash does not fit"),
    "extra file": (lambda f: (f / "notes.txt").write_text("x"), "notes.txt does not belong to it"),
    "extra folder": (lambda f: (f / "sub").mkdir(), "sub does not belong to it"),
    "extra metadata": (lambda f: (f / ".metadata").write_bytes(b"x"), ".metadata does not belong to it"),
    "link for a shard": (lambda f: as_link(shard(f)), "is no plain file"),
    "link for the manifest": (lambda f: as_link(f / MANIFEST), "manifest.json is no plain file"),
    "link for the folder": (as_link, "is no folder"),
    "folder for a shard": (lambda f: (p := shard(f), p.unlink(), p.mkdir()), "is no plain file"),
    "folder for the manifest": (lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).mkdir()), "is no plain file"),
    "file for the folder": (folder_as_file, "is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_passed_over_with_one_line(tmp_path, capsys, kind):
    damage, why = DAMAGES[kind]
    write(tmp_path, 1, 2)
    if kind == "a step that was renamed":
        write(tmp_path, 0, keep=3)
    damage(tmp_path / "step-00000002")
    capsys.readouterr()
    expected = 0 if kind == "a step that was renamed" else 1
    assert restored(tmp_path) == (expected, expected)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"! {tmp_path}/step-00000002 is passed over: ")
    assert why in said
    assert "\n" not in said


def test_where_none_is_whole_it_does_not_begin_anew(tmp_path):
    write(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is whole; choose another train.checkpoint.folder"):
        restored(tmp_path)


@pytest.mark.parametrize(("name", "other"), [("train.lr", 0.2), ("base", "b2"), ("sites", [1, 2]), ("new", 1)])
def test_one_of_another_run_is_refused(tmp_path, name, other):
    write(tmp_path, 1)
    there = IDENTITY.get(name)
    with pytest.raises(UserError) as error:
        restored(tmp_path, identity=IDENTITY | {name: other})
    assert str(error.value) == (
        f"{tmp_path}: holds checkpoints of another run: {name} is {there!r} there and {other!r} here; "
        f"choose another train.checkpoint.folder or remove this one"
    )


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_no_pickle_is_ever_opened(tmp_path):
    write(tmp_path, 1)
    folder, gone_off = tmp_path / "step-00000001", tmp_path / "gone-off"
    for name in (".metadata", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(gone_off)))
    sealed(folder)
    assert restored(tmp_path) == (1, 1)
    shard(folder).write_bytes(pickle.dumps(Bomb(gone_off)))
    sealed(folder)
    with pytest.raises(UserError, match="step-00000001: is of another run: its files are no shards of a checkpoint"):
        restored(tmp_path)
    assert not gone_off.exists()


def other_models():
    model, optimizer = small()
    return {
        "tensor 'model.0.bias' is missing in the checkpoint": lambda: model[0].bias.requires_grad_(True),
        "tensor 'model.1.weight' is not in this run": lambda: model[1].weight.requires_grad_(False),
        r"tensor 'model.0.weight' has shape \[24, 8\], expected \[2, 8\]": lambda: setattr(
            model[0], "weight", nn.Parameter(torch.zeros(2, 8))
        ),
        "tensor 'model.0.weight' is torch.float32, expected torch.float64": lambda: model.double(),
    }, (model, optimizer)


@pytest.mark.parametrize("number", range(4))
def test_tensors_that_differ_are_named(tmp_path, number):
    write(tmp_path, 1)
    changes, (model, _) = other_models()
    why, change = list(changes.items())[number]
    change()
    with pytest.raises(UserError, match=f"step-00000001: is of another run: {why}; choose"):
        checkpoints(tmp_path).restore_best(model) or checkpoints(tmp_path).restore(
            model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        )


def test_another_optimizer_is_named(tmp_path):
    write(tmp_path, 1)
    model, _ = small()
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    with pytest.raises(UserError, match=r"tensor 'optimizer.0.weight.exp_avg' is not in this run"):
        checkpoints(tmp_path).restore(model, other)


def test_no_flip_and_no_truncation_is_silent(tmp_path):
    write(tmp_path, 1)
    folder, rng = tmp_path / "step-00000001", random.Random(0)
    store, caught = LocalStore(tmp_path), 0
    for trial in range(600):
        file = (shard(folder), folder / MANIFEST)[trial % 2]
        whole = file.read_bytes()
        if trial % 3:
            flipped(file, rng.randrange(len(whole)), rng.randrange(8))
        else:
            os.truncate(file, rng.randrange(len(whole)))
        with pytest.raises(Damaged):
            verify(folder, store.manifest(1))
        caught += 1
        file.write_bytes(whole)
    verify(folder, store.manifest(1))
    assert caught == 600
