"""Folding: exact where it must be, a stock model afterwards, and honest about how far it is from the unfolded one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import controlllm  # noqa: F401 - makes the checkpoints known to transformers
from controlllm import distance
from controlllm.control.expand import control_blocks
from controlllm.control.fold import fold_model, measure_alphas
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.fold import fold

LINEAGE = '{"stage": "consolidate", "key": "k", "files": {}, "content": "%s"}'
IDS = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
INTERPOLATIONS = ("lerp", "dlerp", "dlerpin", "slerp", "moe", "moe_hard", "proj", "none")


def base_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()


def trained(sites=(1, 3), seed=2, base=0, **settings):
    """An expanded model with its trained tensors moved at random."""
    model = expand_model(base_model(base), ControlSettings(sites=list(sites), **settings))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def saved(model, folder, tokenizer):
    model.config.lineage = {"base_content": "abc"}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("yours")
    (folder / "lineage.json").write_text(LINEAGE % folder.name)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {n}:\nthe quick brown fox has seen {n * 37} lazy dogs." for n in range(24)))
    return file


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_0_is_the_base_bitwise(interpolation, dtype):
    folded = fold_model(trained(interpolation=interpolation).to(dtype), {1: 0.0, 3: 0.0})
    assert type(folded) is LlamaForCausalLM
    assert folded.dtype == dtype
    base = base_model()
    for parameter in base.parameters():  # `to` would round the rotary frequencies, which a loaded model keeps exact
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(folded(IDS).logits, base(IDS).logits)


def test_alpha_1_is_the_twin_bitwise():
    model = trained(interpolation="none")
    assert measure_alphas(model, []) == {1: 1.0, 3: 1.0}
    assert torch.equal(fold_model(model, {1: 1.0, 3: 1.0})(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_untrained_folds_to_the_base_for_any_alpha(alpha):
    model = expand_model(base_model(), ControlSettings(sites=[0, 1, 2, 3]))
    assert torch.equal(fold_model(model, dict.fromkeys(range(4), alpha))(IDS).logits, base_model()(IDS).logits)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mixtral"])
def test_other_families_fold(family):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": 258}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "sliding_window": 8}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    plain, before = type(base), base(IDS).logits
    model = expand_model(base, ControlSettings(sites=[0, 2], interpolation="none")).eval()
    assert torch.equal(fold_model(model, {0: 0.3, 2: 0.6})(IDS).logits, before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    folded = fold_model(model, measure_alphas(model, []))
    assert type(folded) is plain
    assert torch.equal(folded(IDS).logits, model(IDS).logits)


def test_folded_weights_are_the_weighted_mean_and_the_rest_is_shared():
    model = trained()
    folded = fold_model(model, {1: 0.25, 3: 0.75})
    for block, layer, alpha in zip(control_blocks(model), (1, 3), (0.25, 0.75), strict=True):
        for name, weight in folded.model.layers[layer].named_parameters():
            mean = (1 - alpha) * block.frozen.get_parameter(name) + alpha * block.expanded.get_parameter(name)
            torch.testing.assert_close(weight, mean)
    assert folded.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert folded.lm_head.weight is folded.model.embed_tokens.weight


def test_small_moves_fold_to_second_order():
    """For small moves the folded model's error is of second order, so that folding is worth anything at all."""
    model, base = trained(), base_model()(IDS).logits
    errors = []
    for size in (0.1, 0.05):
        smaller = trained()
        for block, whole in zip(control_blocks(smaller), control_blocks(model), strict=True):
            for name, weight in block.expanded.named_parameters():
                weight.data = torch.lerp(
                    block.frozen.get_parameter(name), whole.expanded.get_parameter(name), size
                ).data
        unfolded = smaller(IDS).logits
        folded = fold_model(smaller, measure_alphas(smaller, []))(IDS).logits
        errors.append((folded - unfolded).norm() / (unfolded - base).norm())
    assert errors[1] < 0.6 * errors[0]


def test_hybrid_folds_its_pairs_and_keeps_its_stacked_layers():
    model = trained((0, 1, 2, 3), layout="hybrid", interpolation="none")
    folded = fold_model(model, {1: 1.0, 3: 1.0})
    assert type(folded) is LlamaForCausalLM
    assert folded.config.num_hidden_layers == len(folded.model.layers) == 6
    assert torch.equal(folded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("interpolation", ["dlerp", "dlerpin", "moe"])
def test_measured_alpha_is_the_mean_of_the_gate_without_padding(interpolation):
    model = trained(interpolation=interpolation)
    for block in control_blocks(model):
        for name, parameter in block.interpolation.named_parameters():
            parameter.data += torch.randn_like(parameter) if "weight" in name else 0.3
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    expected = {1: [], 3: []}
    for block, site in zip(control_blocks(model), (1, 3), strict=True):
        seen = {}
        block.frozen.register_forward_hook(lambda _m, inputs, out, seen=seen: seen.update(x=inputs[0], frozen=out))
        block.expanded.register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(expanded=out))
        block.register_forward_hook(
            lambda _m, _i, _o, seen=seen, block=block, site=site: expected[site].append(
                block.interpolation(seen["frozen"], seen["expanded"], seen["x"])[1]
            )
        )
    found = measure_alphas(model, [{"input_ids": IDS, "attention_mask": mask}])
    for site, (alpha, *_) in expected.items():
        assert found[site] == pytest.approx(alpha.squeeze(-1)[mask.bool()].mean().item(), abs=1e-6)
        assert 0.02 < found[site] < 0.98
    assert "weights" not in vars(control_blocks(model)[0].interpolation)


