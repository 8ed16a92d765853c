"""The commands over checkpoints: they teach, work on a real one, and fail in one line."""

import json
from pathlib import Path

import pytest
import torch
from families import IDS, perturb, tiny
from transformers import AutoModelForCausalLM

import controlllm
from controlllm.cli import main
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings


@pytest.fixture
def tuned(tmp_path, tokenizer):
    """An expanded checkpoint with a tokenizer."""
    model = expand_model(tiny("Llama", vocab_size=258), ControlSettings(sites=[1, 3]))
    folder = tmp_path / "model"
    perturb(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["dial", "fold", "import-reference"])
def test_help_has_an_example_and_a_next_step(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"controlllm {command} " in text
    assert "Next:" in text


def test_fold_writes_a_plain_model(tuned, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One paragraph of text.\n\nAnother one, a little longer.\n\nA third.\n\nA fourth one.\n")
    assert main(["fold", str(tuned), str(tmp_path / "out"), "--alpha", "0", "--text", str(text)]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    base = controlllm.load(tuned, alpha_scale=0.0)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, base(IDS).logits)
    assert "KL" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [
    (["dial", "nowhere"], "nowhere"),
    (["dial", "CKPT", "--grid", "0,half"], "--grid: '0,half' must be numbers"),
    (["dial", "CKPT", "--grid", "0,2"], "2"),
    (["dial", "CKPT", "--new", "puzles"], "unknown probe 'puzles'"),
    (["fold", "CKPT", "out", "--alpha", "2"], "2"),
    (["fold", "CKPT", "out", "--alpha", "nothing.json"], "nothing.json"),
    (["fold", "CKPT", "CKPT"], "not empty"),
    (["fold", "nowhere", "out"], "nowhere"),
    (["import-reference", "nowhere", "out"], "nowhere"),
    (["import-reference", "CKPT", "out"], "expansion"),
])  # fmt: skip
def test_wrong_input_is_one_line(tuned, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tuned.parent)
    assert main([str(tuned) if word == "CKPT" else word for word in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not Path("out").exists()
