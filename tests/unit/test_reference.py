"""Checkpoints of the prior implementation give the numbers that it computed."""

import json
import lzma
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prior_checkpoints import BLEND, TOKENS, distance, prior_checkpoint, weight
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm.control import reference
from controlllm.control.expand import control_blocks
from controlllm.control.loss import base_only

CASES = Path(__file__).parents[1] / "reference_cases"
NAMES = sorted(file.parent.name for file in CASES.glob("*/case.json"))
RENAMED = {
    "pretrained_layer": "frozen", "expanded_layer": "expanded", "gating.gate_network.0.": "interpolation.router_",
    "interp_weight.fc.": "interpolation.gate_", "interpolation_factor": "interpolation.alpha_logit",
}  # fmt: skip


def ours(name):
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@cache
def tensors():
    return load(lzma.decompress((CASES / "tensors.safetensors.xz").read_bytes()))


def pick(name, kind):
    keys = json.loads((CASES / name / "tensors.json").read_text())[kind]
    return {tensor: tensors()[str(key)] for tensor, key in keys.items()}


@pytest.fixture(params=NAMES)
def case(request, tmp_path):
    """A folder in the prior format, and what is expected."""
    folder = tmp_path / request.param
    folder.mkdir()
    shutil.copyfile(CASES / request.param / "config.json", folder / "config.json")
    save_file(pick(request.param, "model"), folder / "model.safetensors")
    return folder, pick(request.param, "expected")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_outputs_and_losses(case):
    folder, expected = case
    model = reference.load(folder)
    out = model(expected["input_ids"], labels=expected["labels"], output_hidden_states=True)
    close(out.logits, expected["logits"])
    assert len(out.hidden_states) == sum(name.startswith("hidden_") for name in expected)
    for index, hidden in enumerate(out.hidden_states):
        close(hidden, expected[f"hidden_{index}"])
    close(out.cross_entropy, expected["lm_loss"].squeeze())
    close(out.divergence, expected["alignment_loss"].squeeze())


def test_gradients(case):
    folder, expected = case
    model = reference.load(folder)
    model(expected["input_ids"], labels=expected["labels"]).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    wanted = {ours(name.removeprefix("grad.")): grad for name, grad in expected.items() if name.startswith("grad.")}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert found[name].norm().item() == pytest.approx(grad.norm().item(), rel=1e-5), name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(case, use_cache):
    folder, expected = case
    wanted = json.loads((CASES / folder.name / "case.json").read_text())["greedy_no_cache"]
    prompt = expected["input_ids"][:1, :6]
    arguments = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "use_cache": use_cache}
    model = reference.load(folder)
    assert model.generate(prompt, max_new_tokens=12, min_new_tokens=12, **arguments)[0].tolist() == wanted


def test_imported_is_loaded(case, tmp_path):
    folder, expected = case
    model = AutoModelForCausalLM.from_pretrained(reference.import_reference(folder, tmp_path / "ours"))
    assert torch.equal(model(expected["input_ids"]).logits, reference.load(folder)(expected["input_ids"]).logits)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["lineage"]["imported_from"] == folder.name
    assert config["control"]["detach_teacher"] is False
    if folder.name == "llama_stack":
        assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])


def test_the_dial_goes_back_to_the_base(case):
    folder, expected = case
    with base_only(model := reference.load(folder)):
        base = model(expected["input_ids"]).logits
    assert torch.equal(reference.load(folder, alpha_scale=0.0)(expected["input_ids"]).logits, base)


def test_sharded_bfloat16_is_imported_exactly(tmp_path):
    source = prior_checkpoint(tmp_path / "prior", method="prog", dtype=torch.bfloat16, shards=3)
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("terms")
    (source / "training_args.bin").write_bytes(b"pickle")
    config = json.loads((source / "config.json").read_text())
    config["expansion"] |= {"expanded_from": "/home/someone/Meta-Llama-3.1-8B", "freeze_ori_layers": False}
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/run"}))
    target = reference.import_reference(source, tmp_path / "ours")
    assert {file.name for file in target.iterdir()} == {file.name for file in source.iterdir()} - {"training_args.bin"}
    text = (target / "config.json").read_text()
    assert "/home" not in text
    assert json.loads(text)["lineage"] | {"source_content": ""} == {
        "imported_from": "prior", "expanded_from": "Meta-Llama-3.1-8B", "name_or_path": "run", "source_content": "",
        "tensors": 61, "also_trained": ["frozen blocks"],
    }  # fmt: skip
    stored = {}
    for file in target.glob("*.safetensors"):
        old, new = load_file(source / file.name), load_file(file)
        assert len(old) == len(new)
        stored |= new
        for name, tensor in old.items():
            if "lateral_connection" in name:
                name = name.replace("lateral_connection.weight", "interpolation.map_delta")
                tensor = (tensor.float() - torch.eye(len(tensor))).bfloat16()
            assert torch.equal(new[ours(name)], tensor)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert model.config.rope_parameters["rope_theta"] == 5e5