def test_scaled_model_folds_with_its_scale():
    model = trained(alpha_scale=0.5)
    full = measure_alphas(trained(), [])
    assert measure_alphas(model, []) == pytest.approx({site: alpha / 2 for site, alpha in full.items()})


def test_two_runs_commute_and_add_up():
    one, two = trained((1, 3)), trained((0, 3), seed=5, interpolation="dlerp")
    alphas = {1: 0.5, 3: 0.4}, {0: 0.3, 3: 0.7}
    folded = fold_model(one, alphas[0], other=(two, alphas[1]))
    reverse = fold_model(two, alphas[1], other=(one, alphas[0]))
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), reverse.parameters(), strict=True))
    base = base_model().state_dict()
    moves = [
        {name: tensor - base[name] for name, tensor in fold_model(model, its).state_dict().items()}
        for model, its in zip((one, two), alphas, strict=True)
    ]
    for name, tensor in folded.state_dict().items():
        torch.testing.assert_close(tensor, base[name] + moves[0][name] + moves[1][name])


def test_two_untrained_runs_are_the_base():
    one, two = (expand_model(base_model(), ControlSettings(sites=sites)) for sites in ([1, 3], [0, 1]))
    folded = fold_model(one, {1: 0.5, 3: 0.5}, other=(two, {0: 0.5, 1: 0.5}))
    assert torch.equal(folded(IDS).logits, base_model()(IDS).logits)


def test_runs_over_different_bases_do_not_fold():
    other = trained(base=7)
    other.model.embed_tokens.weight.data.copy_(base_model().model.embed_tokens.weight)
    half = {1: 0.5, 3: 0.5}
    with pytest.raises(UserError, match=r"frozen tensors 'model\.layers\.0\.self_attn\.q_proj\.weight' are not equal"):
        fold_model(trained(), half, other=(other, half))


@pytest.mark.parametrize(("settings", "alphas", "says"), [
    ({"layout": "stack"}, {}, "layout: stack is already a plain model"),
    ({"interpolation": "prog"}, {1: 0.5, 3: 0.5}, "interpolation: prog maps the frozen output"),
    ({"norm_relaxation": "learned"}, {1: 0.5, 3: 0.5}, "norm_relaxation: learned has no place"),
    ({"layout": "hybrid", "alpha_scale": 0.5}, {3: 0.5}, r"cannot be folded with control\.alpha_scale 0\.5"),
    ({}, {1: 0.5}, r"given for the layers \[1\]; the checkpoint has pairs at \[1, 3\]"),
    ({}, {1: 0.5, 3: 1.5}, r"1\.5 at layer 3 is not within"),
])  # fmt: skip
def test_what_cannot_be_folded_is_said(settings, alphas, says):
    with pytest.raises(UserError, match=says):
        fold_model(trained(**settings), alphas)


def test_plain_models_have_nothing_to_fold():
    with pytest.raises(UserError, match="nothing to fold"):
        fold_model(base_model(), {})


def test_command_writes_a_stock_model_that_needs_no_controlllm(tmp_path, tokenizer, text):
    source = saved(trained(interpolation="dlerp"), tmp_path / "run", tokenizer)
    out = fold(source, tmp_path / "deep" / "plain", text=text)
    folded = AutoModelForCausalLM.from_pretrained(out)
    torch.save(folded(IDS).logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(out)!r})
assert type(model).__name__ == "LlamaForCausalLM" and "controlllm" not in sys.modules
ids = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert AutoTokenizer.from_pretrained({str(out)!r}).chat_template
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"control", "base_model_type"} & set(config)
    assert config["lineage"]["base_content"] == "abc"
    (made,) = config["lineage"]["folded"]
    assert made["content"] == "run"
    assert set(made["alphas"]) == {"1", "3"}
    assert {"LICENSE.txt", "fold.json", "chat_template.jinja", "generation_config.json"} <= {
        f.name for f in out.iterdir()
    }
    assert not (out / "lineage.json").exists()
    assert [f.name for f in tmp_path.glob("deep/.*")] == []


