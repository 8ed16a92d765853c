"""The dial: 0 is the base and 1 the trained model, bit by bit; a grid is scored once, and drawn."""

import json
import re

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.dial import dial, dialled, load
from controlllm.errors import UserError
from controlllm.store import content_hash

LINEAGE = '{"stage": "consolidate", "key": "k", "files": {}, "content": "stored"}'
IDS = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
LAYOUTS = [
    *(("concat", interpolation) for interpolation in ("lerp", "dlerp", "slerp", "moe", "prog", "none")),
    ("stack", "lerp"),
    ("hybrid", "dlerp"),
]


def base_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()


def trained(**settings):
    """An expanded model with its trained tensors moved at random."""
    model = expand_model(base_model(), ControlSettings(sites=[1, 3], **settings))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    def save(**settings):
        trained(**settings).save_pretrained(tmp_path / "run" / "model")
        tokenizer.save_pretrained(tmp_path / "run" / "model")
        (tmp_path / "run" / "model" / "lineage.json").write_text(LINEAGE)
        return tmp_path / "run" / "model"

    return save


@pytest.mark.parametrize(("layout", "interpolation"), LAYOUTS)
def test_0_is_the_base_and_1_the_trained_model_bitwise(checkpoint, layout, interpolation):
    folder = checkpoint(layout=layout, interpolation=interpolation)
    base, whole = base_model()(IDS).logits, trained(layout=layout, interpolation=interpolation)(IDS).logits
    assert torch.equal(load(folder, alpha_scale=0)(IDS).logits, base)
    assert torch.equal(load(folder)(IDS).logits, whole)
    half = load(folder, alpha_scale=0.5)(IDS).logits
    assert not torch.equal(half, base)
    assert not torch.equal(half, whole)


def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(checkpoint):
    folder = checkpoint()
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["concat", "stack", "hybrid"])
def test_dialled_folder_differs_in_its_config_alone(checkpoint, tmp_path, layout):
    source = checkpoint(layout=layout)
    for _ in range(2):
        folder = dialled(source, 0.5, tmp_path / "dialled" / "0.5")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, load(source, alpha_scale=0.5)(IDS).logits
    )
    assert (folder / "model.safetensors").is_symlink()
    assert {f.name for f in source.iterdir()} - {f.name for f in folder.iterdir()} == {"lineage.json"}
    other = dialled(source, 0.25, tmp_path / "dialled" / "0.25")
    assert len({content_hash(f) for f in (source, folder, other)}) == 3
    assert dialled(source, 1.0, tmp_path / "dialled" / "1") == source


def test_dialled_checkpoint_can_be_dialled_again(checkpoint, tmp_path):
    source = checkpoint()
    half = dialled(source, 0.5, tmp_path / "half")
    assert dialled(half, 0.5, tmp_path / "again") == half.resolve()
    assert torch.equal(load(half, alpha_scale=0)(IDS).logits, base_model()(IDS).logits)
    back = dialled(half, 1.0, tmp_path / "back")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(back)(IDS).logits, trained()(IDS).logits)


def test_grid_is_scored_once_and_drawn(checkpoint, store, capsys):
    options = {"new": ["puzzles"], "old": ["chat", "drift"], "items": 12, "batch_size": 4, "dtype": "float32"}
    folder = dial(checkpoint(layout="stack"), [0.5, 1], **options)
    first = capsys.readouterr().err
    assert first.count("benchmark     computing") == 3  # 0 is always there to compare with
    assert "alpha scale" in first
    assert "dial.html" in first.splitlines()[-2]
    assert "controlllm.load(" in first.splitlines()[-1]
    told = json.loads((folder / "dial.json").read_text())
    assert folder.name == "dial"
    assert folder.parent.name == "run"
    assert [point["alpha_scale"] for point in told["points"]] == [0, 0.5, 1]
    base, half, whole = (point["probes"] for point in told["points"])
    assert {change["difference"] for probe in base.values() for change in probe["metrics"].values()} == {0}
    assert base["chat"]["before"] == half["chat"]["before"] == whole["chat"]["before"]
    assert half["chat"]["after"] != whole["chat"]["after"]
    assert whole["drift"]["role"] == "drift"

    page = (folder / "dial.html").read_text()
    assert "<svg" in page
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", page)
    assert (folder / "dial.png").read_bytes().startswith(b"\x89PNG")

    dial(folder.parent / "model", [0.25, 0.5, 1], **options)
    again = capsys.readouterr().err
    assert again.count("benchmark     computing") == 1
    assert again.count("benchmark     cached") == 3


def test_old_skills_alone_are_a_picture(checkpoint, store, tmp_path):
    folder = dial(checkpoint(), [1], new=[], old=["prose"], items=2, dtype="float32", output=tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere"
    assert "<svg" in (folder / "dial.html").read_text()


@pytest.mark.parametrize(("options", "says"), [
    ({"grid": [0.5, 1.5]}, r"alpha_scale: 1\.5 is not within 0 \(the base model\)"),
    ({"grid": [float("nan")]}, "alpha_scale: nan is not within 0"),
    ({"new": ["riddles"]}, "unknown probe 'riddles'; known: .*chat, drift"),
    ({"new": ["chat"]}, "old names chat, which is in new, too"),
    ({"new": [], "old": []}, "give new or old at least one probe"),
    ({"items": 0}, "items: Input should be greater than 0, found 0"),
    ({"dtype": "int8"}, "dtype: Input should be 'float32'"),
    ({"output": "{model}/dial"}, "lies inside the checkpoint"),
])  # fmt: skip
def test_mistakes_are_one_line(checkpoint, store, options, says):
    folder = checkpoint()
    given = {k: v.format(model=folder) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=says) as error:
        dial(folder, **given)
    assert "\n" not in str(error.value)
    assert not (folder.parent / "dial").exists()


def test_only_expanded_checkpoints_have_a_dial(tiny_base, tmp_path):
    with pytest.raises(UserError, match="is a plain model"):
        load(tiny_base)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"alpha_scale: -0\.1 is not within"):
        load(tiny_base, alpha_scale=-0.1)