MEASURED = """
import re, sys
from pathlib import Path
import torch
from controlllm.control.model import control_config, family
from controlllm.control.reference import import_reference
from controlllm.control.settings import ControlSettings
from transformers import LlamaConfig

tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
family("llama").causal_lm(control_config(tiny, ControlSettings(sites=[0])))
def now(what): return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = now("VmRSS")
import_reference(sys.argv[1], sys.argv[2])
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_shard(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 5120, "layers": 3, "trained": [0, 1, 2]}
    source = prior_checkpoint(tmp_path / "prior", method="proj", dtype=torch.bfloat16, shards=6, **sizes)
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert largest > 38e6
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.2 * largest


@pytest.mark.parametrize(("settings", "more"), [
    ({"method": "slerp"}, {}),
    ({"method": "dlerpin"}, {"interpolation_loss_type": "cosine"}),
    ({"method": "prog"}, {}),
    ({"method": "proj"}, {"interpolation_loss_alpha": 0.7}),
    ({"method": "moe"}, {"interpolation_loss_type": "cosine"}),
    ({"method": "lerp"}, {"interpolation_factor": None}),
    ({"method": "lerp"}, {"interpolation_loss_type": "dot"}),
    ({"method": "lerp"}, {"interpolation_loss_alpha": -1}),
    ({"method": "lerp"}, {"interpolation_loss_alpha": -1, "interpolation_loss_type": "dot"}),
    ({"method": "dlerp"}, {"interpolation_loss_alpha": -1}),
    ({"method": "lerp", "family": "mistral"}, {}),
    ({"method": "dlerp", "family": "qwen2"}, {}),
    ({"method": "lerp", "tied": True}, {}),
], ids=str)  # fmt: skip
def test_methods_follow_their_formulas(tmp_path, settings, more):
    folder = prior_checkpoint(tmp_path / "prior", **settings, **more)
    model = reference.load(folder)
    assert model.config.base_model_type == settings.get("family", "llama")
    seen = watch(model)
    out = model(TOKENS, labels=TOKENS)
    old, distances = load_file(folder / "model.safetensors"), []
    expansion = json.loads((folder / "config.json").read_text())["expansion"]
    for index, (f, e, x, blend) in seen.items():
        own = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in old.items()}
        w = weight(expansion, own, f, e, x)
        close(blend, BLEND.get(expansion["merge_method"], BLEND["lerp"])(own, f, e, w))
        distances.append(distance(expansion, own, f, e, w))
    close(out.divergence, torch.stack(distances).mean())


def watch(model):
    """Layer → frozen output, expanded output, input, blend; filled by the next forward pass."""
    seen = {}
    for index, block in enumerate(model.model.layers):
        if block in control_blocks(model):
            both = seen[index] = []
            for part in (block.frozen, block.expanded):
                part.register_forward_hook(lambda _m, _i, out, both=both: both.append(out))
            block.register_forward_hook(lambda _m, i, out, both=both: both.extend([i[0], out]))
    return seen


@pytest.mark.parametrize(("alpha", "share"), [(0.3, 0.3), (-1, 2 * torch.sigmoid(torch.tensor(0.8)).item() - 1)])
def test_norms_are_relaxed(tmp_path, alpha, share):
    model = reference.load(prior_checkpoint(tmp_path / "prior", method="lerp", interpolation_norm_alpha=alpha))
    block, seen = control_blocks(model)[0], []
    for norm in (block.expanded.input_layernorm, block.expanded.post_attention_layernorm):
        norm.register_forward_hook(lambda m, i, out: seen.append((m.norm.weight, i[0], out)))
    model(TOKENS)
    for scale, x, out in seen:
        close(out, share * x + (1 - share) * scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    assert len(seen) == 2
    assert F.mse_loss(seen[0][2], seen[0][1]) > 1e-3