def test_report_is_what_the_models_say(tmp_path, tokenizer, text):
    source = saved(trained(), tmp_path / "run", tokenizer)
    out = fold(source, tmp_path / "plain", text=text)
    told = json.loads((out / "fold.json").read_text())["distance"][0]["text.txt"]
    half = distance.read_documents(text, tokenizer)[1::2]
    assert told["documents"] == len(half) == 12
    kl, tokens, same = 0.0, 0, 0
    models = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)
    for document in half:
        p, q = (m(torch.tensor([document.ids])).logits[0, :-1].double().log_softmax(-1) for m in models)
        kl, tokens = kl + (p.exp() * (p - q)).sum().item(), tokens + len(p)
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    assert told["tokens"] == tokens
    assert told["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert told["same_first"] == pytest.approx(same / tokens, abs=2e-3)
    assert told["kl_low"] < told["kl"] < told["kl_high"]
    assert told["loss_base"] != told["loss_unfolded"] != told["loss_folded"]


def test_untrained_is_no_distance_away(tmp_path, tokenizer, text, capsys):
    model = expand_model(base_model(), ControlSettings(sites=[1, 3], interpolation="dlerp"))
    out = fold(saved(model, tmp_path / "run", tokenizer), tmp_path / "plain", text=text)
    told = json.loads((out / "fold.json").read_text())["distance"][0]["text.txt"]
    assert (told["kl"], told["kl_high"], told["same_first"]) == (0, 0, 1)
    assert told["loss_base"] == told["loss_unfolded"] == told["loss_folded"]
    assert "next: AutoModelForCausalLM.from_pretrained(" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "written"), [("a.json", '{"1": 0.25, "3": 1}'), ("a.yaml", "1: 0.25\n3: 1\n")])
def test_alphas_of_a_file(tmp_path, tokenizer, text, name, written):
    (tmp_path / name).write_text(written)
    source = saved(trained(), tmp_path / "run", tokenizer)
    out = fold(source, tmp_path / "plain", alpha=tmp_path / name, text=text)
    expected = fold_model(AutoModelForCausalLM.from_pretrained(source), {1: 0.25, 3: 1.0})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected(IDS).logits)


def test_command_folds_two_runs_and_measures_probes(tmp_path, tokenizer, text, store):
    one = saved(trained((1, 3)), tmp_path / "one", tokenizer)
    two = saved(trained((0, 3), seed=5), tmp_path / "two", tokenizer)
    out = fold(one, tmp_path / "plain", other=two, alpha=0.5, text=text, new=["puzzles"], old=["drift"], items=3)
    told = json.loads((out / "fold.json").read_text())
    assert [made["checkpoint"] for made in told["folded"]] == ["one", "two"]
    assert len(told["distance"]) == len(told["benchmark"]) == 2
    losses = [against["puzzles"]["metrics"]["loss"] for against in told["benchmark"]]
    assert losses[0]["items"] == losses[1]["items"] == 3
    assert losses[0]["after"] == losses[1]["after"]
    assert losses[0]["before"] != losses[1]["before"]
    expected = fold_model(trained((1, 3)), {1: 0.5, 3: 0.5}, other=(trained((0, 3), seed=5), {0: 0.5, 3: 0.5}))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected(IDS).logits)


def test_default_text_is_the_held_out_probes(tokenizer):
    documents = distance.read_documents(None, tokenizer)
    assert {d.source for d in documents} == {"prose", "python", "chat"}
    assert all(1 < len(d.ids) <= distance.TOKENS for d in documents)


def test_text_must_be_had(tokenizer, monkeypatch):
    monkeypatch.setattr("controlllm.data.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is not installed; .*; or give a text of your own with --text"):
        distance.read_documents(None, tokenizer)


@pytest.mark.parametrize(("options", "says"), [
    ({"alpha": "2"}, r"alpha: 2 is not within 0"),
    ({"alpha": "nan"}, r"alpha: nan is not within 0"),
    ({"alpha": "most"}, "alpha: most is neither mean, a number of 0..1, nor a file"),
    ({"alpha": "{folder}/wrong.yaml"}, "must be JSON or YAML of layers and alphas"),
    ({"alpha": "{folder}/few.yaml"}, r"is for the layers \[1\]; there are pairs at \[1, 3\]"),
    ({"text": "{folder}/short.txt"}, "found 1 paragraphs or rows with text; give two at least"),
    ({"text": "{folder}/rows.jsonl"}, "row 1 has no field 'text'; the row has: words"),
    ({"text": "{folder}/none.txt"}, "no such file"),
    ({"new": ["riddles"]}, "unknown probe 'riddles'; known: "),
    ({"new": ["puzzles"], "items": 0}, "items: "),
    ({"other": "{folder}"}, "has no config.json"),
    ({"output": "{folder}"}, "exists and is not empty"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, tokenizer, text, options, says):
    files = {"wrong.yaml": "- 1", "few.yaml": "1: 0.5", "short.txt": "one", "rows.jsonl": '{"words": "x"}'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    source = saved(trained(), tmp_path / "run", tokenizer)
    given = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    output = given.pop("output", tmp_path / "plain")
    with pytest.raises(UserError, match=says) as error:
        fold(source, output, **{"text": text} | given)
    assert "\n" not in str(error.value)
    assert not Path(tmp_path / "plain").exists()


def test_stack_checkpoint_says_that_it_is_plain(tmp_path, tokenizer, text):
    source = saved(trained(layout="stack"), tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match=r"run: control\.layout: stack is already a plain model"):
        fold(source, tmp_path / "plain", text=text)
