"""What virtual tokens start from, what is delivered of them, and what does not go with them."""

import json

import pytest
import torch
from families import SIZES
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

import controlllm
from controlllm.config import Method, ModelConfig, PromptConfig, load_config
from controlllm.consolidate import consolidate
from controlllm.errors import UserError
from controlllm.fold import fold
from controlllm.ingest import ingest_model
from controlllm.memory import predict
from controlllm.model_shape import model_shape
from controlllm.pipeline import run
from controlllm.preflight import check
from controlllm.store import run_stage
from controlllm.train.model import load_model
from controlllm.train.prompt import add_prompt
from controlllm.train.weights import empty_model, fill
from controlllm.tuned import load_tuned

KINDS = ["prompt", "prefix"]


def loaded(base, build=load_model, dtype="float32", seed=0, **prompt):
    model = ModelConfig(name="b", dtype=dtype, attention="sdpa")
    return build(base, model, Method(prompt=PromptConfig(**prompt)), seed=seed)


@pytest.mark.parametrize("text", ["Solve it: ", "?", "word " * 30])
def test_a_prompt_starts_from_the_words_that_peft_takes(tiny_base, text):
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tiny_base),
    )  # fmt: skip
    want = get_peft_model(plain, config).prompt_encoder["default"].embedding.weight
    for build in (load_model, empty_model):
        assert torch.equal(loaded(tiny_base, build, init_text=text).virtual_tokens.weight, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_start_is_the_seeds(tiny_base, kind):
    one = loaded(tiny_base, seed=4, dtype="bfloat16", kind=kind).virtual_tokens.weight
    torch.manual_seed(1)
    same, other = (
        loaded(tiny_base, empty_model, seed=s, dtype="bfloat16", kind=kind).virtual_tokens.weight for s in (4, 5)
    )
    assert one.dtype == torch.float32
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    if kind == "prompt":
        embedding = loaded(tiny_base, dtype="bfloat16").get_input_embeddings().weight.float()
        assert all((embedding == row).all(1).any() for row in one)


def test_an_empty_text_and_an_attention_without_prefix_are_refused(tiny_base):
    with pytest.raises(UserError, match=r"prompt.init_text: the base's tokenizer makes no token of it; leave it out"):
        loaded(tiny_base, init_text="")
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    latent = AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES | sizes | {"n_routed_experts": 2, "n_group": 1}))
    with pytest.raises(ValueError, match=r"deepseek_v3 has kv_lora_rank.*set prompt.kind to prompt"):
        add_prompt(latent, PromptConfig(kind="prefix"), seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_memory_counts_what_is_trained(tiny_base, kind, recipe):
    model = loaded(tiny_base, kind=kind)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = load_config(recipe, "control=null", f"prompt={{kind: {kind}}}")
    parts, twice = (predict(model_shape(str(tiny_base)), c, device="cpu").device.bytes for c in (
        config, load_config(recipe, "control=null", f"prompt={{kind: {kind}, num_virtual_tokens: 40}}"),
    ))  # fmt: skip
    assert parts["trained weights"] == 4 * trained
    assert parts["frozen weights"] == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert twice["trained weights"] == 2 * parts["trained weights"]
    assert twice["activations"] == pytest.approx(parts["activations"] * (256 + 40) / (256 + 20), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_delivered_is_the_base_and_an_adapter_of_peft(tiny_base, store, tmp_path, kind):
    base = ingest_model(ModelConfig(name=str(tiny_base))).path
    method, model = Method(prompt=PromptConfig(kind=kind)), loaded(base, kind=kind).eval()

    def build(folder):
        save_file({"virtual_tokens.weight": model.virtual_tokens.weight.detach()}, folder / "trained.safetensors")

    made = run_stage("prepare", config={"mix": {}}, parents={}, build=lambda folder: (folder / "a").write_text("a"))
    trained = run_stage("train", config={"a": 1}, parents={"prepare": made.path}, build=build).path
    folder = consolidate(base, trained, method).path
    weights, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert json.loads((folder / "config.json").read_text())["prompt"] == {"kind": kind, "num_virtual_tokens": 20}
    ids = torch.randint(2, 258, (2, 9))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        torch.testing.assert_close(peft(input_ids=ids).logits[:, -9:], want, atol=1e-5, rtol=1e-5)
        for again in (controlllm.load(folder), load_tuned(folder, dtype="float32")):
            torch.testing.assert_close(again(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
            assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match="has virtual tokens and no twins"):
        controlllm.load(folder, alpha_scale=0.5)
    with pytest.raises(UserError, match="has virtual tokens, which no weight can hold"):
        fold(folder, tmp_path / "folded")
    with pytest.raises(UserError, match="was trained with virtual tokens, which would be left out"):
        model_shape(str(folder))
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="its virtual tokens cannot be read"):
        controlllm.load(folder)


def test_filled_and_loaded_models_are_the_same(tiny_base):
    model, want = loaded(tiny_base, empty_model, kind="prefix"), loaded(tiny_base, kind="prefix")
    fill(model, tiny_base, device="cpu")
    ids = torch.randint(2, 258, (1, 9))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, want.eval()(input_ids=ids).logits)


def test_what_does_not_go_with_virtual_tokens_is_said_before_anything_is_loaded(recipe):
    given = ("control=null", "prompt={num_virtual_tokens: 20}")
    with pytest.raises(UserError, match=r"smoke: vLLM has no place for the virtual tokens .* set smoke to null"):
        check(load_config(recipe, *given, "smoke={}"), serving=False)
    with pytest.raises(UserError, match=r"pack.context_length: 2029 with prompt.num_virtual_tokens 20 .* 2048"):
        check(load_config(recipe, *given, "pack.context_length=2029"))
    check(load_config(recipe, *given, "pack.context_length=2028"), serving=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run(recipe, store, tmp_path, kind):
    config = load_config(
        recipe, "control=null", f"prompt={{kind: {kind}, num_virtual_tokens: 5}}", "train.steps=2",
        "validation={every: 1, rows: 1, generate: {items: 2, max_new_tokens: 4}}",
        "validation.retention={probes: [chat], items: 2}",
        "benchmark={new: [puzzles], old: [chat], items: 2, batch_size: 2, dtype: float32}",
    )  # fmt: skip
    run(config)
    model = tmp_path / "runs" / "tiny" / "model"
    assert {file.name for file in (model / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary" / "summary.json").read_text())
    assert f"{kind} tuning (5 virtual tokens)" in json.dumps(summary)
